"""Where in a model an image prompt acts: the named presets and a table per site, resolved to a weight for every site.

A preset is a function of a site and its layout; a base model says itself which of its blocks carry style and composition.
The first fifteen names and their numbers are those users know from ComfyUI_IPAdapter_plus.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from ..entries import MOST, entries, halves, number, some
from ..errors import InvalidInputError, quoted
from ..models import BASE_MODELS
from ..models.sites import BaseModel, ModelLayout, Roles, Site


@dataclass(frozen=True, slots=True)
class SiteWeight:
    """Weight of one site; ``flipped`` moves the image from the positive to the negative prompt there."""

    weight: float
    flipped: bool = False


OFF = SiteWeight(0.0)


class _Lacking(Exception):
    """What a preset needs and a layout does not have."""


@dataclass(frozen=True, slots=True)
class PresetContext:
    """What a preset may look at: the site, its layout, the strength and the two secondary strengths.

    Asking for what the layout does not have refuses the preset on it.
    """

    site: Site
    layout: ModelLayout
    strength: float
    composition_strength: float
    boost: float

    @property
    def progress(self) -> float:
        """Position in execution order, 0 at the first block."""
        return self.site.order / self.layout.orders

    @property
    def middle_distance(self) -> float:
        """0 in the middle of the model, 1 at its first block."""
        return abs(self.progress - 0.5) * 2

    def inside(self, group: str) -> bool:
        """Whether the site is in this group of blocks."""
        if group not in self.layout.groups:
            raise _Lacking(f"{group} blocks")
        return self.site.group == group

    @property
    def in_style(self) -> bool:
        return self.site.order in self._roles.style

    @property
    def composition(self) -> float | None:
        """Composition factor of this site, None where it carries none."""
        return self._roles.composition.get(self.site.order)

    @property
    def _roles(self) -> Roles:
        if self.layout.model.roles is None:
            raise _Lacking("to know which blocks carry style and composition")
        return self.layout.model.roles


def _scaled(factor: Callable[[PresetContext], float]) -> Callable[[PresetContext], SiteWeight]:
    return lambda c: SiteWeight(c.strength * factor(c))


def _by_group(group: str, inside: float, outside: float) -> Callable[[PresetContext], SiteWeight]:
    return _scaled(lambda c: inside if c.inside(group) else outside)


def _style_and_composition(c: PresetContext) -> SiteWeight:
    if c.composition is not None:
        return SiteWeight(c.composition * c.composition_strength)
    return SiteWeight(c.strength) if c.in_style else OFF


def _strong_style_and_composition(c: PresetContext) -> SiteWeight:
    return SiteWeight(c.composition_strength if c.composition is not None else c.strength)


def _precise_style(c: PresetContext) -> SiteWeight:
    if c.composition is not None:
        return SiteWeight(c.composition * c.boost, flipped=True)
    return SiteWeight(c.strength) if c.in_style else OFF


def _precise_composition(c: PresetContext) -> SiteWeight:
    if c.composition is not None:
        return SiteWeight(c.composition * c.strength)
    return SiteWeight(c.boost if c.in_style else 0.1 * c.boost, flipped=True)


PRESETS: dict[str, Callable[[PresetContext], SiteWeight]] = {
    "linear": _scaled(lambda c: 1.0),
    "ease in": _scaled(lambda c: 0.05 + 0.95 * (1 - c.progress)),
    "ease out": _scaled(lambda c: 0.05 + 0.95 * c.progress),
    "ease in-out": _scaled(lambda c: 0.05 + 0.95 * (1 - c.middle_distance)),
    "reverse in-out": _scaled(lambda c: 0.05 + 0.95 * c.middle_distance),
    "weak input": _by_group("input", 0.2, 1.0),
    "weak output": _by_group("output", 0.2, 1.0),
    "weak middle": _by_group("middle", 0.2, 1.0),
    "strong middle": _by_group("middle", 1.0, 0.2),
    "style transfer": _scaled(lambda c: float(c.in_style)),
    "composition": _scaled(lambda c: c.composition or 0.0),
    "strong style transfer": _scaled(lambda c: float(c.composition is None)),
    "style and composition": _style_and_composition,
    "style transfer precise": _precise_style,
    "composition precise": _precise_composition,
    "strong style and composition": _strong_style_and_composition,
}
"""Weight of a site by preset name; the first fifteen are the public names."""

MEANINGS: dict[str, str] = {
    "linear": "everywhere, as trained",
    "ease in": "strong in the first layers, weak in the last",
    "ease out": "weak in the first layers, strong in the last",
    "ease in-out": "strong in the middle of the model, weak at both ends",
    "reverse in-out": "weak in the middle of the model, strong at both ends",
    "weak input": "a fifth of the strength in the input blocks",
    "weak output": "a fifth of the strength in the output blocks",
    "weak middle": "a fifth of the strength in the middle block",
    "strong middle": "a fifth of the strength everywhere but in the middle block",
    "style transfer": "only in the layers that carry colours, strokes and mood",
    "composition": "only in the layers that carry the arrangement",
    "strong style transfer": "everywhere but in the layers that carry the arrangement",
    "style and composition": "in the layers of both, each with a strength of its own",
    "style transfer precise": "style, and the reference's arrangement is pushed away",
    "composition precise": "arrangement, and the reference's style is pushed away",
    "strong style and composition": "everywhere, arrangement with a strength of its own",
}
"""What a preset does, in a few words."""


def preset_facts() -> list[dict[str, object]]:
    """Every preset as plain values for JSON: ``name``, ``meaning``, and what it ``needs`` of a model, nothing for most."""
    return [{"name": name, "meaning": MEANINGS[name], "needs": _needs(name)} for name in PRESETS]


def _needs(preset: str) -> str:
    """What a model must have for a preset: one with no blocks of a known kind lacks it."""
    bare = ModelLayout(BaseModel(name="none"), 0, (site := Site("", "", 0, 0, 0, 0, 0),))
    try:
        PRESETS[preset](PresetContext(site, bare, 1.0, 1.0, 1.0))
    except _Lacking as needed:
        return str(needed)
    return ""


@dataclass(frozen=True, slots=True)
class SiteRule:
    """One entry of a per-site table: where (block, number or role) and which factor."""

    where: str
    factor: float


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """A strength for every site of a model, before anything that depends on the step.

    ``site_factors`` multiply the preset per site, later ones win. ``layers`` are (``order``, factor) pairs that replace the
    preset's factors: layers not listed are off, and of the preset only remains which sites it flips.
    ``composition_strength`` and ``boost`` are the secondary strengths of the presets that use them; None follows
    ``strength``.
    """

    strength: float = 1.0
    preset: str = "linear"
    composition_strength: float | None = None
    boost: float | None = None
    site_factors: tuple[SiteRule, ...] = ()
    layers: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise InvalidInputError(f"unknown preset {quoted(self.preset)}; choose one of: {', '.join(PRESETS)}")
        for name in ("strength", "composition_strength", "boost"):
            check_finite(name, getattr(self, name))
        for name in ("site_factors", "layers"):
            check_count(name, getattr(self, name), MOST)
        for rule in self.site_factors:
            check_finite(f"the factor of {quoted(rule.where)}", rule.factor)
        if not all(math.isfinite(factor) for _, factor in self.layers):
            raise InvalidInputError("layer weights must be finite numbers")

    def of(self, layout: ModelLayout) -> tuple[SiteWeight, ...]:
        """Weight of every site of ``layout`` in its order.

        Raises InvalidInputError for a rule that matches no site and a preset that the model cannot have.
        """
        unknown = [
            rule.where for rule in self.site_factors if not any(_matches(rule.where, s, layout) for s in layout.sites)
        ]
        if unknown:
            roles = () if layout.model.roles is None else ("style", "composition")
            raise InvalidInputError(
                f"{some([quoted(where) for where in unknown])} matches no site of {layout.name}; "
                f"use {', '.join(('all', *layout.groups, *roles))}, t0..t{layout.orders - 1}, "
                f"a site such as {layout.label(layout.sites[0])!r}, or some such as '{layout.groups[0]} 0-9'"
            )
        try:
            return tuple(self._at(site, layout) for site in layout.sites)
        except _Lacking as needed:
            possible = [preset for preset in PRESETS if _possible(preset, layout)]
            raise InvalidInputError(
                f"the preset {self.preset!r} needs {needed}, and {layout.name} has no such thing; "
                f"use one of: {', '.join(possible)}"
            ) from None

    def _at(self, site: Site, layout: ModelLayout) -> SiteWeight:
        composition = self.strength if self.composition_strength is None else self.composition_strength
        boost = self.strength if self.boost is None else self.boost
        preset = PRESETS[self.preset](PresetContext(site, layout, self.strength, composition, boost))
        if self.layers:
            preset = SiteWeight(dict(self.layers).get(site.order, 0.0) * self.strength, preset.flipped)
        factors = [rule.factor for rule in self.site_factors if _matches(rule.where, site, layout)]
        return SiteWeight(preset.weight * factors[-1], preset.flipped) if factors else preset


def _possible(preset: str, layout: ModelLayout) -> bool:
    try:
        PRESETS[preset](PresetContext(layout.sites[0], layout, 1.0, 1.0, 1.0))
    except _Lacking:
        return False
    return True


def _matches(where: str, site: Site, layout: ModelLayout) -> bool:
    if where in ("style", "composition"):
        roles = layout.model.roles
        return roles is not None and site.order in (roles.style if where == "style" else roles.composition)
    span = _RANGE.fullmatch(where)
    if span is not None:
        number = site.order if span[1] == "t" else site.number if span[1] == f"{site.group} " else -1
        return int(span[2]) <= number <= int(span[3])
    numbered = f"{site.group} {site.number}"
    return where in ("all", site.group, f"t{site.order}", numbered, f"{numbered}.{site.depth}")


_PLACE = re.compile(r"([a-z]{1,40})(?: ?([0-9]{1,4}(?:\.[0-9]{1,4}| ?- ?[0-9]{1,4})?))?")
_RANGE = re.compile(r"(t|[a-z]{1,40} )([0-9]{1,4})-([0-9]{1,4})")
"""A place as rules name it: ``double 0-9``, ``t0-18``; both ends are in it."""


def parse_site_factors(text: str) -> tuple[SiteRule, ...]:
    """Read a per-site table such as ``all: 0.2, output: 1, input 4: 0, double 0-9: 0.5, t3: 1.5`` (commas or lines, ``#`` comments).

    Raises InvalidInputError for a text of another form, of more than 10,000 characters or 500 entries.
    """
    rules: list[SiteRule] = []
    for entry in entries(text, "the site table"):
        where, written = halves(entry) or (entry, "")
        place, factor = _PLACE.fullmatch(" ".join(where.lower().split())), number(written)
        if place is None or factor is None:
            raise InvalidInputError(
                f"cannot read {quoted(entry)} in the site table; write entries such as 'all: 0.2', 'output: 1', "
                "'input 4: 0', 'double 0-9: 0.5', 'style: 1.2' or 't3: 0', separated by commas or lines"
            )
        name, at = place[1], place[2] and place[2].replace(" ", "")
        first, _, last = (at or "").partition("-")
        if last and int(first) > int(last):
            raise InvalidInputError(
                f"{quoted(entry)} in the site table names no site, as its numbers fall; write '{name} {last}-{first}'"
            )
        rules.append(SiteRule(name if at is None else f"t{at}" if name == "t" else f"{name} {at}", factor))
    return tuple(rules)


_WITHOUT_NUMBER = ("all", "style", "composition")


def check_site_factors(text: str) -> None:
    """Raise InvalidInputError for a table that ``SiteWeights`` takes for no known base model: before a model tells which it is."""
    groups = tuple(dict.fromkeys(group for base in BASE_MODELS for group in base.groups))
    for rule in parse_site_factors(text):
        word = rule.where.split()[0].rstrip("-0123456789")
        numbered = rule.where != word
        if word in groups or word in (("t",) if numbered else _WITHOUT_NUMBER):
            continue
        close = get_close_matches(word, (*groups, *_WITHOUT_NUMBER), 1)
        meant = f" (did you mean {close[0]}?)" if close and close[0] != word else ""
        raise InvalidInputError(
            f"{quoted(rule.where)} in the site table is a place of no model{meant}: write "
            f"{', '.join(_WITHOUT_NUMBER)}, t0, t1 and so on, or blocks as their models name them, with or without a number: "
            f"{', '.join(groups)}"
        )


def parse_layers(text: str) -> tuple[tuple[int, float], ...]:
    """Read layer weights such as ``3: 0.5, 6: 1`` (index of the weight presets: factor), separated by commas or lines.

    Raises InvalidInputError for a text of another form, of more than 10,000 characters or 500 entries.
    """
    layers: list[tuple[int, float]] = []
    for entry in entries(text, "the layer weights"):
        written, factor = halves(entry) or ("", "")
        index, weight = _index(written), number(factor)
        if index is None or weight is None:
            raise InvalidInputError(
                f"cannot read {quoted(entry)} in the layer weights; write entries such as '3: 0.5, 6: 1' "
                "(index of the layer: weight)"
            )
        layers.append((index, weight))
    return tuple(layers)


def _index(text: str) -> int | None:
    digits = text[1:] if text[:1] in ("+", "-") else text
    return int(text) if digits.isascii() and digits.isdecimal() and len(digits) <= 9 else None


def check_finite(name: str, value: float | None) -> None:
    """Raise InvalidInputError for NaN and infinity."""
    if value is not None and not math.isfinite(value):
        raise InvalidInputError(f"{name} is {value}, which is not a finite number")


def check_count(name: str, entries: Sequence[object], most: int) -> None:
    """Raise InvalidInputError for more entries than can be used."""
    if len(entries) > most:
        raise InvalidInputError(f"{name} has {len(entries):,} entries; at most {most:,} can be used")
