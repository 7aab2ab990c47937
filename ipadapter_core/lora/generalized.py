"""GLoRA: ``ΔW = scale · (W A + B)`` with low-rank A and B. arXiv 2306.07967; as in LyCORIS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .update import Change, Layer, Update, flat, near


@dataclass(frozen=True, slots=True, eq=False)
class Generalized(Update):
    """``W A`` is ``W · a_first · a_second`` over input channels, ``B`` is ``b_up · b_down``: ``i r``, ``r i``, ``o r``, ``r i``.

    Files have two axis orders. ``other`` is the second reading where both are possible; the layer's shape tells.
    """

    algorithm: ClassVar[str] = "GLoRA"
    reads_weight: ClassVar[bool] = True
    a_first: Tensor
    a_second: Tensor
    b_up: Tensor
    b_down: Tensor
    scale: float = 1.0
    b_mid: Tensor | None = None
    other: Generalized | None = None

    @property
    def rank(self) -> int:
        return int(self.a_second.shape[0])

    def _columns(self) -> int:
        return self.b_down.flatten(1).shape[1] * (1 if self.b_mid is None else self.b_mid[0, 0].numel())

    def fits(self, shape: tuple[int, ...]) -> bool:
        own = (
            len(shape) > 1
            and flat(shape) == (self.b_up.shape[0], self._columns())
            and self.a_first.shape[0] == shape[1]
            and (self.b_mid is None or tuple(self.b_mid.shape[2:]) == shape[2:])
        )
        return own or (self.other is not None and self.other.fits(shape))

    def on(self, shape: tuple[int, ...]) -> Update:
        mine = replace(self, other=None)
        return self.other if self.other is not None and not mine.fits(shape) and self.other.fits(shape) else mine

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return int(self.b_up.shape[0]), self._columns()

    def _b(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        up, down = near(self.b_up, like).flatten(1), near(self.b_down, like)
        if self.b_mid is not None:
            return torch.einsum("or,rs...,si->oi...", up, near(self.b_mid, like), down.flatten(1)).reshape(shape)
        return (up @ down.flatten(1)).reshape(shape)

    def delta(self, weight: Tensor) -> Tensor:
        first, second = near(self.a_first, weight).flatten(1), near(self.a_second, weight).flatten(1)
        mixed = torch.einsum("oi...,ir,rj->oj...", weight, first, second)
        return (mixed + self._b(weight, tuple(weight.shape))) * self.scale

    def live(self, layer: Layer, like: Tensor) -> Change:
        # (W A) x = W (A x): the layer itself runs once more, on a mixed input
        first, second = near(self.a_first, like).flatten(1), near(self.a_second, like).flatten(1)
        up = near(self.b_up, like).flatten(1)
        down = near(self.b_down, like)
        if self.b_mid is not None:
            down = torch.einsum("rs...,si->ri...", near(self.b_mid, like), down.flatten(1))
        down = down.reshape(-1, *layer.shape[1:])

        def change(x: Tensor, y: Tensor, s: float) -> Tensor:
            mixed = layer.pointwise(layer.pointwise(x, second), first)
            return (layer.again(mixed) + layer.pointwise(layer.apply(x, down), up)) * (s * self.scale)

        return change
