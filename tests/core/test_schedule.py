"""Weights per spatial transformer of every preset, and what a schedule refuses.

The golden weights are written out from the published semantics (B.2 of the reference: t = transformer index, L = 16 on
SD1.5 and 11 on SDXL), not from the code: explicit numbers for each transformer.
"""

# pyright: basic, reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipadapter_core.attention.presets import (
    MEANINGS,
    PRESETS,
    SiteRule,
    SiteWeights,
    check_site_factors,
    parse_layers,
    parse_site_factors,
    preset_facts,
)
from ipadapter_core.attention.schedule import WeightSchedule, Window, drawn_curve, parse_curve, parse_numbers
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.legacy.frame_weights import WeightsStrategy
from ipadapter_core.legacy.settings import LegacySettings
from ipadapter_core.models import layout_of
from ipadapter_core.models.sites import BaseModel, ModelLayout, Site
from ipadapter_core.models.unet import SD15 as SD15_MODEL
from ipadapter_core.models.unet import SDXL as SDXL_MODEL
from ipadapter_core.models.unet import spatial_transformers
from tiny_models import tiny_unet

Golden = dict[int, tuple[float, bool]]


def layout(model: BaseModel, input_: int, middle: int, output: int) -> ModelLayout:
    """A layout by its spatial transformers, one site each: presets look at nothing else."""
    groups = ["input"] * input_ + ["middle"] * middle + ["output"] * output
    sites = tuple(Site(f"{t}", group, t, 0, t, 320, 8) for t, group in enumerate(groups))
    return ModelLayout(model, 768, sites)


SD15 = layout(SD15_MODEL, 6, 1, 9)
SDXL = layout(SDXL_MODEL, 4, 1, 6)
LENGTH = {"SD1.5": 16, "SDXL": 11}
INPUT = {"SD1.5": range(6), "SDXL": range(4)}
MIDDLE = {"SD1.5": 6, "SDXL": 4}


def everywhere(name: str, weight: Callable[[int], float]) -> Golden:
    return {t: (weight(t), False) for t in range(LENGTH[name])}


def golden(preset: str, name: str, w: float, wc: float, b: float) -> Golden:
    """B.2, line by line; a transformer that is missing gets nothing."""
    L, middle = LENGTH[name], MIDDLE[name]
    xl = name == "SDXL"
    sd15_style = (0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15)
    match preset:
        case "linear":
            return everywhere(name, lambda t: w)
        case "ease in":
            return everywhere(name, lambda t: w * (0.05 + 0.95 * (1 - t / L)))
        case "ease out":
            return everywhere(name, lambda t: w * (0.05 + 0.95 * t / L))
        case "ease in-out":
            return everywhere(name, lambda t: w * (0.05 + 0.95 * (1 - abs(t - L / 2) / (L / 2))))
        case "reverse in-out":
            return everywhere(name, lambda t: w * (0.05 + 0.95 * (abs(t - L / 2) / (L / 2))))
        case "weak input":
            return everywhere(name, lambda t: 0.2 * w if t in INPUT[name] else w)
        case "weak middle":
            return everywhere(name, lambda t: 0.2 * w if t == middle else w)
        case "weak output":
            return everywhere(name, lambda t: 0.2 * w if t > middle else w)
        case "strong middle":
            return everywhere(name, lambda t: w if t == middle else 0.2 * w)
        case "style transfer":
            return {6: (w, False)} if xl else dict.fromkeys(sd15_style, (w, False))
        case "composition":
            return {3: (w, False)} if xl else {4: (0.25 * w, False), 5: (w, False)}
        case "strong style transfer":
            return everywhere(name, lambda t: 0.0 if t in ((3,) if xl else (4, 5)) else w)
        case "style and composition":
            if xl:
                return {3: (wc, False), 6: (w, False)}
            return dict.fromkeys(sd15_style, (w, False)) | {4: (0.25 * wc, False), 5: (wc, False)}
        case "strong style and composition":
            return everywhere(name, lambda t: wc if t in ((3,) if xl else (4, 5)) else w)
        case "style transfer precise":
            if xl:
                return {3: (b, True), 6: (w, False)}
            return dict.fromkeys(sd15_style, (w, False)) | {4: (0.25 * b, True), 5: (b, True)}
        case "composition precise":
            if xl:
                return dict.fromkeys((0, 1, 2, 4, 5, 7, 8, 9, 10), (0.1 * b, True)) | {3: (w, False), 6: (b, True)}
            flipped = dict.fromkeys(sd15_style, (b, True)) | dict.fromkeys((6, 7, 8), (0.1 * b, True))
            return flipped | {4: (0.25 * w, False), 5: (w, False)}
        case _:
            raise AssertionError(preset)


