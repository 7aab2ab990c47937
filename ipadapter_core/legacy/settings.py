"""What the settings of ComfyUI_IPAdapter_plus' nodes mean here: a schedule, and which image acts where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from ..attention.presets import SiteRule, parse_layers
from ..attention.schedule import Scaling, WeightSchedule
from ..errors import InvalidInputError, quoted

WEIGHT_TYPES = (
    "linear", "ease in", "ease out", "ease in-out", "reverse in-out", "weak input", "weak output", "weak middle",
    "strong middle", "style transfer", "composition", "strong style transfer", "style and composition",
    "style transfer precise", "composition precise",
)  # fmt: skip
COMBINE_METHODS = ("concat", "add", "subtract", "average", "norm average")

FORMER_OPTIONS: dict[str, dict[str, str]] = {
    "weight_type": {
        "style transfer (SDXL)": "style transfer",  # 2024-03-27 to 2024-04-09
        "composition (SDXL)": "composition",
        "style transfer (SDXL only)": "style transfer",  # of the simple node
        "style transfer and composition": "style and composition",  # 2024-06-22
    },
    # 2023-09-27 to 2023-10-12, when torch resized
    "interpolation": {
        "lanczos": "LANCZOS", "bicubic": "BICUBIC", "bilinear": "BILINEAR", "area": "BOX", "nearest": "NEAREST",
        "nearest-exact": "NEAREST",
    },
    "timing": {"reverse_in_out": "ease_out"},  # 2024-04-12 to 2024-04-27, the same curve
}  # fmt: skip
"""By input, options that the old pack no longer lists, and what they are called today. Saved graphs still have them."""


def todays_option(name: str, value: Any) -> Any:
    """The value of an input under today's name; other values as they are."""
    return FORMER_OPTIONS.get(name, {}).get(value, value) if isinstance(value, str) else value


SIMPLE_WEIGHT_TYPES = {
    "standard": "linear",
    "prompt is more important": "ease out",
    "style transfer": "style transfer",
}
FIRST_WEIGHT_TYPES: dict[str, Scaling] = {
    "original": "V only",
    "linear": "K+V",
    "channel penalty": "K+mean(V) w/ C penalty",
}
"""Weight types of before 2024-03-23 were ways of scaling."""


def first_feature_weight(weight: float) -> float:
    """What the encoder of before 2024-03-23 multiplied an image's features by: the square of its weight."""
    return weight * (0.1 + (weight - 0.1))


@dataclass(frozen=True, slots=True)
class LegacySettings:
    """The settings of an apply node, under its own names.

    ``weight`` may be one number per frame; they are used one by one where ``unfold_batch`` gives every latent its own
    reference, and only the first otherwise. ``style_boost`` and ``composition_boost`` choose the precise presets.
    """

    weight: float | Sequence[float] = 1.0
    weight_type: str = "linear"
    combine_embeds: str = "concat"
    start_at: float = 0.0
    end_at: float = 1.0
    embeds_scaling: Scaling = "V only"
    unfold_batch: bool = False
    weight_composition: float = 1.0
    style_boost: float | None = None
    composition_boost: float | None = None
    layer_weights: str = ""

    def schedule(self) -> WeightSchedule:
        """The same as a schedule."""
        weights = _numbers(self.weight)
        preset = todays_option("weight_type", self.weight_type)
        boost: float | None = None
        if self.style_boost is not None:
            preset, boost = "style transfer precise", self.style_boost
        elif self.composition_boost is not None:
            preset, boost = "composition precise", self.composition_boost
        layers = parse_layers(self.layer_weights)
        if layers and preset not in ("style transfer precise", "composition precise"):
            preset = "linear"
        return WeightSchedule(
            strength=float(weights[0]) if weights else 0.0,
            preset=preset,
            start_percent=self.start_at,
            end_percent=self.end_at,
            scaling=self.embeds_scaling,
            composition_strength=self.weight_composition,
            boost=boost,
            layers=layers,
            latent_strengths=weights if self.unfold_batch and len(weights) > 1 else (),
        )

    def schedules_of_two(self) -> tuple[WeightSchedule, WeightSchedule]:
        """Schedules of a style and of a composition image. Each acts at the sites at which the other does not."""
        whole = self.schedule()
        return (
            replace(whole, site_factors=(SiteRule("composition", 0.0),)),
            replace(whole, site_factors=(SiteRule("all", 0.0), SiteRule("composition", 1.0))),
        )


def _numbers(weight: Any) -> tuple[float, ...]:
    """One weight or a list of them, as linked nodes of other packs give them."""
    try:
        return tuple(float(w) for w in (weight if _is_several(weight) else (weight,)))
    except (TypeError, ValueError, OverflowError):
        raise InvalidInputError(f"weight is {quoted(weight)}; a number or a list of numbers was expected") from None


def _is_several(weight: object) -> TypeGuard[Iterable[Any]]:
    return isinstance(weight, Iterable) and not isinstance(weight, str)
