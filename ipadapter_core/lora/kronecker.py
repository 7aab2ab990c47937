"""LoKr: the Kronecker product of a small and a large matrix, either of them possibly low-rank. LyCORIS, arXiv 2309.14859."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .update import Change, Layer, Update, flat, near, shape_text


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker(Update):
    """``ΔW = scale · (w1 ⊗ w2)``; each factor whole, or as ``a b``; ``t2`` (``r r y x``) is a core for w2's kernel.

    w1 is ``p q``; w2 is ``m n`` or ``m n y x``; the weight is ``(p m) (q n) y x``. ``scale`` is 1 where both factors are
    whole, whatever alpha says (LyCORIS lokr.py).
    """

    algorithm: ClassVar[str] = "LoKr"
    scale: float = 1.0
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int | None:
        if self.w2_b is not None:
            return int(self.w2_b.shape[0])
        return None if self.w1_b is None else int(self.w1_b.shape[0])

    def _shapes(self) -> tuple[tuple[int, int], tuple[int, ...]]:
        """Shapes of w1 and w2, nothing computed."""
        if self.w1 is not None:
            first = (int(self.w1.shape[0]), int(self.w1.shape[1]))
        else:
            assert self.w1_a is not None
            assert self.w1_b is not None
            first = (int(self.w1_a.shape[0]), int(self.w1_b.shape[1]))
        if self.w2 is not None:
            return first, tuple(self.w2.shape)
        assert self.w2_a is not None
        assert self.w2_b is not None
        if self.t2 is not None:
            return first, (int(self.w2_a.shape[1]), int(self.w2_b.shape[1]), *self.t2.shape[2:])
        return first, (int(self.w2_a.shape[0]), *self.w2_b.shape[1:])

    def _flat_shape(self) -> tuple[int, int]:
        (p, q), (m, *n) = self._shapes()
        return p * m, q * torch.Size(n).numel()

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self._flat_shape() == flat(shape)

    def describe_shape(self) -> str:
        return shape_text(*self._flat_shape())

    def factors(self, like: Tensor, kernel: int = 0) -> tuple[Tensor, Tensor]:
        """w1 ``p q`` and w2 ``m n`` (``m n y x`` for a convolution whose weight has ``kernel`` more axes)."""
        first = near(self.w1, like) if self.w1 is not None else _product(self.w1_a, self.w1_b, like)
        if self.w2 is not None:
            second = near(self.w2, like)
        elif self.t2 is not None:
            assert self.w2_a is not None
            assert self.w2_b is not None
            core = near(self.t2, like)
            second = torch.einsum("rs...,rm,sn->mn...", core, near(self.w2_a, like), near(self.w2_b, like))
        else:
            second = _product(self.w2_a, self.w2_b, like)
        return first, second.reshape(*second.shape, *[1] * (kernel + 2 - second.ndim))

    def delta(self, weight: Tensor) -> Tensor:
        first, second = self.factors(weight, weight.ndim - 2)
        first = first.reshape(*first.shape, *[1] * (second.ndim - 2))
        return torch.kron(first, second.contiguous()).reshape(weight.shape) * self.scale

    def live(self, layer: Layer, like: Tensor) -> Change:
        kernel = len(layer.shape) - 2
        tensors = self.to(like.device, like.dtype)
        assert isinstance(tensors, Kronecker)
        first, second = tensors.factors(like, kernel)
        if second[0].numel() * first.shape[1] != flat(layer.shape)[1]:
            raise AssertionError("a Kronecker product that does not fit was not refused")
        first = first * self.scale
        if layer.kind != "conv":

            def linear(x: Tensor, y: Tensor, s: float) -> Tensor:
                inner = x.unflatten(-1, (first.shape[1], -1)) @ second.T  # … q m
                return torch.einsum("pq,...qm->...pm", first, inner).flatten(-2) * s

            return linear

        def convolution(x: Tensor, y: Tensor, s: float) -> Tensor:
            inner = layer.apply(x.unflatten(1, (first.shape[1], -1)).flatten(0, 1), second)  # (b q) m y x
            return torch.einsum("pq,bqm...->bpm...", first, inner.unflatten(0, (x.shape[0], -1))).flatten(1, 2) * s

        return convolution


def _product(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    assert a is not None
    assert b is not None
    return (near(a, like) @ near(b, like).flatten(1)).reshape(-1, *b.shape[1:])