PUBLIC = (
    "linear", "ease in", "ease out", "ease in-out", "reverse in-out", "weak input", "weak output", "weak middle",
    "strong middle", "style transfer", "composition", "strong style transfer", "style and composition",
    "style transfer precise", "composition precise",
)  # fmt: skip


def test_the_fifteen_public_names_in_their_order() -> None:
    assert tuple(PRESETS)[:15] == PUBLIC
    assert tuple(PRESETS)[15:] == ("strong style and composition",)


def weights(schedule: WeightSchedule, model: ModelLayout) -> Golden:
    return {s.order: (w.weight, w.flipped) for s, w in zip(model.sites, schedule.site_weights(model), strict=True)}


def check(got: Golden, expected: Golden) -> None:
    for t, (weight, flipped) in got.items():
        target, target_flipped = expected.get(t, (0.0, False))
        assert weight == pytest.approx(target, abs=1e-12), f"block {t}"
        if target != 0:
            assert flipped is target_flipped, f"block {t}"


@pytest.mark.parametrize("model", [SD15, SDXL], ids=lambda m: m.name)
@pytest.mark.parametrize("preset", PRESETS)
def test_golden_weights(preset: str, model: ModelLayout) -> None:
    check(weights(WeightSchedule(0.8, preset), model), golden(preset, model.name, 0.8, 0.8, 0.8))
    check(weights(WeightSchedule(-1.5, preset), model), golden(preset, model.name, -1.5, -1.5, -1.5))
    secondary = WeightSchedule(0.8, preset, composition_strength=0.3, boost=-0.6)
    check(weights(secondary, model), golden(preset, model.name, 0.8, 0.3, -0.6))
    none = WeightSchedule(0.8, preset, composition_strength=0.0, boost=0.0)
    check(weights(none, model), golden(preset, model.name, 0.8, 0.0, 0.0))


def test_explicit_numbers() -> None:
    """A few weights by hand, so that no formula above can be wrong on both sides."""
    assert weights(WeightSchedule(1.0, "ease in"), SDXL)[10][0] == pytest.approx(0.05 + 0.95 / 11)
    assert weights(WeightSchedule(1.0, "ease in"), SD15)[0][0] == pytest.approx(1.0)
    assert weights(WeightSchedule(1.0, "ease out"), SD15)[8][0] == pytest.approx(0.525)
    assert weights(WeightSchedule(1.0, "ease in-out"), SD15)[8][0] == pytest.approx(1.0)
    assert weights(WeightSchedule(1.0, "reverse in-out"), SD15)[8][0] == pytest.approx(0.05)
    assert weights(WeightSchedule(1.0, "composition precise"), SDXL)[6] == (1.0, True)
    assert weights(WeightSchedule(2.0, "style transfer precise"), SDXL)[3] == (2.0, True)


def test_all_blocks_of_a_transformer_share_its_weight() -> None:
    model = layout_of(tiny_unet("sdxl"))
    got = WeightSchedule(preset="ease out").site_weights(model)
    pairs = zip(model.sites, got, strict=True)
    assert all(len({w for _, w in group}) == 1 for _, group in groupby(pairs, key=lambda pair: pair[0].order))


def test_an_unknown_unet_composes_where_it_is_coarsest() -> None:
    unet = tiny_unet("sd15")  # SD1.5's topology under another text width
    model, levels = layout_of(unet), [at.level for at in spatial_transformers(unet) or ()]
    acting = {
        levels[s.order]
        for s, w in zip(model.sites, WeightSchedule(preset="composition").site_weights(model), strict=True)
        if w.weight
    }
    assert acting == {max(levels)}
    styled = {
        levels[s.order]
        for s, w in zip(model.sites, WeightSchedule(preset="style transfer").site_weights(model), strict=True)
        if w.weight
    }
    assert styled == set(levels) - acting


