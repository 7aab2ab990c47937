"""What LyCORIS's orthogonal methods share: output channels rotated in blocks, ``R = (I + Q)(I - Q)⁻¹`` with Q antisymmetric.

That is the Cayley transform; block layouts as in LyCORIS and kohya. Q is shortened to a Frobenius norm of
``constraint · o`` where that is above 0.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import CorruptFileError, quoted
from ..parts import Parts
from ..update import Update, near


@dataclass(frozen=True, slots=True, eq=False)
class Rotation(Update):
    """``blocks`` ends in ``k n n``: k blocks of n output channels; ``rescale`` multiplies rows afterwards."""

    reads_weight: ClassVar[bool] = True
    blocks: Tensor
    constraint: float = 0.0
    rescale: Tensor | None = None

    @property
    def outputs(self) -> int:
        """Output channels of the layer."""
        return int(self.blocks.shape[-3] * self.blocks.shape[-1])

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return self.outputs, None

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape[0] == self.outputs and (self.rescale is None or self.rescale.numel() == shape[0])

    def rotations(self, like: Tensor) -> Tensor:
        """The rotations of all blocks; computed in float32 or wider, given in ``like``'s dtype."""
        wide = torch.promote_types(like.dtype, torch.float32)
        skew = antisymmetric(self.blocks.to(like.device, wide), self.constraint * self.outputs)
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        return near(torch.linalg.solve(identity - skew, identity + skew), like)  # the factors commute

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        blocks, rescale = parts["oft_blocks"], parts.get("rescale")
        constraint = parts.number("alpha") or 0.0
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
            raise CorruptFileError(
                f"{parts.file}: the oft_blocks of {quoted(parts.stem)} have the shape {list(blocks.shape)}; OFT has (blocks, n, n), "
                "BOFT (stages, blocks, n, n)"
            )
        constraint = min(constraint, torch.finfo(torch.float32).max)
        parts.alpha, parts.alpha_from = constraint, "tensor" if "alpha" in parts else "default"
        return cls(blocks, constraint, rescale)

    def to_parts(self) -> dict[str, Tensor]:
        parts = {".oft_blocks": self.blocks, ".alpha": torch.tensor(self.constraint)}
        return parts if self.rescale is None else parts | {".rescale": self.rescale}


def antisymmetric(blocks: Tensor, limit: float) -> Tensor:
    """Q of ``… n n`` blocks, at a norm of at most ``limit``; 0 and numbers that no norm reaches are no limit."""
    q = blocks - blocks.mT
    if not 0 < limit < torch.finfo(q.dtype).max:
        return q
    return q * (limit / torch.linalg.vector_norm(q).clamp_min(limit))
