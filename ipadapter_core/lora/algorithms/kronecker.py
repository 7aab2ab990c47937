"""LoKr: the Kronecker product of a small and a large matrix, either of them possibly low-rank. LyCORIS, arXiv 2309.14859."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..fresh import Settings, TrainedAs, scale_for, uniform
from ..layer import Layer
from ..parts import ADAPTER, Key, Parts, key
from ..update import Change, Update, flat, near, product_norm, wide


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker(Update):
    """``ΔW = scale · (w1 ⊗ w2)``; each factor whole, or as ``a b``; ``t2`` (``r r y x``) is a core for w2's kernel.

    w1 is ``p q``; w2 is ``m n`` or ``m n y x``; the weight is ``(p m) (q n) y x``. Where both factors are whole, ``scale`` is
    1 in LyCORIS, whatever alpha says (lokr.py), and alpha by the configured rank in PEFT.
    """

    algorithm: ClassVar[str] = "LoKr"
    keys: ClassVar[tuple[Key, ...]] = (
        key(".lokr_", rf"\.lokr_(w1|w1_a|w1_b|w2|w2_a|w2_b|t1|t2){ADAPTER}$", r"lokr_\1"),
    )
    marks: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a")
    inner_width: ClassVar[str] = "lokr_w2_b"
    peft: ClassVar[tuple[str, ...]] = ("LoKr",)
    trainings: ClassVar[tuple[TrainedAs, ...]] = (TrainedAs("lokr"),)
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

    def norm(self) -> float:
        """‖ΔW‖ without the product: that of a Kronecker product is the product of the norms."""
        first = product_norm(self.w1_a, self.w1_b) if self.w1 is None else _norm(self.w1)
        if self.w2 is None and self.t2 is None:
            second = product_norm(self.w2_a, self.w2_b)
        elif self.w2 is None:
            assert self.w2_a is not None
            second = _norm(self.halves(wide(self.w2_a))[1])
        else:
            second = _norm(self.w2)
        return abs(self.scale) * first * second

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
        """Its w1 has no more columns than the layer has channels: kernels belong to w2."""
        if len(shape) < 2 or self._flat_shape() != flat(shape):
            return False
        (_, q), (_, _, *kernel) = self._shapes()
        return shape[1] % q == 0 and (
            not kernel or tuple(kernel) == shape[2:] or (not shape[2:] and set(kernel) == {1})
        )

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return self._flat_shape()

    def halves(self, like: Tensor, kernel: int = 0) -> tuple[Tensor, Tensor]:
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
        first, second = self.halves(weight, weight.ndim - 2)
        # torch.kron takes views, which fail for some layouts of a convolution's factors
        return torch.einsum("pq,mn...->pmqn...", first, second).reshape(weight.shape) * self.scale

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        kernel = len(layer.shape) - 2
        tensors = self.to(like.device, like.dtype)
        assert isinstance(tensors, Kronecker)
        first, second = tensors.halves(like, kernel)
        if second[0].numel() * first.shape[1] != flat(layer.shape)[1]:
            raise AssertionError("a Kronecker product that does not fit was not refused")
        first = first * self.scale
        if layer.kind != "conv":
            second = second.flatten(1)

            def linear(x: Tensor, y: Tensor, s: float) -> Tensor:
                inner = x.unflatten(-1, (first.shape[1], -1)) @ second.T  # … q m
                return torch.einsum("pq,...qm->...pm", first, inner).flatten(-2) * s

            return linear
        second = second.reshape(second.shape[0], layer.shape[1] // first.shape[1], *layer.shape[2:])

        def convolution(x: Tensor, y: Tensor, s: float) -> Tensor:
            inner = layer.apply(x.unflatten(1, (first.shape[1], -1)).flatten(0, 1), second)  # (b q) m y x
            return torch.einsum("pq,bqm...->bpm...", first, inner.unflatten(0, (x.shape[0], -1))).flatten(1, 2) * s

        return convolution

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        tensors: dict[str, Tensor] = {}
        for half in ("w1", "w2"):
            if f"lokr_{half}" in parts:
                tensors[half] = parts.matrix(f"lokr_{half}")
                continue
            a, b = parts.matrix(f"lokr_{half}_a"), parts.matrix(f"lokr_{half}_b")
            core = parts.get("lokr_t2") if half == "w2" else None
            if core is not None:
                fits = core.ndim > 2 and a.ndim == b.ndim == 2 and tuple(core.shape[:2]) == (a.shape[0], b.shape[0])
                tensors["t2"] = core
            else:
                fits = a.ndim == 2 and a.shape[1] == b.shape[0]
            if not fits:
                raise parts.mismatch()
            tensors |= {f"{half}_a": a, f"{half}_b": b}
        if any(tensors[name].ndim > 2 for name in ("w1", "w1_b") if name in tensors):
            raise parts.mismatch()
        update = cls(1.0, **tensors)
        rank = update.rank
        if parts.config is not None and parts.config.method == "LOKR":  # whole factors count as of the config's rank
            rank = parts.config.rank_of(parts.path) or rank
        if rank is None:  # LyCORIS: with both factors whole, alpha counts for nothing (lokr.py)
            parts.alpha = parts.number("alpha")
            return update
        return replace(update, scale=parts.scale(rank))

    def to_parts(self) -> dict[str, Tensor]:
        tensors = self.tensors()
        if self.rank is not None:
            return {f".lokr_{name}": t for name, t in tensors.items()} | {
                ".alpha": torch.tensor(self.scale * self.rank)
            }
        if self.scale != 1:  # of a PEFT config; LyCORIS has no alpha for whole factors
            tensors["w1"] = wide(tensors["w1"]) * self.scale
        return {f".lokr_{name}": t for name, t in tensors.items()}

    @classmethod
    def fresh(cls, weight: Tensor, settings: Settings) -> Update:
        """A whole small matrix, and a large one that is whole too where factors of this rank would not be smaller."""
        out, columns, *kernel = weight.shape
        p, q = _divisor(out, settings.factor), _divisor(columns, settings.factor)
        w1, rank = uniform(p, q), settings.rank
        m, n = out // p, columns // q
        if rank * (m + n * math.prod(kernel)) >= m * n * math.prod(kernel):
            return cls(1.0, w1=w1, w2=torch.zeros(m, n, *kernel))
        return cls(scale_for(settings, rank), w1=w1, w2_a=torch.zeros(m, rank), w2_b=uniform(rank, n, *kernel))


def _divisor(size: int, most: int) -> int:
    return max(d for d in range(1, min(size, most) + 1) if size % d == 0)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def _product(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    assert a is not None
    assert b is not None
    return (near(a, like) @ near(b, like).flatten(1)).reshape(-1, *b.shape[1:])
