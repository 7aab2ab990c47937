"""What sliders show of a selector: a factor for each block of a file."""

from __future__ import annotations

import pytest

from host.tiny_lora_files import lora_tensors
from ipadapter_core import InvalidInputError
from ipadapter_core.files.state_dict import TensorFile
from ipadapter_core.lora import parse_lora, parse_where
from ipadapter_core.lora.blocks import block_shares, parse_presets, presets_for
from ipadapter_core.lora.inspection import target_of


@pytest.fixture(scope="module")
def weights():
    return parse_lora(TensorFile(lora_tensors("sd15_small")))


def test_every_layer_is_in_one_block_and_without_a_selector_at_one(weights) -> None:
    shares = block_shares(weights, parse_where(""))
    assert sum(share.layers for share in shares) == len(weights.modules)
    assert {(share.low, share.high) for share in shares} == {(1.0, 1.0)}
    names = [share.block for share in shares]
    assert names == sorted(
        names, key=lambda name: (("in", "mid", "out").index(name.rstrip("0123456789")), int(name.strip("inmdout")))
    )
    assert {target_of(module, weights.base_model).block for module in weights.modules} == set(names)


def test_blocks_show_what_a_selector_gives_them(weights) -> None:
    shares = {s.block: (s.low, s.high) for s in block_shares(weights, parse_where("in2: 0.5, out*: 0, in1 attn2: 2"))}
    assert shares["in2"] == (0.5, 0.5)
    assert shares["in1"] == (1.0, 2.0)
    assert shares["out1"] == (0.0, 0.0)
    assert shares["mid1"] == (1.0, 1.0)


def test_presets_are_those_of_the_base_model() -> None:
    assert "SD-OUTALL" in presets_for("SD1.5")
    assert presets_for("SD2.1") == presets_for("SD1.5")
    assert all(name.startswith("SDXL-") for name in presets_for("SDXL"))
    assert all(name.startswith("FLUX-") for name in presets_for("Flux"))
    assert presets_for("unknown") == ()
    for base in ("SD1.5", "SDXL", "Flux"):
        for name in presets_for(base):
            assert parse_where(name, base).rules


def test_a_users_presets_are_read_a_line_each() -> None:
    text = "# mine\nFACE:1,0,0,1 # eyes\n\n  soft : all: 0.5, in4: 1\nFACE:1,1"
    assert parse_presets(text) == {"FACE": "1,1", "soft": "all: 0.5, in4: 1"}


@pytest.mark.parametrize("text", ["no colon", ": 1", "name:", "a: 1\n" + "b: 1\n\nc"])
def test_a_line_that_is_no_preset_is_named(text: str) -> None:
    with pytest.raises(InvalidInputError, match=f"line {len(text.splitlines())} "):
        parse_presets(text)


def test_too_many_presets_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="501"):
        parse_presets("\n".join(f"p{i}: 1" for i in range(501)))
