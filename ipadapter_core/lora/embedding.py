"""A change of an embedding's table, whose side path looks rows up instead of multiplying."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .low_rank import LowRank
from .update import Change, Layer, Update, near, wide


@dataclass(frozen=True, slots=True, eq=False)
class Lookup(Update):
    """``inner`` on a table of ``tokens channels``; ids in, rows out."""

    algorithm: ClassVar[str] = "embedding"
    inner: Update

    @property
    def reads_weight(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.reads_weight

    @property
    def title(self) -> str:
        return self.inner.title

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.inner.fits(shape)

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return self.inner.weight_shape

    def delta(self, weight: Tensor) -> Tensor:
        return self.inner.delta(weight)

    def change(self, weight: Tensor, total: Tensor, strength: float) -> None:
        self.inner.change(weight, total, strength)

    def live(self, layer: Layer, like: Tensor) -> Change:
        if isinstance(self.inner, LowRank) and self.inner.mid is None:
            table = near(wide(self.inner.up).flatten(1) * self.inner.scale, like)
            down = near(self.inner.down, like).flatten(1)
            return lambda x, y, s: F.embedding(x, table) @ down * s
        weight = layer.weight(like.device, torch.promote_types(like.dtype, torch.float32))
        change = near(self.inner.delta(weight), like)
        return lambda x, y, s: F.embedding(x, change) * s

    def tensors(self) -> dict[str, Tensor]:
        return self.inner.tensors()

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Update:
        return replace(self, inner=self.inner.to(device, dtype))
