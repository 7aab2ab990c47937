"""DoRA: the direction comes from an additive update, the length of every row or column is learned. arXiv 2402.09353.

``W' = m · (W + ΔW) / ‖W + ΔW‖`` and strength s gives ``W + s (W' - W)``, as A1111 has it: 0 is exactly off. (PEFT
scales only ΔW, so its 0 leaves ``m W / ‖W‖``; LyCORIS norms ``W + s ΔW``.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .update import Change, Layer, Update, near

Axis = Literal["in", "out"]


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed(Update):
    """``magnitude`` has one number per output row or input column of the weight (``axis``)."""

    algorithm: ClassVar[str] = "DoRA"
    reads_weight: ClassVar[bool] = True
    inner: Update
    magnitude: Tensor
    axis: Axis

    @property
    def title(self) -> str:
        return "DoRA" if self.inner.algorithm == "LoRA" else f"DoRA on {self.inner.title}"

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def fits(self, shape: tuple[int, ...]) -> bool:
        axis = 0 if self.axis == "out" else 1
        return self.inner.fits(shape) and len(shape) > axis and self.magnitude.shape[0] == shape[axis]

    def on(self, shape: tuple[int, ...]) -> Update:
        return replace(self, inner=self.inner.on(shape))

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return self.inner.weight_shape

    def factor(self, weight: Tensor) -> Tensor:
        """``m / ‖W + ΔW‖`` per row or column, shaped to multiply the weight."""
        changed = weight + self.inner.delta(weight)
        axis = 0 if self.axis == "out" else 1
        others = [i for i in range(weight.ndim) if i != axis]
        norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        return near(self.magnitude, weight).reshape(norm.shape) / norm.clamp_min(torch.finfo(weight.dtype).tiny)

    def delta(self, weight: Tensor) -> Tensor:
        return (weight + self.inner.delta(weight)) * self.factor(weight) - weight

    def live(self, layer: Layer, like: Tensor) -> Change:
        wide = torch.promote_types(like.dtype, torch.float32)
        factor = layer.channels(near(self.factor(layer.weight(like.device, wide)).flatten(), like))
        inner = self.inner.live(layer, like)

        def rows(x: Tensor, y: Tensor, s: float) -> Tensor:
            base = layer.without_bias(y)
            return ((base + inner(x, y, 1.0)) * factor - base) * s

        def columns(x: Tensor, y: Tensor, s: float) -> Tensor:
            scaled = x * factor
            return (layer.again(scaled) + inner(scaled, y, 1.0) - layer.without_bias(y)) * s

        return rows if self.axis == "out" else columns

    def rows(self, start: int, length: int) -> Update:
        if self.axis == "in":
            return Update.rows(self, start, length)  # its norm needs all rows; refused when it meets the layer
        part = slice(start, start + length)
        return replace(self, inner=self.inner.rows(start, length), magnitude=self.magnitude[part])

    def tensors(self) -> dict[str, Tensor]:
        return {**self.inner.tensors(), "magnitude": self.magnitude}

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Update:
        return replace(self, inner=self.inner.to(device, dtype), magnitude=self.magnitude.to(device, dtype))
