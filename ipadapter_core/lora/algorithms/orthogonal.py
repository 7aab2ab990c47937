"""OFT of LyCORIS: ``W' = rescale · R W``, output channels rotated in blocks. arXiv 2306.07280.

Strength s is ``W + s (rescale · R W - W)``, which without rescale is ``I + s (R - I)``.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..layer import Layer
from ..parts import Key, key
from ..update import Change, Update, near
from .rotation import Rotation, antisymmetric


@dataclass(frozen=True, slots=True, eq=False)
class Orthogonal(Rotation):
    """OFT: ``blocks`` is ``k n n``, output block k becomes ``R_kᵀ W_k``; ``rescale`` multiplies rows afterwards."""

    algorithm: ClassVar[str] = "OFT"
    keys: ClassVar[tuple[Key, ...]] = (
        key(".oft_blocks", r"\.oft_blocks$", "oft_blocks"),
        key(".rescale", r"\.rescale$", "rescale"),
    )
    marks: ClassVar[tuple[str, ...]] = ("oft_blocks",)

    def delta(self, weight: Tensor) -> Tensor:
        turned = torch.einsum(
            "knm,kn...->km...", self.rotations(weight), weight.unflatten(0, tuple(self.blocks.shape[:2]))
        ).flatten(0, 1)
        if self.rescale is not None:
            turned = turned * near(self.rescale, weight).reshape(-1, *[1] * (weight.ndim - 1))
        return turned - weight

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        turn = torch.block_diag(*self.rotations(like).transpose(1, 2)) if layer.kind == "conv" else None
        blocks = self.rotations(like)
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
        if self.constraint > 0:  # the norm is of all blocks together
            wide = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
            blocks = antisymmetric(wide, self.constraint * self.outputs) / 2  # whose antisymmetric part it is again
        rescale = None if self.rescale is None else self.rescale.flatten()[start : start + length]
        return replace(self, blocks=blocks[start // n : (start + length) // n], constraint=0.0, rescale=rescale)
