"""OFT of PEFT: blocks of inputs turned, by the Cayley transform or its series. arXiv 2306.07280, peft's oft/layer.py."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import CorruptFileError, quoted
from ..parts import ADAPTER, Key, Parts, key
from ..peft_config import PeftConfig
from ..update import Update, flat, near
from .input_rotation import InputRotation, cayley


@dataclass(frozen=True, slots=True, eq=False)
class InputOrthogonal(InputRotation):
    """OFT of PEFT: ``vectors`` is ``k n(n-1)/2``, the upper triangles of k antisymmetric blocks; k of 1 is shared by all.

    ``terms`` above 0: as many terms of the Cayley transform's series, as PEFT counts them. ``largest``: the norm to which
    every block is shortened (COFT), 0 for none. ``divisor`` divides the vectors (OneTrainer's scaled OFT).
    """

    algorithm: ClassVar[str] = "OFT"
    keys: ClassVar[tuple[Key, ...]] = (
        key(".scaled_oft", rf"\.oft_R{ADAPTER}\.scaled_oft$", "oft_scaled", number=True),  # OneTrainer
        key(".oft_R", rf"\.oft_R{ADAPTER}\.weight$", "oft_r", peft=True),  # OneTrainer too
    )
    marks: ClassVar[tuple[str, ...]] = ("oft_r",)
    peft: ClassVar[tuple[str, ...]] = ("OFT",)
    vectors: Tensor
    size: int
    terms: int = 0
    largest: float = 0.0
    divisor: float = 1.0

    def fits(self, shape: tuple[int, ...]) -> bool:
        if len(shape) < 2:
            return False
        count, columns = int(self.vectors.shape[0]), flat(shape)[1]
        return columns % self.size == 0 and count in (1, columns // self.size)

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        count = int(self.vectors.shape[0])
        return None, None if count == 1 else count * self.size

    def rotations(self, like: Tensor) -> Tensor:
        """The blocks ``k n n``."""
        wide = torch.promote_types(like.dtype, torch.float32)
        vectors = self.vectors.to(like.device, wide) / self.divisor
        skew = vectors.new_zeros(len(vectors), self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=vectors.device)
        skew[:, rows, columns] = vectors
        skew = skew - skew.mT
        if self.largest > 0:
            limit = self.largest / math.sqrt(len(vectors))
            norm = torch.linalg.matrix_norm(skew, keepdim=True)
            skew = torch.where(norm <= limit, skew, skew * (limit / norm.clamp_min(1e-30)))
        return near(cayley(skew) if self.terms == 0 else _series(skew, self.terms), like)

    def turner(self, like: Tensor, columns: int) -> Callable[[Tensor], Tensor]:
        return _in_blocks(self.rotations(like))

    def transposed(self, like: Tensor, columns: int) -> Callable[[Tensor], Tensor]:
        return _in_blocks(self.rotations(like).mT)

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        vectors, config = parts["oft_r"], parts.config
        size = (1 + math.isqrt(1 + 8 * int(vectors.shape[1]))) // 2 if vectors.ndim == 2 else 0
        if vectors.ndim != 2 or size * (size - 1) // 2 != vectors.shape[1]:
            raise CorruptFileError(
                f"{parts.file}: the oft_R of {quoted(parts.stem)} has the shape {list(vectors.shape)}; (blocks, n(n-1)/2) was expected"
            )
        scaled = bool(parts.number("oft_scaled"))
        divisor = 2 * math.sqrt(size - 1) if scaled else 1.0
        if config is None:  # what PEFT does if nothing is said, and OneTrainer, which writes no config
            return cls(vectors, size, 5, 0.0, divisor)
        terms = _terms(config) if config.on("use_cayley_neumann", default=True) else 0
        eps = config.number("eps")
        return cls(vectors, size, terms, (6e-5 if eps is None else eps) if config.on("coft") else 0.0, divisor)


def _terms(config: PeftConfig) -> int:
    told = config.number("num_cayley_neumann_terms")
    return 5 if told is None else max(1, min(int(told), 64))


def _in_blocks(blocks: Tensor) -> Callable[[Tensor], Tensor]:
    """``x → x · diag(blocks)`` for ``… k n`` flattened; one block is used for all."""
    count, size = blocks.shape[:2]
    form = "...kn,nm->...km" if count == 1 else "...kn,knm->...km"
    matrices = blocks[0] if count == 1 else blocks
    return lambda x: torch.einsum(form, x.unflatten(-1, (-1, size)), matrices).flatten(-2)


def _series(skew: Tensor, terms: int) -> Tensor:
    """``I + 2 Q + 2 Q² + … + Qᵐ``: the last power counts once, and 4 terms are as 3 (oft/layer.py, _cayley_batch)."""
    found = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device) + torch.zeros_like(skew)
    if terms > 1:
        found = found + 2 * skew
    if terms > 2:
        power = skew @ skew
        found = found + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            found = found + 2 * power
        found = found + power @ skew
    return found
