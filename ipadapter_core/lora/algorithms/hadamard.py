"""LoHa: the elementwise product of two low-rank matrices. FedPara, arXiv 2108.06098; as in LyCORIS."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..fresh import Settings, TrainedAs, normal, scale_for
from ..layer import Layer
from ..parts import ADAPTER, Key, Parts, key
from ..update import Change, Update, alike, flat, near
from .low_rank import LowRank

MAX_FACTORS = 2**27
"""Numbers of the factors that stand for a LoHa; more than r² of them are no shorter way."""


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard(Update):
    """``ΔW = scale · (w1_a w1_b) ⊙ (w2_a w2_b)``; ``a`` is ``o r``, ``b`` is ``r i`` (kernel flattened into ``i``).

    With cores ``t`` (``r r y x``) both ``a`` are ``r o`` and ``b`` are ``r i``.
    """

    algorithm: ClassVar[str] = "LoHa"
    keys: ClassVar[tuple[Key, ...]] = (key(".hada_", rf"\.hada_(w1_a|w1_b|w2_a|w2_b|t1|t2){ADAPTER}$", r"hada_\1"),)
    marks: ClassVar[tuple[str, ...]] = ("hada_w1_a",)
    inner_width: ClassVar[str] = "hada_w1_b"
    peft: ClassVar[tuple[str, ...]] = ("LoHa",)
    trainings: ClassVar[tuple[TrainedAs, ...]] = (TrainedAs("loha"),)
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

    def low_rank(self) -> LowRank | None:
        """The same as one product of rank r²: (a1 ∘ a2)(b1 ∘ b2), columns and rows multiplied pairwise; None with cores, or too wide."""
        rows, columns = self._flat_shape()
        if self.t1 is not None or (rows + columns) * self.rank**2 > MAX_FACTORS:
            return None
        w1_a, w1_b, w2_a, w2_b = alike(self.w1_a, self.w1_b.flatten(1), self.w2_a, self.w2_b.flatten(1))
        up = torch.einsum("or,os->ors", w1_a, w2_a).flatten(1)
        down = torch.einsum("ri,si->rsi", w1_b, w2_b).flatten(0, 1)
        return LowRank(down, up, self.scale)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        product = self.low_rank()
        return None if product is None else product.factors()

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        if self.t1 is None and 2 * self.rank**2 <= min(self._flat_shape()):
            product = self.low_rank()
            assert product is not None
            return product.unfused(layer, like)
        tensors = self.to(like.device, like.dtype)
        shape = layer.ghost(like)
        # r² is too wide for factors; the matrix is made in every call, so that no copy of the model's size stays
        return lambda x, y, s: layer.apply(x, tensors.delta(shape)) * s

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        w1_a, w1_b, w2_a, w2_b = (parts.matrix(f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        t1, t2 = parts.get("hada_t1"), parts.get("hada_t2")
        sizes: list[tuple[int, ...]] = []
        for a, b, core in ((w1_a, w1_b, t1), (w2_a, w2_b, t2)):
            if core is None:
                fits = a.ndim == 2 and a.shape[1] == b.shape[0]
                sizes.append((int(a.shape[0]), int(b.flatten(1).shape[1])))
            else:
                fits = core.ndim > 2 and a.ndim == b.ndim == 2 and tuple(core.shape[:2]) == (a.shape[0], b.shape[0])
                sizes.append((int(a.shape[1]), int(b.shape[1]), *core.shape[2:]))
            if not fits:
                raise parts.mismatch()
        if sizes[0] != sizes[1] or (t1 is None) != (t2 is None):
            raise parts.mismatch()
        return cls(w1_a, w1_b, w2_a, w2_b, parts.scale(int(w1_b.shape[0])), t1, t2)

    def to_parts(self) -> dict[str, Tensor]:
        return {f".hada_{name}": t for name, t in self.tensors().items()} | {
            ".alpha": torch.tensor(self.scale * self.rank)
        }

    @classmethod
    def fresh(cls, weight: Tensor, settings: Settings) -> Update:
        """Spreads as in LyCORIS, whose second product starts at zero."""
        rows, columns = flat(tuple(weight.shape))
        rank = min(settings.rank, rows, columns)
        w1_a, w1_b = normal(rows, rank, std=0.1), normal(rank, columns)
        return cls(w1_a, w1_b, torch.zeros(rows, rank), normal(rank, columns), scale_for(settings, rank))


def _half(a: Tensor, b: Tensor, core: Tensor | None, like: Tensor) -> Tensor:
    a, b = near(a, like), near(b, like)
    if core is None:
        return a @ b.flatten(1)
    return torch.einsum("rs...,ro,si->oi...", near(core, like), a, b)
