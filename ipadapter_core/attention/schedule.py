"""How strongly an image prompt acts, where in the model and when; the steering that users set, as one value."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Literal, get_args

from ..entries import LONGEST_LIST, MOST_NUMBERS, entries, halves, number, some
from ..errors import InvalidInputError, quoted
from ..models.sites import ModelLayout
from ..narrowing import is_row
from .presets import SiteRule, SiteWeight, SiteWeights, check_count, check_finite

Scaling = Literal["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
"""What a strength may multiply: values, keys and values, with a penalty for narrow layers, keys and the mean of values."""

MOST_POINTS = 10_000
"""Points of a curve; samplers take at most some hundred steps."""


@dataclass(frozen=True, slots=True)
class Window:
    """When something acts: its factor over the sampling progress, 0 at pure noise and 1 at the end.

    Outside ``start_percent..end_percent`` the factor is 0. ``curve`` holds rising (percent, factor) points, linear in
    between, at most 10,000; none is 1 everywhere.
    """

    start_percent: float = 0.0
    end_percent: float = 1.0
    curve: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        check_finite("start_percent", self.start_percent)
        check_finite("end_percent", self.end_percent)
        check_count("curve", self.curve, MOST_POINTS)
        percents = [percent for percent, _ in self.curve]
        if percents != sorted(percents) or any(not 0 <= p <= 1 for p in percents):
            raise InvalidInputError(
                f"curve points need percents that rise within 0..1, got {some([f'{p:g}' for p in percents])}"
            )
        if any(not math.isfinite(factor) for _, factor in self.curve):
            raise InvalidInputError("curve factors must be finite numbers")

    @property
    def constant(self) -> bool:
        """True if the factor is 1 at every step, so that nobody need know the step."""
        return not self.curve and self.start_percent <= 0 and self.end_percent >= 1

    @property
    def never(self) -> bool:
        """True for a window without any step: one that ends at 0, as everywhere in ComfyUI, or before it starts."""
        return self.end_percent <= 0 or self.end_percent < self.start_percent

    def at(self, percent: float) -> float:
        """Factor at a sampling progress of 0 (pure noise) .. 1 (done)."""
        # The host's own windows are inclusive at both ends; the slack absorbs float32 sigmas.
        if self.never or not self.start_percent - 1e-6 <= percent <= self.end_percent + 1e-6:
            return 0.0
        return _interpolate(self.curve, percent) if self.curve else 1.0


def _interpolate(points: Sequence[tuple[float, float]], percent: float) -> float:
    if percent <= points[0][0]:
        return points[0][1]
    after = bisect_left(points, percent, 1, key=lambda point: point[0])
    if after == len(points):
        return points[-1][1]
    (p0, f0), (p1, f1) = points[after - 1 : after + 1]
    return f1 if p1 == p0 else f0 + (f1 - f0) * (percent - p0) / (p1 - p0)


@dataclass(frozen=True, slots=True)
class WeightSchedule:
    """Strength per site and step: ``place`` and ``window``, with all their settings side by side.

    ``strength`` is what the user sets (any sign, 1 is the trained strength). ``site_factors`` are rules such as
    ``("output", 0.5)``, ``("input 4", 0)``, ``("style", 1.2)``, ``("t3", 0)``, ``("all", 0.1)``. ``scaling`` is the rule by
    which a weight acts. ``latent_strengths`` are strengths per latent of the batch and replace ``strength``; the last one
    repeats. For the others see ``SiteWeights`` and ``Window``.
    """

    strength: float = 1.0
    preset: str = "linear"
    start_percent: float = 0.0
    end_percent: float = 1.0
    scaling: Scaling = "V only"
    composition_strength: float | None = None
    boost: float | None = None
    site_factors: tuple[SiteRule, ...] = ()
    curve: tuple[tuple[float, float], ...] = ()
    layers: tuple[tuple[int, float], ...] = ()
    latent_strengths: tuple[float, ...] = ()
    place: SiteWeights = field(init=False, repr=False, compare=False)
    window: Window = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        place = SiteWeights(
            self.strength, self.preset, self.composition_strength, self.boost, self.site_factors, self.layers
        )
        object.__setattr__(self, "place", place)
        object.__setattr__(self, "window", Window(self.start_percent, self.end_percent, self.curve))
        if self.scaling not in SCALINGS:
            raise InvalidInputError(f"unknown scaling {quoted(self.scaling)}; choose one of: {', '.join(SCALINGS)}")
        if not all(map(math.isfinite, self.latent_strengths)):
            raise InvalidInputError("strengths per latent must be finite numbers")

    def steering(self, strength: float, preset: str, scaling: Scaling, start: float, end: float) -> WeightSchedule:
        """The same curve and sites with the settings that an apply node has itself."""
        return replace(self, strength=strength, preset=preset, scaling=scaling, start_percent=start, end_percent=end)

    def site_weights(self, layout: ModelLayout) -> tuple[SiteWeight, ...]:
        """Absolute weight of every site of ``layout`` in its order, before the step's factor."""
        return self.place.of(layout)


