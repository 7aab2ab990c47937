"""LoRAs in every spelling that a ComfyUI's own key map offers, on every kind of model that it builds: as its own loader applies them."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from host.comfy_server import find_hosts

HERE = Path(__file__).resolve().parent
HOSTS = find_hosts()
pytestmark = pytest.mark.skipif(not HOSTS, reason="no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")

Row = dict[str, Any]


@cache
def output_of(host: Any) -> tuple[dict[str, Row], Row]:
    command = [str(host.python), str(HERE / "lora_on_models.py"), str(host.path)]
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    *rows, told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["model"]: row for row in rows}, told


@pytest.fixture(params=HOSTS, ids=lambda host: host.path.name)
def output(request: pytest.FixtureRequest) -> tuple[dict[str, Row], Row]:
    return output_of(request.param)


def test_every_kind_of_model_is_built_or_says_why_not(output: tuple[dict[str, Row], Row]) -> None:
    rows, told = output
    assert {*rows} == {*told["known"]} - {*told["left out"]}
    assert len(told["left out"]) <= 5
    assert len(rows) >= (96 if len(told["known"]) > 90 else 60)


def test_every_name_of_the_host_has_a_place(output: tuple[dict[str, Row], Row]) -> None:
    rows, _ = output
    assert {name: row["refused"] for name, row in rows.items() if row["refused"]} == {}
    assert {name: row["dropped"] for name, row in rows.items() if row["dropped"]} == {}
    for name, row in rows.items():
        assert sum(row["spellings"].values()) + len(row["not there"]) == row["names"], name


def test_merged_weights_are_the_host_s(output: tuple[dict[str, Row], Row]) -> None:
    rows, _ = output
    assert {name: row["merged"] for name, row in rows.items() if not row["merged"] <= 1e-6} == {}


def test_side_paths_are_the_merge(output: tuple[dict[str, Row], Row]) -> None:
    rows, _ = output
    assert {name: row["live"] for name, row in rows.items() if not row["live"] <= 3e-6} == {}
    assert all(row["zero"] for row in rows.values()), "strength 0 is no LoRA"
    assert all(row["beside"] > 10 for row in rows.values())
