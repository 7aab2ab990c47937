"""Weights that take a weight's place: ``W' = new``, and with strength s ``W + s (new - W)``.

``set_weight`` is ComfyUI's; PEFT saves whole layers (``modules_to_save``) and trained biases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..layer import Layer
from ..parts import Key, Parts, key
from ..update import Change, Update, flat, near


@dataclass(frozen=True, slots=True, eq=False)
class Replacement(Update):
    """``W' = new``."""

    algorithm: ClassVar[str] = "set"
    reads_weight: ClassVar[bool] = True
    keys: ClassVar[tuple[Key, ...]] = (
        key(".set_weight", r"\.set_weight$", "set_weight"),
        key("_norm.scale", r"(?<=_norm)\.scale$", "set_weight"),  # BFL's control LoRAs hold the norms whole
    )
    marks: ClassVar[tuple[str, ...]] = ("set_weight", "saved_weight")
    new: Tensor

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.new.ndim > 0 and flat(tuple(self.new.shape)) == flat(shape)

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return tuple(self.new.shape)

    def delta(self, weight: Tensor) -> Tensor:
        return near(self.new, weight).reshape(weight.shape) - weight

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        weight = near(self.new, like).reshape(layer.shape)
        if layer.kind == "norm":
            return lambda x, y, s: (layer.normalised(x) * layer.along(weight, x) - layer.without_bias(y)) * s
        return lambda x, y, s: (layer.apply(x, weight) - layer.without_bias(y)) * s

    def rows(self, start: int, length: int) -> Update:
        return replace(self, new=self.new[start : start + length])

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        return cls(parts.matrix("set_weight" if "set_weight" in parts else "saved_weight", 1))

    @classmethod
    def bias_from_parts(cls, parts: Parts) -> Update | None:
        return cls(parts.matrix("saved_bias", 1)) if "saved_bias" in parts else None

    def to_parts(self) -> dict[str, Tensor]:
        return {".set_weight": self.new}
