"""LoRA and LoCon: ``ΔW = scale · up · down``, with an optional core between them for convolutions (tucker).

LoRA: arXiv 2106.09685. LoCon and the core tensor ``lora_mid``: LyCORIS, arXiv 2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .update import Change, Layer, Update, flat, near, wide


@dataclass(frozen=True, slots=True, eq=False)
class LowRank(Update):
    """``down`` is ``r i`` or ``r i y x``, ``up`` is ``o r`` (trailing ones allowed), ``mid`` is ``r r y x``."""

    algorithm: ClassVar[str] = "LoRA"
    down: Tensor
    up: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def fits(self, shape: tuple[int, ...]) -> bool:
        columns = self.down.flatten(1).shape[1] * (1 if self.mid is None else self.mid[0, 0].numel())
        kernel = self.mid is None or tuple(self.mid.shape[2:]) == shape[2:]
        return len(shape) > 1 and kernel and (self.up.shape[0], columns) == flat(shape)

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        kernel = (self.down if self.mid is None else self.mid).shape[2:]
        return int(self.up.shape[0]), *self.down.shape[1:2], *kernel

    def delta(self, weight: Tensor) -> Tensor:
        up, down = near(self.up, weight).flatten(1), near(self.down, weight)
        if self.mid is not None:
            core = torch.einsum("or,rs...->os...", up, near(self.mid, weight))
            return torch.einsum("os...,si->oi...", core, down.flatten(1)).reshape(weight.shape) * self.scale
        return (up @ down.flatten(1)).reshape(weight.shape) * self.scale

    def live(self, layer: Layer, like: Tensor) -> Change:
        down, up = prepared(self, layer, like)
        return lambda x, y, s: layer.pointwise(layer.apply(x, down), up) * s

    def rows(self, start: int, length: int) -> Update:
        return replace(self, up=self.up[start : start + length])


def prepared(update: LowRank, layer: Layer, like: Tensor) -> tuple[Tensor, Tensor]:
    """``down`` in the layer's form (a kernel for a convolution) and ``up`` as a matrix that contains the scale."""
    down, up = near(update.down, like), near(wide(update.up).flatten(1) * update.scale, like)
    if update.mid is not None:
        # the 1×1 down and the core in one kernel: r i y x
        return torch.einsum("rs...,si->ri...", near(update.mid, like), down.flatten(1)), up
    if layer.kind == "conv":
        down = down.reshape(update.rank, *layer.shape[1:])
    return (down if layer.kind == "conv" else down.flatten(1)), up
