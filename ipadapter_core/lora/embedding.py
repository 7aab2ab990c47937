"""A change of an embedding's table, whose side path looks rows up instead of multiplying."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import Layer
from .update import Change, Wrapper, near


@dataclass(frozen=True, slots=True, eq=False)
class Lookup(Wrapper):
    """``inner`` on a table of ``tokens channels``; ids in, rows out."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.inner.fits(shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.inner.delta(weight)

    def change(self, weight: Tensor, total: Tensor, strength: float) -> None:
        self.inner.change(weight, total, strength)

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        if self.inner.joins:
            down, table = self.inner.products(layer, like)
            return lambda x, y, s: F.embedding(x, table) @ down * s
        weight = layer.weight(like.device, torch.promote_types(like.dtype, torch.float32))
        change = near(self.inner.delta(weight), like)
        return lambda x, y, s: F.embedding(x, change) * s
