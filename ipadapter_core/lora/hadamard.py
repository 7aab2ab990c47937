"""LoHa: the elementwise product of two low-rank matrices. FedPara, arXiv 2108.06098; as in LyCORIS."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .low_rank import LowRank
from .update import Change, Layer, Update, alike, flat, near

MAX_FACTORS = 2**27
"""Numbers of the factors that stand for a LoHa; more than r² of them are no shorter way."""


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

    def norm(self) -> float:
        """‖ΔW‖ in blocks of rows, so that no more than a few million numbers are there at once."""
        rows, columns = self._flat_shape()
        a_axis = 0 if self.t1 is None else 1
        step = max(1, 2**22 // max(columns, 1))
        total = 0.0
        for start in range(0, rows, step):
            length = min(step, rows - start)
            part = replace(
                self, w1_a=self.w1_a.narrow(a_axis, start, length), w2_a=self.w2_a.narrow(a_axis, start, length)
            )
            kernel = () if self.t1 is None else tuple(self.t1.shape[2:])
            width = columns if self.t1 is None else int(self.w1_b.shape[1])
            ghost = torch.empty(1, dtype=torch.float64).expand(length, width, *kernel)
            total += float(torch.linalg.vector_norm(part.delta(ghost))) ** 2
        return math.sqrt(total)

    def _flat_shape(self) -> tuple[int, int]:
        if self.t1 is None:
            return int(self.w1_a.shape[0]), self.w1_b.flatten(1).shape[1]
        return int(self.w1_a.shape[1]), int(self.w1_b.shape[1]) * self.t1[0, 0].numel()

    def fits(self, shape: tuple[int, ...]) -> bool:
        kernel = self.t1 is None or tuple(self.t1.shape[2:]) == shape[2:]
        return len(shape) > 1 and kernel and self._flat_shape() == flat(shape)

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return self._flat_shape()

    def delta(self, weight: Tensor) -> Tensor:
        first = _half(self.w1_a, self.w1_b, self.t1, weight)
        second = _half(self.w2_a, self.w2_b, self.t2, weight)
        return (first * second).reshape(weight.shape) * self.scale

    def factors(self) -> LowRank | None:
        """The same as one product of rank r²: (a1 ∘ a2)(b1 ∘ b2), columns and rows multiplied pairwise; None with cores, or too wide."""
        rows, columns = self._flat_shape()
        if self.t1 is not None or (rows + columns) * self.rank**2 > MAX_FACTORS:
            return None
        w1_a, w1_b, w2_a, w2_b = alike(self.w1_a, self.w1_b.flatten(1), self.w2_a, self.w2_b.flatten(1))
        up = torch.einsum("or,os->ors", w1_a, w2_a).flatten(1)
        down = torch.einsum("ri,si->rsi", w1_b, w2_b).flatten(0, 1)
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
