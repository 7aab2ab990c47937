"""The selector language and the block vectors, on the layers of SD1.5, SDXL and Flux."""

from __future__ import annotations

import pytest

from ipadapter_core.errors import InvalidInputError
from ipadapter_core.lora.block_vectors import LAYOUTS, PRESETS, block_vector, parse_where
from ipadapter_core.lora.selector import Rule, Selector, parse_selector
from ipadapter_core.lora.targets import Target, targets_of
from tiny_models import SD15, SDXL, tiny_unet


@pytest.fixture(scope="module")
def sd15() -> list[Target]:
    return list(targets_of(tiny_unet(SD15)).targets.values())


def paths(text: str, targets: list[Target]) -> set[str]:
    return {t.path for t in parse_selector(f"all: 0, {text}: 1").chosen(targets)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("in4 attn2 k", {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"}),
        ("in1 attn1 q", {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"}),
        ("mid attn2 out", {"mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"}),
        ("out11 ff", {"up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj", "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2"}),
        ("sampler in3", {"down_blocks.0.downsamplers.0.conv"}),
        ("out2 sampler", {"up_blocks.0.upsamplers.0.conv"}),
        ("re:^conv_(in|out)$", {"conv_in", "conv_out"}),
        ("mid2 resnet conv", {"mid_block.resnets.1.conv1", "mid_block.resnets.1.conv2"}),
        ("in8 proj", {"down_blocks.2.attentions.1.proj_in", "down_blocks.2.attentions.1.proj_out"}),
    ],
)  # fmt: skip
def test_words_name_layers(text: str, expected: set[str], sd15: list[Target]) -> None:
    assert paths(text, sd15) == expected


def test_ranges_stars_and_types_count_right(sd15: list[Target]) -> None:
    assert len(paths("attn2 k", sd15)) == 16
    assert paths("out3-5 attn2 k", sd15) == {
        f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn2.to_k" for i in range(3)
    }
    assert len(paths("in* attn2 k", sd15)) == 6
    assert len(paths("out* attn2 k", sd15)) == 9
    assert len(paths("out", sd15)) == 32, "the word alone is the attentions' output projection"
    assert paths("te", sd15) == set()
    assert paths("all", sd15) == {t.path for t in sd15}


def test_later_entries_win_and_the_rest_is_1(sd15: list[Target]) -> None:
    selector = parse_selector("attn2: 0.5, attn2 k: -1\n# a comment\nin4 = 2")
    factors = dict(zip((t.path for t in sd15), selector.factors(sd15), strict=True))
    stem = "down_blocks.{}.attentions.0.transformer_blocks.0.attn2.to_{}"
    assert factors[stem.format(0, "q")] == 0.5
    assert factors[stem.format(0, "k")] == -1
    assert factors[stem.format(1, "k")] == 2
    assert factors["conv_in"] == 1
    assert parse_selector("").factors(sd15) == [1.0] * len(sd15)


def test_the_table_says_what_was_resolved(sd15: list[Target]) -> None:
    table = parse_selector("all: 0, in4 attn2: 0.5").table(sd15)
    assert "in4        0.5 × 4, 0 × " in table
    assert table.splitlines()[1].startswith("  base")
    assert parse_selector("in99: 1, double3: 1, attn2: 1").unmatched(sd15) == ["in99", "double3"]


@pytest.mark.parametrize("text", ["", " , ", "# nothing"])
def test_nothing_is_no_rule(text: str) -> None:
    assert parse_selector(text) == Selector()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inn4: 1", "unknown word 'inn4'"),
        (": 1", "cannot read ': 1'"),
        ("re:[: 1", "not a regular expression"),
        ("attn2 upside: 1", "unknown word 'upside'"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_selector(text)


def test_factors_must_be_finite() -> None:
    with pytest.raises(InvalidInputError, match="not a finite number"):
        Selector((Rule("all", float("nan")),))


# --- block vectors ---------------------------------------------------------------------------------------------------


def test_lengths_are_those_people_share() -> None:
    assert {name: len(blocks) for name, blocks in LAYOUTS.items()} == {
        "SD1.5 17": 17, "SD1.5 26": 26, "SD1.5 27": 27, "SDXL 12": 12, "SDXL 20": 20, "SDXL 21": 21, "Flux 20": 20, "Flux 58": 58,
    }  # fmt: skip


# Inspire's lbw-preset.txt, read 2026-11
GOLDEN = {
    "SD-INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "SD-IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "SD-INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "SD-MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "SD-OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "SD-OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "SD-OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "SD-ALL0.5": ",".join(["0.5"] * 17),
    "SD-LyC-MIDALL": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0",
    "SDXL-MIDALL": "1,0,0,0,0,1,0,0,0,0,0,0",
    "SDXL-OUTALL": "1,0,0,0,0,0,1,1,1,1,1,1",
    "SDXL-LyC-INALL": "1,1,1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0",
    "FLUX-DBL-FRONT": "1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "FLUX-DBL-TAIL": "0,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1,1,0,0",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_presets_are_the_shared_numbers(name: str) -> None:
    assert PRESETS[name][1] == tuple(float(n) for n in GOLDEN[name].split(","))


def test_every_preset_resolves(sd15: list[Target]) -> None:
    for name in PRESETS:
        block_vector(name).factors(sd15)


def test_vectors_go_by_name_not_by_position(sd15: list[Target]) -> None:
    """A LoRA that has only output blocks gets the output entries: nothing shifts."""
    values = [0.1 * i for i in range(17)]
    selector = block_vector(",".join(map(str, values)))
    by_block = dict(zip((t.block for t in sd15), selector.factors(sd15), strict=True))
    assert by_block["base"] == 0
    assert by_block["in8"] == pytest.approx(0.6)
    assert by_block["mid1"] == pytest.approx(0.7)
    assert by_block["out3"] == pytest.approx(0.8)
    assert by_block["out0"] == 0, "a 17 vector says nothing of blocks without attention"
    only = [t for t in sd15 if t.block == "out11"]
    assert selector.factors(only) == [pytest.approx(1.6)] * len(only)


def test_middle_blocks_apart_in_27_and_21() -> None:
    targets = list(targets_of(tiny_unet(SDXL)).targets.values())
    selector = block_vector("0,0,0,0,0,0,0,0,0,1,2,3,0,0,0,0,0,0,0,0,0")
    by_block = dict(zip((t.block for t in targets), selector.factors(targets), strict=True))
    assert [by_block[f"mid{i}"] for i in range(3)] == [1, 2, 3]


def test_length_20_needs_the_model() -> None:
    with pytest.raises(InvalidInputError, match="ambiguous: say which of SDXL 20, Flux 20"):
        block_vector(",".join(["1"] * 20))
    assert any(r.where == "double18" for r in block_vector(",".join(["1"] * 20), base_model="Flux").rules)
    with pytest.raises(InvalidInputError, match="of no known kind"):
        block_vector("1,2,3")
    with pytest.raises(InvalidInputError, match="has 17 entries, the vector has 3"):
        block_vector("1,2,3", "SD1.5 17")
    with pytest.raises(InvalidInputError, match="neither numbers with commas nor a block preset"):
        block_vector("SD-EVERYTHING")


def test_one_text_field_takes_both() -> None:
    assert parse_where("SD-OUTALL") == block_vector("SD-OUTALL")
    assert parse_where("1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1") == block_vector("SD-OUTALL")
    assert parse_where("attn2: 0.5, in4") == parse_selector("attn2: 0.5, in4")
    assert parse_where("") == Selector()
