"""IA3: ``W' = W (1 + w)`` along input or output channels. arXiv 2205.05638; as in LyCORIS, where w starts at 0.

PEFT's starts at 1 and multiplies the bias too where it acts on outputs, which is a second update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UnknownFormatError, quoted
from ..layer import Layer
from ..parts import ADAPTER, Key, Parts, key
from ..update import Change, Changes, Update, near


@dataclass(frozen=True, slots=True, eq=False)
class ChannelScale(Update):
    """``factor`` holds one w per channel."""

    algorithm: ClassVar[str] = "IA3"
    reads_weight: ClassVar[bool] = True
    multiplies: ClassVar[bool] = True
    keys: ClassVar[tuple[Key, ...]] = (
        key(".ia3_l", rf"\.ia3_l{ADAPTER}$", "ia3_l", peft=True),
        key(".on_input", r"\.on_input$", "on_input", number=True),
        key(".weight", r"\.weight$", "ia3", beside="on_input"),  # LyCORIS; what tells it is on_input beside it
    )
    marks: ClassVar[tuple[str, ...]] = ("ia3_l", "ia3")
    peft: ClassVar[tuple[str, ...]] = ("IA3",)
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

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        factor = layer.channels(near(self.factor.flatten(), like))
        if self.on_input:
            return lambda x, y, s: layer.again(x * factor) * s
        return lambda x, y, s: layer.without_bias(y) * (factor * s)

    def rows(self, start: int, length: int) -> Update:
        return self if self.on_input else replace(self, factor=self.factor.flatten()[start : start + length])

    @classmethod
    def from_parts(cls, parts: Parts) -> Update | Changes:
        if "ia3_l" not in parts:
            return cls(parts["ia3"], bool(parts.number("on_input")))
        vector = parts["ia3_l"]
        shape = tuple(vector.shape)
        if len(shape) < 2 or math.prod(shape) != max(shape):
            raise parts.mismatch()
        told = None if parts.config is None else parts.config.is_feedforward(parts.path)
        on_input = shape[0] == 1 if len(shape) == 2 and shape[0] != shape[1] else told
        if on_input is None:
            raise UnknownFormatError(
                f"{parts.file} is a PEFT IA3 file whose adapter_config.json is needed to tell whether {quoted(parts.stem)} acts on "
                "inputs or outputs; put it beside the file"
            )
        scale = cls(vector.flatten() if vector.is_meta else vector.flatten().float() - 1, on_input)
        return Changes(scale, None if on_input else scale)

    def to_parts(self) -> dict[str, Tensor]:
        return {".weight": self.factor, ".on_input": torch.tensor(int(self.on_input))}
