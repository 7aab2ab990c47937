"""The selector language and the block vectors, on the layers of SD1.5, SDXL and Flux."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ipadapter_core.errors import InvalidInputError
from ipadapter_core.lora.block_vectors import LAYOUTS, PRESETS, SHARED, block_vector, parse_where
from ipadapter_core.lora.globs import Glob, globs_of
from ipadapter_core.lora.selector import TYPES, Rule, Selector, parse_selector
from ipadapter_core.lora.targets import Target, targets_of
from tiny_families import FAMILIES
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
        ("[c]onv_in", {"conv_in"}),
        ("in8 *proj_*", {"down_blocks.2.attentions.1.proj_in", "down_blocks.2.attentions.1.proj_out"}),
        ("mid_block.resnets.?.conv1", {"mid_block.resnets.0.conv1", "mid_block.resnets.1.conv1"}),
        ("up_blocks.[!0-2].*.2.*.attn2.to_k", {"up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k"}),
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
    assert paths("all", sd15) == paths("unet", sd15) == paths("denoiser", sd15) == {t.path for t in sd15}


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
        (r"re:(\w+\.?)+!: 1", r"takes no other; write .*\*\.attn2\.to_k"),
        ("re:(a+)+$", "not a regular expression that is a glob"),
        ("in4 0.5", "'0.5' stands alone"),
        ("in4: half", "the factor of 'in4' in the selector is 'half'"),
        ("in4: 1e400", "no finite number"),
        ("in4: nan", "no finite number"),
        ("in4: 1_0", "no finite number"),
        ("in4: ٣", "no finite number"),
        (f"in4: {'1' * 5000}", "no finite number"),
        (f"in{'1' * 5000}: 1", "unknown word"),
        ("in٣: 1", "unknown word"),
        ("all, " * 600, "600 entries; at most 500"),
        (",".join(f"*{i}" for i in range(40)), "more than 32 globs"),
        (f"{' ' * 20_000}x", "20,001 characters; at most 10,000"),
        ("attn2 upside: 1", "unknown word 'upside'"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_selector(text)


@pytest.mark.parametrize(
    "text", ["all：0，in4：０.5", "all: 0; in4 = .5", "\ufeffall:\u00a00、in4: 0.5", "all: 0\r\nin4: 0.5"]
)
def test_separators_of_other_keyboards(text: str) -> None:
    assert parse_selector(text) == parse_selector("all: 0, in4: 0.5")


@given(st.text("ab-[]!*?^c", max_size=8), st.text("abc-]![^", max_size=7))
@example("*a*b*", "aab")
def test_globs_match_as_fnmatch(pattern: str, name: str) -> None:
    """But for ranges from high to low, where fnmatch can take what is left for a negation."""
    assume(
        not any(
            low > high for low, hyphen, high in zip(pattern, pattern[1:], pattern[2:], strict=False) if hyphen == "-"
        )
    )
    assert Glob.parse(pattern).matches(name) == fnmatchcase(name, pattern)


PIECES = [
    *"ab._1^$|()[]*?+\\", ".*", ".+", r"\.", "(a|b)", "(?:ab|)", "[ab]", "[^a]", "[a-b]", r"\d", "{2}", ".*?", r"\w", "(^a)", "(a|(b))"
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.text("ab._1-$(|", max_size=6))
@example(r"a\$", "a$")
@example("a|b$", "ab")
@settings(max_examples=300)
def test_old_expressions_mean_what_they_meant_or_nothing(expression: str, name: str) -> None:
    globs = globs_of(expression)
    if globs is not None:
        assert any(glob.matches(name) for glob in globs) == (re.search(expression, name) is not None)


@pytest.mark.parametrize(
    ("expression", "globs"),
    [
        ("proj_in$", ["*proj_in"]),
        ("attn2", ["*attn2*"]),
        ("^down_blocks.*to_q$", ["down_blocks*to_q"]),
        (r"up_blocks\.[0-2]\..+(to_q|to_k)$", ["*up_blocks.[0-2].?*to_q", "*up_blocks.[0-2].?*to_k"]),
        ("", ["**"]),
        ("a{10000000000000000000}", None),
        ("(" * 5000, None),
        ("(a|b)" * 5, None),
    ],
)
def test_old_expressions_as_globs(expression: str, globs: list[str] | None) -> None:
    found = globs_of(expression)
    assert (None if found is None else [glob.text for glob in found]) == globs


def test_no_pattern_backtracks() -> None:
    """Every character of the name is looked at once, whatever the pattern is: counted, not timed."""
    looked: list[str] = []

    class Counted(str):
        def __iter__(self) -> Iterator[str]:
            for c in str(self):
                looked.append(c)
                yield c

    name = Counted("a" * 60)
    assert not Glob.parse("*a" * 25 + "*[!a]*").matches(name)
    assert len(looked) == 60


def test_every_word_is_asked_once_per_layer(sd15: list[Target], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setitem(TYPES, "attn2", lambda t: bool(asked.append(t.path)))
    selector = parse_selector("attn2 q, attn2 k, attn2 attn2 attn2: 0," * 100)
    selector.factors(sd15)
    assert len(asked) == len(sd15)


def test_factors_must_be_finite() -> None:
    with pytest.raises(InvalidInputError, match="not a finite number"):
        Selector((Rule("all", float("nan")),))


# --- block vectors ---------------------------------------------------------------------------------------------------


def test_lengths_are_those_people_share() -> None:
    assert {name: len(LAYOUTS[name]) for name in SHARED} == {
        "SD1.5 17": 17, "SD1.5 26": 26, "SD1.5 27": 27, "SDXL 12": 12, "SDXL 20": 20, "SDXL 21": 21, "Flux 20": 20, "Flux 58": 58,
    }  # fmt: skip


def test_other_transformers_have_base_and_their_blocks_in_order() -> None:
    """Where no vectors are shared; the blocks that make up the published model, refiners and the like following BASE."""
    own = {name: len(blocks) for name, blocks in LAYOUTS.items() if name not in SHARED}
    assert own == {
        "Chroma 20": 20, "Chroma 58": 58, "SD3 25": 25, "SD3 39": 39, "Anima 29": 29, "Flux.2 26": 26, "Flux.2 33": 33, "Flux.2 57": 57,
        "Qwen-Image 61": 61, "Z-Image 31": 31, "Wan 31": 31, "Wan 41": 41, "HunyuanVideo 61": 61, "HunyuanVideo 55": 55,
        "Lumina 2 27": 27, "Krea 2 29": 29, "AuraFlow 37": 37, "PixArt 29": 29, "LTX-Video 29": 29, "LTX-Video 49": 49,
        "HiDream 49": 49,
    }  # fmt: skip
    selector = parse_where(",".join(str(n / 100) for n in range(31)), "Z-Image")
    family = FAMILIES["Z-Image"]
    targets = list(targets_of(family.original()).targets.values())
    factors = {t.block: factor for t, factor in zip(targets, selector.factors(targets), strict=True)}
    assert factors == {"base": 0, "layers0": 0.01, "layers1": 0.02, "noise_refiner0": 0, "context_refiner0": 0}
    assert parse_where(",".join(["1"] * 41)).rules[-1].where == "block39", "one family alone has as many"
    with pytest.raises(InvalidInputError, match=r"31 numbers is ambiguous: say which of Z-Image 31, Wan 31"):
        parse_where(",".join(["1"] * 31))
    with pytest.raises(
        InvalidInputError, match=r"30 numbers is of no known kind: vectors of Wan have 31 or 41; name blocks"
    ):
        parse_where(",".join(["1"] * 30), "Wan")
    for base, last in (("Flux or Chroma", "double18"), ("Chroma", "double18"), ("SDXL", "out8")):
        assert parse_where(",".join(["1"] * 20), base).rules[-1].where == last
    for base, last in (("Flux.2", "single19"), (None, "out11"), ("unknown", "out11"), ("SD1.5", "out11")):
        assert parse_where(",".join(["1"] * 26), base).rules[-1].where == last


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


OUTALL = "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1"


@pytest.mark.parametrize(
    "text",
    [
        OUTALL,
        OUTALL + ",",
        OUTALL + " , \n",
        OUTALL.replace(",", "，"),
        OUTALL.replace(",", ";"),
        OUTALL.replace(",", "、"),
        OUTALL.replace(",", " , "),
        OUTALL.replace(",", " "),
        OUTALL.replace(",", "\n"),
        OUTALL.replace("0,1,", "0,\n1,", 1),
        OUTALL.replace("0,1,", "0\n1,", 1).replace("\n", "\r\n"),
        OUTALL.replace("1", "１"),
        OUTALL.replace("1", "1.0"),
        OUTALL.replace("0,1", "0,1 1 1"),  # one number for each layer of a block, all the same
        f"[{OUTALL}]",
        f'"{OUTALL}"',
        f"MY-FACE:{OUTALL}",
        f"SD-OUTALL:{OUTALL},",
        f"My own face = {OUTALL}",
        f"# lbw\nFACE:{OUTALL} # good\n",
        f"lbw={OUTALL}",
        "lbw=OUTALL",
        "SD-OUTALL",
        " sd-outall ",
        "OUTALL",
        "outall",
        "SD_OUTALL",
        "Sd OutAll",
        "SD-OUTALL # a preset",
    ],
)
def test_vectors_as_people_paste_them(text: str) -> None:
    assert parse_where(text) == block_vector("SD-OUTALL")
    assert block_vector(text) == block_vector("SD-OUTALL")


def test_a_preset_without_its_first_part_is_the_models() -> None:
    assert parse_where("outall", "SDXL") == block_vector("SDXL-OUTALL")
    assert parse_where("lyc_all", "SDXL") == block_vector("SDXL-LyC-ALL")
    assert parse_where("dbl-mid", "Flux") == block_vector("FLUX-DBL-MID")
    assert parse_where("midd0.2", "SD1.5") == block_vector("SD-MIDD0.2")
    assert parse_where("ALL") == parse_selector("ALL"), "a word of the selector stays one"
    assert block_vector("ALL") == block_vector("SD-ALL")


@pytest.mark.parametrize("entries", [18, 55])
def test_inspires_short_vectors_for_flux_go_on_with_their_last_number(entries: int) -> None:
    values = [i / 100 for i in range(entries)]
    whole = values + values[-1:] * (58 - entries)
    assert parse_where("FLUX:" + ",".join(map(str, values))) == block_vector(",".join(map(str, whole)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1," * 16 + ",1", "17 numbers and an empty one; vectors have 12, 17, 20, 21, 26, 27 or 58"),
        ("1,,1,,1", "3 numbers and 2 empty ones"),
        ("1,0,1,", "of 3 numbers is of no known kind: vectors have 12,"),
        ("1", "of 1 number is of no known kind"),
        ("1 1 1", "of 3 numbers"),
        (OUTALL.replace("0", "A", 1), "entry 2 of the block vector is 'A': A and B are the widgets"),
        (OUTALL.replace("0", "b", 1), "a and b half of them"),
        (OUTALL.replace("0", "R", 1), "R and U are random numbers"),
        (OUTALL.replace("0", "u", 1), "R and U are random numbers"),
        (OUTALL.replace("0", "X+0.1", 1), "X is a number beside the vector"),
        (",".join("ABBBBBBBBBBBAAAAA"), "A and B are the widgets"),
        ("SD-AB", "'SD-AB' holds A and B for numbers"),
        ("rout", "'rout' holds R for numbers"),
        (OUTALL.replace("0", "1 0 0.5", 1), "entry 2 of the block vector, '1 0 0.5', gives the layers of a block one number each"),
        (OUTALL.replace("0", "x 1 1 1", 1), "X is a number"),
        (OUTALL.replace("0", "zero", 1), "entry 2 of the block vector, 'zero', is no finite number"),
        (OUTALL.replace("0", "1e400", 1), "entry 2 of the block vector, '1e400', is no finite number"),
        (OUTALL.replace("0", "nan", 1), "is no finite number"),
        (OUTALL.replace("0", "1" * 100_000, 1), "characters; at most 10,000"),
        (f"SD-ALL:{OUTALL}\nSD-INS:{OUTALL}", "a second vector begins there"),
        (f"<lora:face:1:lbw={OUTALL}>", "is a prompt of the web UI"),
        ("@SD-FULL-TEST:17", "XY plot"),
        ("SD-EVERYTHING", "neither numbers with commas nor a block preset"),
        ("%default=0.5,in4=1", "counts the blocks that the file has"),
        ("%in1-3=1", "counts the blocks that the file has"),
        ("%default=x", "cannot read 'default=x' in a block vector by groups"),
        ("%left=1", "cannot read 'left=1'"),
    ],
)  # fmt: skip
def test_vectors_that_cannot_be_read_say_why(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        parse_where(text)


@pytest.mark.parametrize(
    "text", ["all: 0\nout3: 1", "all: 0\n\nin4 = .5 # why\r\nout3: 1\n", "all: 0\nout3: 1, mid: 2", "in4: 1\nin5: 1"]
)
def test_lines_without_commas_are_a_selector_where_each_names_its_place(text: str) -> None:
    assert parse_where(text) == parse_selector(text)


def test_vectors_by_groups(sd15: list[Target]) -> None:
    """Inspire's %: base follows the default unless it is given, groups come over both."""
    assert parse_where("%default=0.5, in=0,\nout=2") == parse_selector("all: 0.5, base: 0.5, unet in*: 0, unet out*: 2")
    assert parse_where("%BASE=0,mid=0.3").factors(sd15) == parse_selector("base: 0, mid: 0.3").factors(sd15)


ALPHABET = st.text(
    st.sampled_from("0123456789+-.eE,;:=#*?[]()|^$\\ \t\n\r\0abABRUXx%@<_\ud800\uffff，：１²٣\u2028\U0001f600")
    | st.characters(),
    max_size=60,
)
WORDS = st.lists(
    st.sampled_from(["all", "in4", "out*", "re:", "re:a|b", "*q", "1", "0.5", ":", "=", ",", "\n", "#", "A", "1e999", "SD-ALL", "%default", " "]),
    max_size=30,
).map("".join)  # fmt: skip


@given(st.one_of(ALPHABET, WORDS), st.sampled_from([1, 1, 1, 300]))
@settings(max_examples=300)
@example("re:", 1)
@example("%", 1)
@example("lbw=", 1)
@example("=", 1)
@example("1:" * 20, 1)
@example("re:" + "(" * 5000, 1)
@example("[]", 1)
def test_any_text_is_read_or_refused(text: str, times: int) -> None:
    for read in (parse_selector, parse_where, block_vector):
        refusal = ""
        try:
            assert len(read(text * times).rules) <= 500
        except InvalidInputError as error:
            refusal = str(error)
        assert len(refusal) < 800
        assert refusal.isprintable()