FLAT = layout(replace(SD15_MODEL, name="Flat", roles=None), 19, 0, 0)
"""One group, and nobody knows what its blocks carry."""


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_model_does_not_have_is_refused(preset: str) -> None:
    """A weight of zero everywhere would look like an image prompt that does nothing."""
    schedule, works = WeightSchedule(1.0, preset), ("linear", "ease in", "ease out", "ease in-out", "reverse in-out")
    if preset in (*works, "weak input"):
        assert any(weight.weight for weight in schedule.site_weights(FLAT))
        return
    lacking = (
        preset.split()[-1] + " blocks" if preset.startswith(("weak", "strong middle")) else "style and composition"
    )
    message = (
        rf"'{preset}' needs .*{lacking}, and Flat has no such thing; use one of: {', '.join((*works, 'weak input'))}$"
    )
    with pytest.raises(InvalidInputError, match=message):
        schedule.site_weights(FLAT)


def test_an_unknown_unet_with_one_resolution_has_no_roles() -> None:
    model = layout_of(tiny_unet("one site"))
    with pytest.raises(
        InvalidInputError, match=r"'style transfer' needs .* and UNet with 1 sites, width 32 has no such thing"
    ):
        WeightSchedule(preset="style transfer").site_weights(model)
    with pytest.raises(InvalidInputError, match=r"'style' matches no site of .*; use all, input, t0\.\.t0"):
        WeightSchedule(site_factors=(SiteRule("style", 1.0),)).site_weights(model)


# --- when --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end", "percent", "factor"), [
    (0.0, 1.0, 0.0, 1.0), (0.0, 1.0, 1.0, 1.0), (0.2, 0.6, 0.2, 1.0), (0.2, 0.6, 0.6, 1.0), (0.2, 0.6, 0.199, 0.0),
    (0.2, 0.6, 0.601, 0.0), (0.6, 0.2, 0.4, 0.0), (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.001, 0.0), (0.0, 0.001, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0),
])  # fmt: skip
def test_window(start: float, end: float, percent: float, factor: float) -> None:
    assert Window(start, end).at(percent) == factor


@pytest.mark.parametrize(("percent", "factor"), [
    (0.0, 2.0), (0.1, 2.0), (0.2, 2.0), (0.3, 1.5), (0.4, 1.0), (0.5, -0.5), (0.6, -0.5), (0.9, -0.5),
])  # fmt: skip
def test_curve(percent: float, factor: float) -> None:
    """Constant before the first and after the last point, linear between, a jump where two points share a percent."""
    window = Window(curve=((0.2, 2.0), (0.4, 1.0), (0.4, -0.5), (0.8, -0.5)))
    assert window.at(percent) == pytest.approx(factor)


def test_a_curve_acts_within_the_window_only() -> None:
    window = Window(start_percent=0.5, curve=((0.0, 1.0), (1.0, 0.0)))
    assert window.at(0.4) == 0.0
    assert window.at(0.75) == pytest.approx(0.25)


def test_constant_schedules_need_no_progress() -> None:
    assert WeightSchedule(0.3, "ease in").window.constant
    assert not Window(end_percent=0.99).constant
    assert not Window(start_percent=0.01).constant
    assert not Window(curve=((0.0, 1.0),)).constant


def test_a_schedule_is_a_place_and_a_window_side_by_side() -> None:
    schedule = WeightSchedule(0.5, "ease in", 0.1, 0.9, boost=2.0, curve=((0.5, 1.0),), layers=((3, 1.0),))
    assert schedule.place == SiteWeights(0.5, "ease in", boost=2.0, layers=((3, 1.0),))
    assert schedule.window == Window(0.1, 0.9, ((0.5, 1.0),))
    assert replace(schedule, end_percent=0.2).window.end_percent == 0.2
    assert replace(schedule, end_percent=0.2).place == schedule.place


# --- per-site tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "rules"), [
    ("", ()),
    ("all: 0.2, output: 1", (SiteRule("all", 0.2), SiteRule("output", 1.0))),
    ("Input 4: 0\nstyle = -1.2e0 # why\n\n# nothing\n t3 : .5", (SiteRule("input 4", 0.0), SiteRule("style", -1.2), SiteRule("t3", 0.5))),
    ("input4.1: +2, t 5: 3.", (SiteRule("input 4.1", 2.0), SiteRule("t5", 3.0))),
    ("double 0-9: 0.5\nSingle 10 - 37: 0, t0-18: 2", (SiteRule("double 0-9", 0.5), SiteRule("single 10-37", 0.0), SiteRule("t0-18", 2.0))),
])  # fmt: skip
def test_site_tables_are_read(text: str, rules: tuple[SiteRule, ...]) -> None:
    assert parse_site_factors(text) == rules


