"""OFT and BOFT: output channels rotated in blocks, by ``R = (I + Q)(I - Q)⁻¹`` with Q antisymmetric (Cayley).

OFT: arXiv 2306.07280; BOFT: arXiv 2311.06243; block layouts as in LyCORIS and kohya. Q is shortened to a Frobenius norm
of ``constraint · o`` where that is above 0. Strength s: OFT ``W + s (rescale · R W - W)``, which without rescale is
``I + s (R - I)``; in BOFT each of the stages is ``I + s (R - I)``, so it is a polynomial in s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .update import Change, Layer, Update, near


def rotations(blocks: Tensor, limit: float) -> Tensor:
    """Cayley transform of ``… n n`` blocks; computed in float32 or wider."""
    wide = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    q = wide - wide.transpose(-1, -2)
    q = _shortened(q, limit)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(identity - q, identity + q)  # the factors commute


def _shortened(q: Tensor, limit: float) -> Tensor:
    """At a norm of at most ``limit``; 0 and numbers that no norm reaches are no limit."""
    if not 0 < limit < torch.finfo(q.dtype).max:
        return q
    return q * (limit / torch.linalg.vector_norm(q).clamp_min(limit))


@dataclass(frozen=True, slots=True, eq=False)
class Orthogonal(Update):
    """OFT: ``blocks`` is ``k n n``, output block k becomes ``R_kᵀ W_k``; ``rescale`` multiplies rows afterwards."""

    algorithm: ClassVar[str] = "OFT"
    reads_weight: ClassVar[bool] = True
    blocks: Tensor
    constraint: float = 0.0
    rescale: Tensor | None = None

    @property
    def _rows(self) -> int:
        return int(self.blocks.shape[0] * self.blocks.shape[1])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape[0] == self._rows and (self.rescale is None or self.rescale.numel() == shape[0])

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return self._rows, None

    def _rotations(self, like: Tensor) -> Tensor:
        wide = torch.promote_types(like.dtype, torch.float32)
        return near(rotations(self.blocks.to(like.device, wide), self.constraint * self._rows), like)

    def delta(self, weight: Tensor) -> Tensor:
        turned = torch.einsum(
            "knm,kn...->km...", self._rotations(weight), weight.unflatten(0, tuple(self.blocks.shape[:2]))
        ).flatten(0, 1)
        if self.rescale is not None:
            turned = turned * near(self.rescale, weight).reshape(-1, *[1] * (weight.ndim - 1))
        return turned - weight

    def live(self, layer: Layer, like: Tensor) -> Change:
        turn = torch.block_diag(*self._rotations(like).transpose(1, 2)) if layer.kind == "conv" else None
        blocks = self._rotations(like)
        rescale = None if self.rescale is None else layer.channels(near(self.rescale.flatten(), like))

        def change(x: Tensor, y: Tensor, s: float) -> Tensor:
            base = layer.without_bias(y)
            if turn is not None:
                turned = layer.pointwise(base, turn)
            else:
                rows = base.unflatten(-1, tuple(self.blocks.shape[:2]))
                turned = torch.einsum("knm,...kn->...km", blocks, rows).flatten(-2)
            return ((turned if rescale is None else turned * rescale) - base) * s

        return change

    def rows(self, start: int, length: int) -> Update:
        """Whole blocks of it; a block that reaches into another layer mixes both, which no single layer can follow."""
        n = int(self.blocks.shape[-1])
        if start % n or length % n:
            return Update.rows(self, start, length)
        blocks = self.blocks
        limit = self.constraint * self._rows
        if limit > 0:  # the norm is of all blocks together
            wide = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
            blocks = _shortened(wide - wide.transpose(-1, -2), limit) / 2  # whose antisymmetric part it is again
        rescale = None if self.rescale is None else self.rescale.flatten()[start : start + length]
        return replace(self, blocks=blocks[start // n : (start + length) // n], constraint=0.0, rescale=rescale)


@dataclass(frozen=True, slots=True, eq=False)
class Butterfly(Update):
    """BOFT: ``blocks`` is ``m k b b``; stage i rotates groups of channels that lie ``2^i b/2`` apart."""

    algorithm: ClassVar[str] = "BOFT"
    reads_weight: ClassVar[bool] = True
    blocks: Tensor
    constraint: float = 0.0
    rescale: Tensor | None = None

    @property
    def _rows(self) -> int:
        return int(self.blocks.shape[1] * self.blocks.shape[2])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape[0] == self._rows and (self.rescale is None or self.rescale.numel() == shape[0])

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return self._rows, None

    def turned(self, channels_first: Tensor, stages: Tensor, strength: float) -> Tensor:
        """The product of all stages on the first axis."""
        identity = torch.eye(stages.shape[-1], dtype=stages.dtype, device=stages.device)
        half = stages.shape[-1] // 2
        for i, stage in enumerate(stages):
            apart = 2**i * half
            mixed = channels_first.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2)
            blocks = mixed.unflatten(0, tuple(stage.shape[:2]))
            mixed = torch.einsum("kij,kj...->ki...", torch.lerp(identity, stage, strength), blocks).flatten(0, 1)
            channels_first = mixed.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
        if self.rescale is not None:
            factor = 1 + strength * (near(self.rescale.flatten(), channels_first) - 1)
            channels_first = channels_first * factor.reshape(-1, *[1] * (channels_first.ndim - 1))
        return channels_first

    def _stages(self, like: Tensor) -> Tensor:
        wide = torch.promote_types(like.dtype, torch.float32)
        return near(rotations(self.blocks.to(like.device, wide), self.constraint * self._rows), like)

    def delta(self, weight: Tensor) -> Tensor:
        return self.turned(weight, self._stages(weight), 1.0) - weight

    def change(self, weight: Tensor, total: Tensor, strength: float) -> None:
        total.add_(self.turned(weight, self._stages(weight), strength) - weight)

    def live(self, layer: Layer, like: Tensor) -> Change:
        stages = self._stages(like)
        axis = 1 if layer.kind == "conv" else -1

        def change(x: Tensor, y: Tensor, s: float) -> Tensor:
            base = layer.without_bias(y)
            return self.turned(base.movedim(axis, 0), stages, s).movedim(0, axis) - base

        return change
