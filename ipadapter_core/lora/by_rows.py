"""One update with a factor per range of output rows: what a selector says of the parts of a fused layer."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .layer import Layer
from .update import Change, Update, Wrapper, near


class Share(NamedTuple):
    """``length`` rows of a layer from ``start`` on, and the selector's factor there."""

    start: int
    length: int
    factor: float


def within(shares: Iterable[Share], start: int, length: int) -> tuple[Share, ...]:
    """The same of some rows of the layer alone, counted from the first of them."""
    ends = ((max(s.start, start), min(s.start + s.length, start + length), s.factor) for s in shares)
    return tuple(Share(first - start, last - first, factor) for first, last, factor in ends if first < last)


@dataclass(frozen=True, slots=True, eq=False)
class ByRows(Wrapper):
    """``inner`` at its strength times a factor per range of rows; exact for every algorithm, whatever it reads or how it scales."""

    shares: tuple[Share, ...]

    @property
    def joins(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.joins

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.inner.kernel

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.inner.fits(shape)

    def _factors(self) -> Tensor:
        return torch.cat([torch.full((share.length,), share.factor, dtype=torch.float64) for share in self.shares])

    def _scaled(self, tensor: Tensor) -> Tensor:
        """Rows times their factors."""
        return tensor * near(self._factors(), tensor).reshape(-1, *[1] * (tensor.ndim - 1))

    def _rows_of(self) -> list[tuple[float, Tensor]]:
        """Every factor but 0, and ones in its rows, zeros elsewhere."""
        factors = self._factors()
        return [(factor, (factors == factor).double()) for factor in {s.factor for s in self.shares} if factor != 0]

    def delta(self, weight: Tensor) -> Tensor:
        return self._scaled(self.inner.delta(weight))

    def change(self, weight: Tensor, total: Tensor, strength: float) -> None:
        for factor in {share.factor for share in self.shares if share.factor != 0}:
            whole = torch.zeros_like(total)
            self.inner.change(weight, whole, strength * factor)
            for share in self.shares:
                if share.factor == factor:
                    rows = slice(share.start, share.start + share.length)
                    total[rows] += whole[rows]

    def products(self, layer: Layer, like: Tensor) -> tuple[Tensor, Tensor]:
        down, up = self.inner.products(layer, like)
        return down, self._scaled(up)

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        return self._beside(self.inner.unfused(layer, like), layer, like)

    def unfused_bias(self, layer: Layer, like: Tensor) -> Change:
        return self._beside(self.inner.unfused_bias(layer, like), layer, like)

    def _beside(self, change: Change, layer: Layer, like: Tensor) -> Change:
        parts = [(factor, layer.along(near(rows, like), like)) for factor, rows in self._rows_of()]

        def by_rows(x: Tensor, y: Tensor, s: float) -> Tensor:
            (factor, rows), *rest = parts
            added = change(x, y, s * factor) * rows
            for factor, rows in rest:
                added = added + change(x, y, s * factor) * rows
            return added

        return by_rows

    def factors(self) -> tuple[Tensor, Tensor] | None:
        found = self.inner.factors()
        return None if found is None else (self._scaled(found[0]), found[1])


def at_rows(update: Update, shares: tuple[Share, ...]) -> tuple[Update, float]:
    """The update with these shares, and a factor for all of it."""
    factors = {share.factor for share in shares}
    return (update, factors.pop()) if len(factors) == 1 else (ByRows(update, shares), 1.0)
