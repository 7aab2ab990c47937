"""Anima's image prompts in the newest ComfyUI give what its blocks give with the adapters' formulas written into them by hand.

There is no other program to compare with that runs here: LuciferTC's node and anima_lora need weights and a GPU.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from host.comfy_server import Host, find_hosts

SCRIPT = Path(__file__).resolve().parent / "anima_parity.py"
TOLERANCE = 1e-5  # fp32
FAMILIES = ("character", "pe")


def run(host: Host) -> list[dict[str, Any]]:
    command = [str(host.python), str(SCRIPT), str(host.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('{"case"', '{"absent"'))]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    hosts = find_hosts()
    if not hosts:
        pytest.skip("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")
    found = run(hosts[0])
    if "absent" in found[0]:
        pytest.skip(f"{hosts[0].name}: {found[0]['absent']}")
    return {row["case"]: row for row in found}


def test_every_prediction_is_the_formulas(rows: dict[str, dict[str, Any]]) -> None:
    compared = {case: row["difference"] for case, row in rows.items() if row["difference"] is not None}
    assert len(compared) == 30
    assert {case: difference for case, difference in compared.items() if not difference < TOLERANCE} == {}
    assert [family for family in FAMILIES if rows[family]["effect"] < 0.1] == []


def test_the_base_model_is_left_to_the_bit(rows: dict[str, dict[str, Any]]) -> None:
    """At strength 0, after a prompt, and in the negative branch of a Character Reference, which no picture reaches."""
    cases = [f"{family} off" for family in FAMILIES] + [f"after {family}" for family in FAMILIES]
    assert [rows[case]["same"] for case in (*cases, "negative of character")] == [True] * 5


def test_other_packs_are_called_as_often_as_without_us(rows: dict[str, dict[str, Any]]) -> None:
    for family in FAMILIES:
        for when in ("before", "behind"):
            assert rows[f"{family}, patches {when}"]["calls"] == 1
            assert rows[f"{family}, override {when}"]["calls"] == 2, "a block attends to itself and to the text"


def test_no_hook_is_left_on_the_model(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["an error inside"]["said"] == "on purpose"
    assert [rows[case]["left"] for case in (*FAMILIES, "an error inside")] == [0, 0, 0]


def test_a_block_pays_for_one_attention_and_the_gate(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["pe kernels"]["kernels"] == {"scaled_dot_product_attention": 1, "add": 1}
    gated = rows["character kernels"]["kernels"]
    assert gated.pop("cat") == 1, "the negative branch's tokens stay beside"
    assert gated == {"scaled_dot_product_attention": 1, "add": 1, "mul": 1, "linear": 1, "silu": 1}
    assert [rows[f"{family} kernels"]["reads"] for family in FAMILIES] == [0, 0]


def test_the_lora_inside_reaches_every_layer_or_the_attention_to_the_text(rows: dict[str, dict[str, Any]]) -> None:
    """Of three blocks: the layers that the host patches are those that we say it does, and they change the picture."""
    for case, layers in (("LoRA", 30), ("LoRA, cross-attention", 12)):
        assert (rows[case]["layers"], rows[case]["placed"]) == (layers, layers)
        assert rows[case]["effect"] > 0.01


def test_a_live_lora_reaches_the_texts_adapter_too(rows: dict[str, dict[str, Any]]) -> None:
    """The host runs it once, before the steps, where nothing live acts: what it has of a LoRA is merged, as by the host's own loader."""
    for case in ("live LoRA", "live LoRA on the text's adapter alone"):
        assert rows[case]["difference"] < TOLERANCE
        assert rows[case]["effect"] > 0.01
        assert rows[case]["without"] > 0.01, "the layers beside it do all that is looked at"
        assert rows[f"after {case}"]["same"]
    assert "which the host runs once for a prompt, before the steps" in rows["scheduled"]["said"]


def test_the_residual_stream_keeps_its_type(rows: dict[str, dict[str, Any]]) -> None:
    """Anima computes in bfloat16 beside a residual stream in float32."""
    assert rows["half"]["dtype"] == "torch.float32"
    assert rows["half"]["effect"] > 1e-2


def test_hosts_without_anima_say_so() -> None:
    """0.3.64 has no such model, so nobody can load one there."""
    old = [host for host in find_hosts() if host.version == "0.3.64"]
    if not old:
        pytest.skip("no ComfyUI 0.3.64 at $COMFYUI_PATH or ~/comfy")
    assert run(old[0]) == [{"absent": "this ComfyUI has no Anima"}]
