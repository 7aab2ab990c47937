"""What is applied: a placed LoRA with how much, where, when and in which part of the picture. Frozen; changing it copies it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..attention.masks import RegionMask
from ..attention.schedule import Window
from ..errors import InvalidInputError
from ..images.pictures import Picture
from .by_rows import at_rows, within
from .matching import MatchedLoRA, TargetMatch
from .selector import Selector
from .weights import Component, LeftOut

NEEDS_MERGED = "changes that only the merged mode can do, at one strength for all steps and the whole picture"

Mode = Literal["auto", "merged", "live"]
MODES: tuple[Mode, ...] = ("auto", "merged", "live")


@dataclass(frozen=True, slots=True, eq=False)
class LoRAPatch:
    """A LoRA on one model. ``strength`` is for the UNet or transformer, ``text_strength`` for the text encoders (None: the same).

    ``uncond_strength`` is the strength on the negative prompt's part of the batch (None: the same), ``window`` says
    when it acts, ``mask`` in which region.
    """

    matched: MatchedLoRA
    strength: float = 1.0
    text_strength: float | None = None
    uncond_strength: float | None = None
    selector: Selector = field(default_factory=Selector)
    window: Window = field(default_factory=Window)
    mask: RegionMask | None = None

    def __post_init__(self) -> None:
        for name in ("strength", "text_strength", "uncond_strength"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise InvalidInputError(f"{name} is {value}, which is not a finite number")

    def __deepcopy__(self, memo: dict[int, object]) -> LoRAPatch:
        return self  # frozen: a copied model shares the file's tensors

    @property
    def placed(self) -> MatchedLoRA:
        """Older name of ``matched``."""
        return self.matched

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.matched.weights.name

    @property
    def needs_unfused(self) -> str | None:
        """Why it cannot be merged, or None if it can."""
        if not self.window.constant:
            return "its strength changes over the steps"
        if self.mask is not None:
            return "it acts in a region"
        if self.uncond_strength is not None and self.uncond_strength != self.strength:
            return "the negative prompt has a strength of its own"
        return None

    @property
    def needs_merged(self) -> str | None:
        """Why it cannot run beside the layers, or None if it can."""
        acting = [match for match, _ in self.acting("denoiser") if self.needs_unfused or not match.target.ahead]
        found = [(match.widened is None, why) for match in acting if (why := match.needs_merged)]
        return min(found)[1] if found else None

    def beside_layers(self) -> LoRAPatch:
        """The same without what only a merge can do, which is told as left out; what runs ahead stays where one strength holds."""
        ahead = self.needs_unfused is None
        lost = [match for match in self.matched.matches if match.needs_merged and not (ahead and match.target.ahead)]
        told = tuple(LeftOut(match.key, NEEDS_MERGED) for match in lost)
        gone = set(lost)
        kept = tuple(match for match in self.matched.matches if match not in gone)
        return replace(self, matched=replace(self.matched, matches=kept, left_out=(*self.matched.left_out, *told)))

    def apart(self) -> tuple[LoRAPatch, LoRAPatch]:
        """What the host runs ahead of the model's calls, and the rest."""
        ahead = tuple(match for match in self.matched.matches if match.target.ahead)
        rest = tuple(match for match in self.matched.matches if not match.target.ahead)
        return replace(self, matched=replace(self.matched, matches=ahead)), replace(
            self, matched=replace(self.matched, matches=rest)
        )

    def strength_for(self, component: Component) -> float:
        """Strength in one part, before selector and window."""
        return self.strength if component == "denoiser" or self.text_strength is None else self.text_strength

    def acting(self, component: Component) -> tuple[tuple[TargetMatch, float], ...]:
        """Every placement in one part with the selector's factor, those with factor 0 left out.

        Where the selector has several factors for the parts of a fused layer, they are in the update.
        """
        matches = self.matched.of(component)
        found: list[tuple[TargetMatch, float]] = []
        for match, shares in zip(matches, self.selector.shares(p.target for p in matches), strict=True):
            own = shares if match.rows is None else within(shares, *match.rows)
            update, factor = at_rows(match.update, own)
            if factor != 0:
                found.append((match if update is match.update else replace(match, update=update), factor))
        return tuple(found)

    def with_strength(self, strength: float) -> LoRAPatch:
        """The same at another strength everywhere."""
        return replace(self, strength=strength, text_strength=None, uncond_strength=None)


def masked(patch: LoRAPatch, mask: RegionMask | Picture | None) -> LoRAPatch:
    """The same LoRA in another region."""
    return replace(patch, mask=RegionMask.of(mask))


@dataclass(frozen=True, slots=True)
class Choice:
    """How a LoRA will run, and why."""

    mode: Literal["merged", "live"]
    reason: str


def choose_mode(
    patches: Sequence[LoRAPatch], mode: Mode = "auto", *, quantised: bool = False, offloaded: bool = False
) -> Choice:
    """``auto`` merges what is constant on 16-bit weights in memory, and runs the rest beside the layers.

    Cost (reference/lora-and-training.md E3-E4): merging writes every weight once per change and costs nothing per step;
    the side path writes none and costs ``n r (a + b)`` multiplications per layer and step. Raises InvalidInputError if
    merging is asked for what only a side path can do.
    """
    reasons = [reason for patch in patches if (reason := patch.needs_unfused)]
    if mode == "merged":
        if reasons:
            raise InvalidInputError(f"mode 'merged' is not possible: {reasons[0]}; choose 'live' or 'auto'")
        return Choice("merged", "asked for")
    merges = [reason for patch in patches if (reason := patch.needs_merged)]
    if merges and (reasons or mode == "live"):
        raise InvalidInputError(
            f"{reasons[0] if reasons else 'mode live was asked for'}, which needs side paths, but {patches[0].name} needs a merge: "
            f"{merges[0]}; use one strength for all steps and the whole picture with mode 'auto', or set partial to 'allow' to leave "
            "that out"
        )
    if mode == "live":
        return Choice("live", "asked for")
    if reasons:
        return Choice("live", reasons[0])
    if merges:
        return Choice("merged", merges[0])
    if quantised:
        return Choice("live", "the base weights are quantised: a merge would round the change to them")
    if offloaded:
        return Choice("live", "the base weights are offloaded: the host would merge again whenever it loads a layer")
    return Choice("merged", "one constant strength: merging costs nothing per step")