@pytest.mark.parametrize(
    "text",
    [
        "input",
        "input: x",
        "4: 1",
        "input 4 1",
        "all: 1: 2",
        "all: 1e",
        "all: nan",
        "a-b: 1",
        "double 0-: 1",
        "double 0.1-2: 1",
        "double 9-3: 1",
    ],
)
def test_unreadable_site_tables_are_quoted(text: str) -> None:
    with pytest.raises(InvalidInputError, match="site table"):
        parse_site_factors(text)


@pytest.mark.parametrize(
    "text",
    ["", "all: 1, style: 2, composition: 0, t3: 1, t0-9: 1", "input 4.1: 1, double 0-9: 0, joint: 1, block 3: 1"],
)
def test_places_of_any_model_are_known_before_there_is_one(text: str) -> None:
    check_site_factors(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("all: 1, ouput: 1", "'ouput' in the site table is a place of no model (did you mean output?)"),
        ("midle 0: 1", "'midle 0' in the site table is a place of no model (did you mean middle?)"),
        ("t: 1", "'t' in the site table"),
        ("style 3: 1", "'style 3' in the site table is a place of no model: write all, style, composition, t0"),
        ("somewhere: 1", "input, middle, output, double, single, joint, block"),
        ("input: x", "cannot read 'input: x'"),
    ],
)
def test_a_place_of_no_model_is_told_with_those_there_are(text: str, told: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        check_site_factors(text)
    assert told in str(caught.value)


def factors(rules: str, model: ModelLayout, preset: str = "linear") -> dict[str, float]:
    schedule = WeightSchedule(2.0, preset, site_factors=parse_site_factors(rules))
    return {model.label(s): w.weight for s, w in zip(model.sites, schedule.site_weights(model), strict=True)}


def test_site_rules_match_blocks_numbers_roles_and_indices() -> None:
    model = layout_of(tiny_unet("sdxl"))
    got = factors("all: 0, middle: 0.5, output 1: 1, input 4.1: 3, t0: 4, input 4.0: 1", model)
    assert got["middle 0.9"] == 1.0
    assert got["output 1.4"] == 2.0
    assert (got["input 4.0"], got["input 4.1"]) == (2.0, 8.0)  # later rules win: t0 over input 4.1
    assert got["output 0.0"] == got["output 2.3"] == got["input 5.0"] == 0.0
    assert {label for label, weight in factors("all: 0, style: 1", SDXL).items() if weight} == {"output 6"}
    assert {label for label, weight in factors("all: 0, composition: 1", SDXL).items() if weight} == {"input 3"}


def transformer() -> ModelLayout:
    """The sites of FLUX.1: nobody knows which carry style or composition."""
    groups = [("double", number) for number in range(19)] + [("single", number) for number in range(38)]
    sites = (Site("", group, number, 0, order, 8, 2) for order, (group, number) in enumerate(groups))
    return ModelLayout(BaseModel(name="FLUX.1"), 16, tuple(sites))


def test_site_rules_name_runs_of_blocks() -> None:
    got = factors("double 0-9: 0.5, single: 0, single 30-37: 1.5, single 31: 3, t18-19: 2", transformer())
    assert [got[f"double {i}"] for i in (0, 9, 10, 17, 18)] == [1.0, 1.0, 2.0, 2.0, 4.0]
    assert [got[f"single {i}"] for i in (0, 1, 29, 30, 31, 32, 37)] == [4.0, 0.0, 0.0, 3.0, 6.0, 3.0, 3.0]
    for rules in ("double 19-30: 1", "input 0-3: 1", "t57-60: 1", "style: 1"):
        with pytest.raises(InvalidInputError, match=r"matches no site of FLUX\.1; use all, double, single, t0\.\.t56"):
            factors(rules, transformer())


BY_POSITION = ("linear", "ease in", "ease out", "ease in-out", "reverse in-out")


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset not in BY_POSITION])
def test_presets_that_mean_nothing_for_a_transformer_are_refused_by_a_sentence(preset: str) -> None:
    """Nobody knows which of its blocks carry style, and it has no input, middle or output."""
    usable = "needs .*, and FLUX\\.1 has no such thing; use one of: " + ", ".join(BY_POSITION) + "$"
    with pytest.raises(InvalidInputError, match=usable):
        WeightSchedule(1.0, preset).site_weights(transformer())


