"""Whole differences: of a weight, of a bias, of a norm; and weights that are replaced.

``diff``, ``diff_b``, ``w_norm``, ``b_norm`` (LyCORIS) are added; ``set_weight`` (ComfyUI) takes the weight's place, with
strength s as ``W + s (S - W)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .update import Change, Layer, Update, flat, near


@dataclass(frozen=True, slots=True, eq=False)
class Difference(Update):
    """``ΔW = diff``, of a weight or of a norm's vector."""

    algorithm: ClassVar[str] = "full"
    diff: Tensor

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.diff.ndim > 0 and flat(tuple(self.diff.shape)) == flat(shape)

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return tuple(self.diff.shape)

    def delta(self, weight: Tensor) -> Tensor:
        return near(self.diff, weight).reshape(weight.shape)

    def live(self, layer: Layer, like: Tensor) -> Change:
        weight = near(self.diff, like).reshape(layer.shape)
        if layer.kind == "norm":
            return lambda x, y, s: layer.normalised(x) * layer.along(weight, x) * s
        return lambda x, y, s: layer.apply(x, weight) * s

    def rows(self, start: int, length: int) -> Update:
        return replace(self, diff=self.diff[start : start + length])


@dataclass(frozen=True, slots=True, eq=False)
class Replacement(Update):
    """``W' = new``."""

    algorithm: ClassVar[str] = "set"
    reads_weight: ClassVar[bool] = True
    new: Tensor

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.new.ndim > 0 and flat(tuple(self.new.shape)) == flat(shape)

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return tuple(self.new.shape)

    def delta(self, weight: Tensor) -> Tensor:
        return near(self.new, weight).reshape(weight.shape) - weight

    def live(self, layer: Layer, like: Tensor) -> Change:
        weight = near(self.new, like).reshape(layer.shape)
        if layer.kind == "norm":
            return lambda x, y, s: (layer.normalised(x) * layer.along(weight, x) - layer.without_bias(y)) * s
        return lambda x, y, s: (layer.apply(x, weight) - layer.without_bias(y)) * s

    def rows(self, start: int, length: int) -> Update:
        return replace(self, new=self.new[start : start + length])