def parse_curve(text: str) -> tuple[tuple[float, float], ...]:
    """Read a curve such as ``0: 1, 0.5: 0.4, 1: 0`` (percent: factor); an empty text is no curve.

    Raises InvalidInputError for a text of another form and for more than 10,000 points.
    """
    points: list[tuple[float, float]] = []
    for entry in entries(text, "the curve", LONGEST_LIST, MOST_POINTS):
        percent, factor = map(number, halves(entry) or ("", ""))
        if percent is None or factor is None:
            raise InvalidInputError(
                f"cannot read {quoted(entry)} in the curve; write points such as '0: 1, 0.5: 0.4, 1: 0' (percent: factor)"
            )
        points.append((percent, factor))
    return Window(curve=tuple(points)).curve  # the same checks as everywhere


SAMPLES = 101
"""Points of a drawn curve that need not be linear between its own."""


def drawn_curve(drawn: object, top: float = 1.0) -> tuple[tuple[float, float], ...]:
    """The points of a curve that another program draws: one with ``interp`` of 0..1, or numbers spread evenly from start to end.

    ``top`` is the factor that 1 stands for. Numbers may be a list, a tensor, a series, or one number. Raises InvalidInputError for
    anything else.
    """
    interp: Callable[[float], float] | None = getattr(drawn, "interp", None)
    values = _numbers(drawn) if interp is None else [float(interp(i / (SAMPLES - 1))) for i in range(SAMPLES)]
    steps = (i / max(len(values) - 1, 1) for i in range(len(values)))
    return Window(curve=tuple((step, top * value) for step, value in zip(steps, values, strict=True))).curve


def _numbers(drawn: object) -> list[float]:
    inner = drawn[0] if is_row(drawn) and len(drawn) == 1 else drawn  # a series may come in a tuple of its own
    as_list: Callable[[], object] | None = getattr(inner, "tolist", None)
    listed = inner if as_list is None else as_list()
    values: Sequence[object] = listed if is_row(listed) else (listed,)
    if not 0 < len(values) <= MOST_POINTS:
        raise InvalidInputError(f"the drawn curve has {len(values):,} numbers; 1 to {MOST_POINTS:,} can be used")
    numbers = [float(value) for value in values if isinstance(value, Real) and value is not True and value is not False]
    if len(numbers) < len(values):
        raise InvalidInputError("the drawn curve holds what is no number; a curve or a list of numbers was expected")
    return numbers


def parse_numbers(text: str, what: str = "the list of numbers") -> list[float]:
    """Read numbers separated by commas or lines, such as ``1, 0.5``; an empty text is an empty list.

    ``what`` is the text's name for messages. Raises InvalidInputError for anything else, and for more than 100,000 numbers.
    """
    values: list[float] = []
    for entry in entries(text, what, LONGEST_LIST, MOST_NUMBERS):
        value = number(entry)
        if value is None:
            raise InvalidInputError(
                f"cannot read {quoted(entry)} in {what} as a number; write numbers with commas between them: '1, 0.5'"
            )
        values.append(value)
    return values
