"""Image prompts in every ComfyUI's own FLUX.1 and Chroma give the predictions of the published formulas, whatever else is there."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from host import flux_oracles
from host.comfy_server import find_hosts

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-5  # fp32, outputs of size 1; the base models alone are 3e-6 apart
HOSTS = find_hosts()
pytestmark = pytest.mark.skipif(not HOSTS, reason="no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    apart = flux_oracles.build(folder)
    assert max(apart.values()) < TOLERANCE, "the formula of XLabs here is not diffusers' own"
    return folder


@cache
def rows_of(host: Any, folder: Path) -> dict[str, dict[str, Any]]:
    command = [str(host.python), str(HERE / "flux_parity.py"), str(host.path), str(folder)]
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["case"]: row for row in found}


@pytest.fixture(params=HOSTS, ids=lambda host: host.path.name)
def rows(request: pytest.FixtureRequest, folder: Path) -> dict[str, dict[str, Any]]:
    return rows_of(request.param, folder)


def test_every_prediction_is_the_formulas(rows: dict[str, dict[str, Any]]) -> None:
    compared = {name: row["difference"] for name, row in rows.items() if row["difference"] is not None}
    assert len(compared) >= 53
    assert {name: difference for name, difference in compared.items() if not difference < TOLERANCE} == {}


def test_strength_zero_and_removed_prompts_change_no_bit(rows: dict[str, dict[str, Any]]) -> None:
    told = {name: row["same"] for name, row in rows.items() if "same" in row}
    assert len(told) == 10
    assert all(told.values()), told


def test_no_hook_is_left_behind(rows: dict[str, dict[str, Any]]) -> None:
    told = {name: row["left"] for name, row in rows.items() if "left" in row}
    assert len(told) == 5
    assert {*told.values()} == {0}
    assert rows["an error inside"]["said"] == "on purpose"


def test_other_packs_on_the_model_are_called_once_in_every_block(rows: dict[str, dict[str, Any]]) -> None:
    told = {name: row["calls"] for name, row in rows.items() if "calls" in row}
    assert len(told) == 8
    assert {*told.values()} == {1.0}


def test_a_block_costs_no_more_than_it_needs(rows: dict[str, dict[str, Any]]) -> None:
    """One attention, two changes of layout, one addition (into half of the blocks' joined tensors a copy), and nothing is read."""
    for family in ("xlabs", "instantx"):
        row = rows[f"{family} kernels"]
        assert sum(row["kernels"].values()) <= 4, row
        assert row["synchronisations"] == 0
        # a product for the scores and one for the values, for the queries of both branches of two latents
        text = flux_oracles.INPUTS["positive"].shape[1]
        picture = flux_oracles.ROWS * flux_oracles.COLUMNS
        queries = flux_oracles.DOUBLE * picture
        queries += flux_oracles.SINGLE * (picture + text) if family == "instantx" else 0
        assert row["flops"] == 4 * 4 * queries * flux_oracles.TOKENS * flux_oracles.WIDTH, family


def test_the_comparison_can_fail(rows: dict[str, dict[str, Any]], folder: Path) -> None:
    """Predictions with and without an image, of two families, and with a mask are far apart."""
    from safetensors.torch import load_file

    expected = load_file(folder / "expected.safetensors")
    for one, other in (
        ("flux plain", "flux xlabs"), ("flux xlabs", "flux instantx"), ("flux instantx", "flux raw"), ("flux plain", "flux instantcharacter"),
        ("flux instantcharacter", "instantcharacter mask"),
        ("flux xlabs", "xlabs mask"), ("flux instantx", "instantx mask"), ("flux raw", "raw unsound"),
        ("flux xlabs", "xlabs reference"), ("flux instantx", "instantx each"), ("chroma plain", "chroma xlabs"),
    ):  # fmt: skip
        apart = (expected[f"{one}/positive"] - expected[f"{other}/positive"]).abs().max()
        assert apart > 100 * TOLERANCE, (one, other)
