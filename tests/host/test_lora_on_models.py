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


Output = tuple[dict[str, Row], Row]
"""Rows of every kind of model and of single cases, and what the host knows."""


@cache
def output_of(host: Any) -> Output:
    command = [str(host.python), str(HERE / "lora_on_models.py"), str(host.path)]
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    *rows, told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row.get("model") or row["case"]: row for row in rows}, told


def models(output: Output) -> dict[str, Row]:
    return {name: row for name, row in output[0].items() if "model" in row}


@pytest.fixture(params=HOSTS, ids=lambda host: host.path.name)
def output(request: pytest.FixtureRequest) -> Output:
    return output_of(request.param)


def test_every_kind_of_model_is_built_or_says_why_not(output: Output) -> None:
    rows, told = models(output), output[1]
    assert {*rows} == {*told["known"]} - {*told["left out"]}
    assert len(told["left out"]) <= 5
    assert len(rows) >= (96 if len(told["known"]) > 90 else 60)


def test_every_name_of_the_host_has_a_place(output: Output) -> None:
    rows = models(output)
    assert {name: row["refused"] for name, row in rows.items() if row["refused"]} == {}
    assert {name: row["dropped"] for name, row in rows.items() if row["dropped"]} == {}
    for name, row in rows.items():
        assert sum(row["spellings"].values()) + len(row["not there"]) == row["names"], name


def test_merged_weights_are_the_host_s(output: Output) -> None:
    rows = models(output)
    assert {name: row["merged"] for name, row in rows.items() if not row["merged"] <= 1e-6} == {}


def test_side_paths_are_the_merge(output: Output) -> None:
    rows = models(output)
    assert {name: row["live"] for name, row in rows.items() if not row["live"] <= 3e-6} == {}
    assert all(row["zero"] for row in rows.values()), "strength 0 is no LoRA"
    assert all(row["beside"] > 10 for row in rows.values())


# --- single cases ----------------------------------------------------------------------------------------------------


def cases(output: Output, begin: str) -> dict[str, Row]:
    return {name: row for name, row in output[0].items() if "case" in row and name.startswith(begin)}


def test_whole_models_run_beside_their_layers_as_merged(output: Output) -> None:
    """Transformers and UNets of pictures, videos and sound: what the host computes without a call of the layer is merged."""
    rows = cases(output, "whole ")
    assert len(rows) == (27 if len(output[1]["known"]) > 90 else 19)
    assert {name: row["difference"] for name, row in rows.items() if not row["difference"] <= 2e-6} == {}
    assert min(row["change"] for row in rows.values()) > 0.03
    assert all(row["zero"] for row in rows.values()), "strength 0 is bit-identical, and nothing stays on the model"


def test_control_loras_widen_the_layer_as_the_host_s_loader_does(output: Output) -> None:
    rows = cases(output, "control")
    assert {name: row["difference"] for name, row in rows.items() if not row["difference"] <= 1e-6} == {}
    assert len(rows) == 3
    row = rows["control"]
    assert row["same keys"]
    assert row["shape"] == [32, 32], "16 inputs were 32 × 16"
    assert row["room"] in (None, [32, 32])
    assert row["predicted"] <= 1e-6
    assert row["zero"]
    assert row["gone"]
    reason = "it gives img_in more inputs than the model was built with"
    assert f"runs merged: {reason}" in row["text"]
    assert "img_in takes 32 inputs instead of 16: the conditioning has to bring a control picture" in row["shown"]
    assert row["live"].startswith("InvalidInputError: mode live was asked for")
    assert reason in row["live"]
    assert row["steps"].startswith("InvalidInputError: its strength changes over the steps")
    assert "not applied" in row["allowed"]
    assert "only the merged mode can do" in row["allowed"]


def test_files_that_the_host_renames(output: Output) -> None:
    for name in ("Wan-Fun", "USO"):
        row = output[0][name]
        assert row["keys"] >= 20
        assert row["same keys"]
        assert row["difference"] <= 1e-6


def test_hostile_files_cost_one_sentence(output: Output) -> None:
    rows = cases(output, "hostile")
    assert len(rows) == 6
    for name, row in rows.items():
        assert row["said"].startswith(("CorruptFileError", "IncompatibleAdapterError")), name
        assert len(row["said"]) < 500
        assert "\n" not in row["said"]


def test_a_lora_of_another_family_is_refused(output: Output) -> None:
    rows = {
        name: row
        for name, row in output[0].items()
        if " on " in name and "said" in row and not name.startswith("hostile")
    }
    families = {name.split(" on ")[0] for name in rows}
    assert len(families) >= 8
    assert len(rows) == len(families) * (len(families) - 1)
    for name, row in rows.items():
        assert row["said"].startswith("IncompatibleAdapterError"), f"{name}: {row['said']}"
        assert "choose a" in row["said"].lower() or "another variant" in row["said"], name


def test_algorithms_on_rows_of_fused_layers(output: Output) -> None:
    rows = {name: row for name, row in output[0].items() if "live" in row and " on " in name}
    assert len(rows) >= 20
    for name, row in rows.items():
        assert row["difference"] <= 1e-6, name
        assert row["live"] <= 3e-6, name
        assert row.get("host", 0.0) <= 1e-6, name
    assert sum("host" in row for row in rows.values()) >= 12


def test_live_strengths_write_no_weight_and_cost_two_products_a_layer(output: Output) -> None:
    rows = cases(output, "counted ")
    assert {*rows} == {"counted Flux", "counted ZImage"} & {f"counted {kind}" for kind in output[1]["known"]}
    for row in rows.values():
        assert row["same"]
        assert row["patches"] == 0
        assert (
            row["one"] - row["plain"] == row["other"] - row["plain"] == row["three"] - row["plain"] == 2 * row["layers"]
        )


def test_text_encoders(output: Output) -> None:
    rows = cases(output, "text encoders")
    assert len(rows) == 14
    for name, row in rows.items():
        assert row["lost"] == [], name
        assert row["difference"] <= 1e-6, name
        assert sum(row["spellings"].values()) == row["names"], name
