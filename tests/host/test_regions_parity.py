"""LoRAs in regions of every ComfyUI's own transformers are the blend by hand of every layer's outputs, token by token."""

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
OLDER = {"Flux", "Flux, Kontext", "Chroma", "SD3", "Qwen-Image", "Qwen-Image-Edit", "Lumina 2", "Wan"}
pytestmark = pytest.mark.skipif(not HOSTS, reason="no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")

Row = dict[str, Any]


@cache
def rows_of(host: Any) -> dict[str, Row]:
    command = [str(host.python), str(HERE / "regions_parity.py"), str(host.path)]
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["case"]: row for row in found if "absent" not in row}


@pytest.fixture(params=HOSTS, ids=lambda host: host.path.name)
def rows(request: pytest.FixtureRequest) -> dict[str, Row]:
    return rows_of(request.param)


def test_every_family_is_there(rows: dict[str, Row]) -> None:
    assert {*rows} >= OLDER
    if rows_of(HOSTS[0]) is rows:  # the newest
        assert {*rows} == OLDER | {"Flux.2", "Z-Image", "Anima"}


def test_two_halves_are_the_blend_by_hand(rows: dict[str, Row]) -> None:
    assert {name: row["difference"] for name, row in rows.items() if not row["difference"] <= 1e-5} == {}
    assert {name: row["effect"] for name, row in rows.items() if row["effect"] < 0.1} == {}


def test_nothing_is_nothing_and_two_halves_of_one_are_the_whole(rows: dict[str, Row]) -> None:
    assert [name for name, row in rows.items() if not row["zeros"]] == []
    assert {name: row["halves"] for name, row in rows.items() if not row["halves"] <= 1e-5} == {}


def test_the_negative_prompt_has_its_strength_in_one_batch_with_the_other(rows: dict[str, Row]) -> None:
    assert {name: row["negative"] for name, row in rows.items() if not max(row["negative"]) <= 1e-5} == {}


def test_regions_cost_no_pass_and_no_wait(rows: dict[str, Row]) -> None:
    assert {row["passes"] for row in rows.values()} == {1.0}
    assert {row["synchronisations"] for row in rows.values()} == {0}