def test_presets_by_position_work_for_a_transformer() -> None:
    easing = [weight.weight for weight in WeightSchedule(1.0, "ease in").site_weights(transformer())]
    assert easing == pytest.approx([0.05 + 0.95 * (1 - order / 57) for order in range(57)])
    for preset in BY_POSITION:
        weights = {weight.weight for weight in WeightSchedule(1.0, preset).site_weights(transformer())}
        assert (len(weights) > 20) == (preset != "linear")


def test_site_rules_multiply_the_preset_and_keep_its_flip() -> None:
    schedule = WeightSchedule(1.0, "composition precise", site_factors=parse_site_factors("output: 0.5"))
    assert weights(schedule, SDXL)[6] == (0.5, True)
    assert weights(schedule, SDXL)[3] == (1.0, False)


def test_a_rule_that_matches_nothing_is_refused() -> None:
    for rules in ("input 99: 1", "t16: 1", "outputs: 1", "input 0.5: 1"):
        with pytest.raises(InvalidInputError, match=r"matches no site of SD1\.5.*t15"):
            factors(rules, SD15)


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "word"), [
    ({"preset": "strong"}, "ease in-out"),
    ({"scaling": "Q"}, "V only"),
    ({"strength": math.nan}, "strength"),
    ({"start_percent": math.inf}, "start_percent"),
    ({"curve": ((0.5, 1.0), (0.2, 1.0))}, "rise"),
    ({"curve": ((-0.1, 1.0),)}, "rise"),
    ({"curve": ((0.1, math.nan),)}, "finite"),
])  # fmt: skip
def test_bad_values_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(InvalidInputError, match=word):
        WeightSchedule(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["composition_strength", "boost"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_secondary_strengths_must_be_finite(name: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=name):
        WeightSchedule(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_site_factors_must_be_finite(factor: float) -> None:
    with pytest.raises(InvalidInputError, match="finite"):
        WeightSchedule(site_factors=(SiteRule("all", factor),))


def test_curves_and_numbers_are_read() -> None:
    assert parse_curve("0: 1, 0.5: 0.4 # half\n1: 0") == ((0.0, 1.0), (0.5, 0.4), (1.0, 0.0))
    assert parse_curve(" ") == ()
    assert parse_numbers("1, 0.5\n-2") == [1.0, 0.5, -2.0]
    for text in ("0.5", "0: 1: 2", "x: 1", "2: 1", "0: nan"):
        with pytest.raises(InvalidInputError):
            parse_curve(text)
    with pytest.raises(InvalidInputError):
        parse_numbers("1; 2")


# --- texts of strangers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"all: {'1' * 9_000}x", "cannot read 'all: 1111"),
        (f"all: {'1' * 9_000}", "cannot read 'all: 1111"),
        (f"all: {'1' * 100_000}x", "100,006 characters; at most 10,000"),
        ("all: 1, " * 501, "501 entries; at most 500"),
        ("all: 1e400", "site table"),
        ("all: ٣", "site table"),
        (f"t{'1' * 5_000}: 1", "site table"),
        (f"{'in ' * 3_000}: 1", "site table"),
    ],
)
def test_site_tables_have_limits(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        parse_site_factors(text)
    assert len(str(caught.value)) < 400


def test_site_rules_without_a_site_are_quoted_short() -> None:
    with pytest.raises(InvalidInputError, match="'zz' and 485 more matches no site") as caught:
        factors("a: 1, b: 1, c: 1, d: 1, zz: 1, " + "zz: 1, " * 485, SD15)
    assert len(str(caught.value)) < 400


def test_curves_have_limits_and_are_looked_up_not_walked() -> None:
    for points, message in ((10_001, "10,001 entries; at most 10,000"), (200_000, "characters; at most 1,000,000")):
        with pytest.raises(InvalidInputError, match=message):
            parse_curve(", ".join("0.5: 1" for _ in range(points)))
    with pytest.raises(InvalidInputError, match="curve has 10,001 entries"):
        WeightSchedule(curve=((0.0, 1.0),) * 10_001)
    with pytest.raises(InvalidInputError, match="and 9,995 more"):
        WeightSchedule(curve=tuple((1 - i / 10_000, 1.0) for i in range(10_000)))
    looked: list[int] = []

    class Points(tuple[tuple[float, float], ...]):
        def __getitem__(self, at: Any) -> Any:
            looked.append(1)
            return super().__getitem__(at)

    schedule = WeightSchedule(curve=Points((i / 10_000, float(i)) for i in range(10_000)))
    assert schedule.window.at(0.70005) == pytest.approx(7000.5)
    assert len(looked) < 20


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(-3, 3)), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_a_curve_is_the_same_as_walked(points: list[tuple[float, float]], percent: float) -> None:
    points.sort(key=lambda point: point[0])
    walked = points[0][1] if percent <= points[0][0] else points[-1][1]
    for (p0, f0), (p1, f1) in pairwise(points):
        if points[0][0] < percent <= p1:
            walked = f1 if p1 == p0 else f0 + (f1 - f0) * (percent - p0) / (p1 - p0)
            break
    assert Window(curve=tuple(points)).at(percent) == walked


def test_lists_of_the_old_pack_are_read() -> None:
    """As many frames as its widgets allow, with the digits that scripts print."""
    frames = [i / 9_999 for i in range(9_999)]
    assert parse_numbers(",\n".join(map(repr, frames)) + ",") == frames
    assert parse_layers("0:1.0, 3 : -0.5,\n 11:+.5,") == ((0, 1.0), (3, -0.5), (11, 0.5))
    assert parse_layers("-1: 1")[0] == (-1, 1.0)


TEXTS = st.one_of(
    st.text(st.sampled_from("0123456789+-.eE,:=# \t\n\0aint\ud800，１²٣\u2028") | st.characters(), max_size=60),
    st.lists(
        st.sampled_from(["all", "t3", "input 4", ":", "=", ",", "\n", "#", "0.5", "1", "1e999", "nan", "inf", "1" * 5000, " "]),
        max_size=20,
    ).map("".join),
)  # fmt: skip


@given(TEXTS, st.sampled_from([1, 1, 1, 1000]))
@settings(max_examples=300)
def test_any_text_is_read_or_refused(text: str, times: int) -> None:
    def legacy(text: str) -> object:
        return LegacySettings(layer_weights=text).schedule()

    def frames(text: str) -> object:
        return WeightsStrategy(text, "custom").curve()

    for read in (parse_site_factors, parse_layers, parse_curve, parse_numbers, legacy, frames):
        refusal = ""
        try:
            read(text * times)
        except InvalidInputError as error:
            refusal = str(error)
        assert len(refusal) < 600
        assert refusal.isprintable()


def test_every_preset_says_what_it_does_and_needs() -> None:
    facts = {str(fact["name"]): fact for fact in preset_facts()}
    assert list(facts) == list(PRESETS) == list(MEANINGS)
    assert len({fact["meaning"] for fact in facts.values()}) == len(PRESETS)
    assert {name for name, fact in facts.items() if not fact["needs"]} == {
        "linear", "ease in", "ease out", "ease in-out", "reverse in-out"
    }  # fmt: skip


class Square:
    """A curve as a host's editor gives it."""

    def interp(self, x: float) -> float:
        return x**2


def test_drawn_curves_become_points() -> None:
    assert drawn_curve([0.0, 1, 0.5], top=2.0) == ((0.0, 0.0), (0.5, 2.0), (1.0, 1.0))
    assert drawn_curve(0.5) == ((0.0, 0.5),)
    assert drawn_curve((torch.tensor([1.0, 0.0]),)) == drawn_curve(torch.tensor([1.0, 0.0])) == ((0.0, 1.0), (1.0, 0.0))
    points = drawn_curve(Square(), top=4.0)
    assert (points[0], points[50], points[-1]) == ((0.0, 0.0), (0.5, 1.0), (1.0, 4.0))
    schedule = Window(curve=points)
    assert all(abs(schedule.at(x) - 4 * x**2) < 1e-3 for x in (0.123, 0.5, 0.987))


@pytest.mark.parametrize(
    "drawn", [[], "text", ["a"], [True], {"x": 1}, [math.nan], [math.inf], [[1.0], [2.0]], [0.0] * 10_001]
)
def test_what_is_no_curve_is_refused(drawn: object) -> None:
    with pytest.raises(InvalidInputError):
        drawn_curve(drawn)
