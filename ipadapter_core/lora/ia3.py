"""IA3: ``W' = W (1 + w)`` along input or output channels. arXiv 2205.05638; as in LyCORIS, where w starts at 0.

PEFT's starts at 1 and multiplies the bias too where it acts on outputs; ``formats.py`` makes a second update of that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .update import Change, Layer, Update, near


@dataclass(frozen=True, slots=True, eq=False)
class ChannelScale(Update):
    """``factor`` holds one w per channel."""

    algorithm: ClassVar[str] = "IA3"
    reads_weight: ClassVar[bool] = True
    factor: Tensor
    on_input: bool

    def fits(self, shape: tuple[int, ...]) -> bool:
        axis = 1 if self.on_input else 0
        return len(shape) > axis and self.factor.numel() == shape[axis]

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return (None, self.factor.numel()) if self.on_input else (self.factor.numel(), None)

    def delta(self, weight: Tensor) -> Tensor:
        factor = near(self.factor, weight).flatten()
        return weight * factor.reshape(-1, *[1] * (weight.ndim - (2 if self.on_input else 1)))

    def live(self, layer: Layer, like: Tensor) -> Change:
        factor = layer.channels(near(self.factor.flatten(), like))
        if self.on_input:
            return lambda x, y, s: layer.again(x * factor) * s
        return lambda x, y, s: layer.without_bias(y) * (factor * s)

    def rows(self, start: int, length: int) -> Update:
        return self if self.on_input else replace(self, factor=self.factor.flatten()[start : start + length])
