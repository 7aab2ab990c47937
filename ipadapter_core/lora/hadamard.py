"""LoHa: the elementwise product of two low-rank matrices. FedPara, arXiv 2108.06098; as in LyCORIS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .low_rank import LowRank
from .update import Change, Layer, Update, flat, near, shape_text, wide


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard(Update):
    """``ΔW = scale · (w1_a w1_b) ⊙ (w2_a w2_b)``; ``a`` is ``o r``, ``b`` is ``r i`` (kernel flattened into ``i``).

    With cores ``t`` (``r r y x``) both ``a`` are ``r o`` and ``b`` are ``r i``.
    """

    algorithm: ClassVar[str] = "LoHa"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0
    t1: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.w1_b.shape[0])

    def _flat_shape(self) -> tuple[int, int]:
        if self.t1 is None:
            return int(self.w1_a.shape[0]), self.w1_b.flatten(1).shape[1]
        return int(self.w1_a.shape[1]), int(self.w1_b.shape[1]) * self.t1[0, 0].numel()

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self._flat_shape() == flat(shape)

    def describe_shape(self) -> str:
        return shape_text(*self._flat_shape())

    def delta(self, weight: Tensor) -> Tensor:
        first = _half(self.w1_a, self.w1_b, self.t1, weight)
        second = _half(self.w2_a, self.w2_b, self.t2, weight)
        return (first * second).reshape(weight.shape) * self.scale

    def factors(self) -> LowRank | None:
        """The same as one product of rank r²: (a1 ∘ a2)(b1 ∘ b2), columns and rows multiplied pairwise; None with cores."""
        if self.t1 is not None:
            return None
        up = torch.einsum("or,os->ors", wide(self.w1_a), wide(self.w2_a)).flatten(1)
        down = torch.einsum("ri,si->rsi", wide(self.w1_b).flatten(1), wide(self.w2_b).flatten(1)).flatten(0, 1)
        return LowRank(down, up, self.scale)

    def live(self, layer: Layer, like: Tensor) -> Change:
        if self.t1 is None and 2 * self.rank**2 <= min(self._flat_shape()):
            factors = self.factors()
            assert factors is not None
            return factors.live(layer, like)
        tensors = self.to(like.device, like.dtype)
        shape = layer.ghost(like)
        # r² is too wide for factors; the matrix is made in every call, so that no copy of the model's size stays
        return lambda x, y, s: layer.apply(x, tensors.delta(shape)) * s


def _half(a: Tensor, b: Tensor, core: Tensor | None, like: Tensor) -> Tensor:
    a, b = near(a, like), near(b, like)
    if core is None:
        return a @ b.flatten(1)
    return torch.einsum("rs...,ro,si->oi...", near(core, like), a, b)
