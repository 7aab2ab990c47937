"""SD3.5's image prompts in every ComfyUI at hand give what diffusers' adapter gives, beside other packs and at their price."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from host import sd3_oracles
from host.comfy_server import find_hosts
from host.sd3_oracles import COLUMNS, INPUTS, LATER, POOLED, ROWS, SIGMA, numbers
from ipadapter_core import AdapterPatch, ImagePrompt, WeightSchedule, bake, load_adapter
from ipadapter_core.backends.diffusers import doors as diffusers
from ipadapter_core.models import layout_of

SCRIPT = Path(__file__).resolve().parent / "sd3_parity.py"
TOLERANCE = 1e-5  # fp32
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    apart = sd3_oracles.build(folder)
    assert apart < TOLERANCE, f"the formula here and diffusers' adapter are {apart} apart"
    return folder


@pytest.fixture(scope="module", params=[0, 1], ids=["newest", "0.3.64"])
def rows(request: pytest.FixtureRequest, oracles: Path) -> Rows:
    hosts = find_hosts()
    if request.param >= len(hosts):
        pytest.skip("no such ComfyUI at $COMFYUI_PATH or ~/comfy")
    host = hosts[request.param]
    command = [str(host.python), str(SCRIPT), str(host.path), str(oracles)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {row["case"]: row for row in found}


def test_every_prediction_is_the_oracles(rows: Rows) -> None:
    compared = {case: row["difference"] for case, row in rows.items() if row["difference"] is not None}
    assert len(compared) >= 25
    assert {case: difference for case, difference in compared.items() if not difference < TOLERANCE} == {}


def test_strength_zero_and_calls_without_prompts_are_the_base_model_to_the_bit(rows: Rows) -> None:
    cases = [f"{kind} {when}" for kind in ("large", "medium") for when in ("off", "after")]
    assert [rows[case]["same"] for case in cases] == [True] * 4


def test_other_packs_are_called_once_for_every_block(rows: Rows) -> None:
    cases = [f"{slot} {when}" for slot in ("dit", "override") for when in ("before", "behind")]
    assert [rows[case]["calls"] for case in cases] == [1.0] * 4


def test_no_hook_is_left_on_the_model(rows: Rows) -> None:
    assert rows["an error inside"]["said"] == "on purpose"
    assert [rows[case]["left"] for case in ("large instantx", "medium instantx", "an error inside")] == [0, 0, 0]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
def test_tokens_and_layers_run_once_for_every_sigma(rows: Rows, sampler: str) -> None:
    """Samplers of two evaluations ask the model twice at most sigmas."""
    row = rows[f"made by {sampler}"]
    assert row["sigmas"] >= 3
    assert (row["made"]["tokens"], row["made"]["sites"]) == (row["sigmas"],) * 2


def test_a_block_pays_for_one_attention_and_the_joining_of_its_keys(rows: Rows) -> None:
    kernels = rows["kernels"]["kernels"]
    assert kernels["scaled_dot_product_attention"] == 1
    assert kernels["cat"] == 2, "keys and values"
    assert sum(kernels.values()) < 10
    assert rows["kernels"]["reads"] <= 1, "the timestep, once a call"


# --- under diffusers ---------------------------------------------------------------------------------------------------


def patch(model: Any, folder: Path, file: str = "instantx", *, scale: float = 0.7, each: bool = False, mask: bool = False) -> AdapterPatch:  # fmt: skip
    adapter = load_adapter(dict(load_file(folder / f"{file}.safetensors")), name=file)
    features, neutral = INPUTS["features"][: 2 if each else 1], INPUTS["neutral"]
    with torch.no_grad():
        cond, uncond = adapter.tokens(features), adapter.tokens(neutral.expand_as(features))
    width = adapter.spec.token_dim
    prompt = ImagePrompt(cond, uncond, features[:, None], neutral[:, None], file, "none", width, spec=adapter.spec)
    region = INPUTS["mask"].repeat_interleave(2, 0).repeat_interleave(2, 1) if mask else None
    return bake(adapter, prompt, layout_of(model), WeightSchedule(scale), region)


def predict(model: Any, *patches: AdapterPatch, branch: Any, sigma: float = SIGMA) -> Tensor:
    x, text = INPUTS["x"], INPUTS["positive" if branch == "cond" else "negative"]
    with torch.no_grad(), diffusers.apply(model, *patches, branches=(branch,)):
        pooled, timestep = numbers(1, POOLED, seed=9).expand(len(x), -1), torch.full((len(x),), 1000 * sigma)
        return model(x, text.expand(len(x), -1, -1), pooled, timestep).sample


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_under_diffusers_too(oracles: Path, branch: str) -> None:
    expected = load_file(oracles / "expected.safetensors")
    large, medium = sd3_oracles.sd35(), sd3_oracles.sd35(medium=True)
    assert tuple(side // 2 for side in INPUTS["x"].shape[-2:]) == (ROWS, COLUMNS)
    got = {
        "large instantx": predict(large, patch(large, oracles), branch=branch),
        "medium instantx": predict(medium, patch(medium, oracles), branch=branch),
        "each": predict(large, patch(large, oracles, each=True), branch=branch),
        "mask": predict(large, patch(large, oracles, mask=True), branch=branch),
        "later": predict(large, patch(large, oracles), branch=branch, sigma=LATER),
        "two": predict(
            large, patch(large, oracles, mask=True), patch(large, oracles, "other", scale=-0.4), branch=branch
        ),
    }
    norms = (large.transformer_blocks[0].attn.norm_q, large.transformer_blocks[1].attn.norm_k)
    for norm in norms:
        norm.weight.data[3] = 1e-9
    got["unsound"] = predict(large, patch(large, oracles), branch=branch)
    name = "positive" if branch == "cond" else "negative"
    apart = {case: float((out - expected[f"{case}/{name}"]).abs().max()) for case, out in got.items()}
    assert {case: difference for case, difference in apart.items() if not difference < TOLERANCE} == {}
