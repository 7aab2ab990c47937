"""HRA of PEFT: inputs reflected r times. arXiv 2405.17484, peft's hra/layer.py."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import CorruptFileError, quoted
from ..parts import ADAPTER, Key, Parts, key
from ..update import Update, flat, near
from .input_rotation import InputRotation


@dataclass(frozen=True, slots=True, eq=False)
class Reflections(InputRotation):
    """HRA: ``T = H_1 … H_r`` of reflections ``H = I - 2 u uᵀ`` at the columns of ``vectors`` (``i r``), applied as ``W T``.

    ``orthogonal``: the columns are made orthogonal first (Gram-Schmidt). Kept as ``T = I - A Bᵀ``.
    """

    algorithm: ClassVar[str] = "HRA"
    keys: ClassVar[tuple[Key, ...]] = (key(".hra_u", rf"\.hra_u{ADAPTER}$", "hra_u", peft=True),)
    marks: ClassVar[tuple[str, ...]] = ("hra_u",)
    peft: ClassVar[tuple[str, ...]] = ("HRA",)
    vectors: Tensor
    orthogonal: bool = False

    @property
    def rank(self) -> int:
        return int(self.vectors.shape[1])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and flat(shape)[1] == self.vectors.shape[0]

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return None, int(self.vectors.shape[0])

    def pair(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A and B, ``i r`` both."""
        wide = torch.promote_types(like.dtype, torch.float32)
        u = self.vectors.to(like.device, wide)
        u = u / torch.linalg.vector_norm(u, dim=0).clamp_min(torch.finfo(wide).tiny)
        first = torch.zeros_like(u)
        for n in range(u.shape[1]):
            if self.orthogonal:
                own = u[:, n]
                for _ in range(2):  # once leaves rounding behind
                    own = own - u[:, :n] @ (u[:, :n].T @ own)
                u[:, n] = own / torch.linalg.vector_norm(own).clamp_min(torch.finfo(wide).tiny)
                first[:, n] = 2 * u[:, n]
            else:
                first[:, n] = 2 * (u[:, n] - first[:, :n] @ (u[:, :n].T @ u[:, n]))
        return near(first, like), near(u, like)

    def turner(self, like: Tensor, columns: int) -> Callable[[Tensor], Tensor]:
        first, second = self.pair(like)  # W T x = W (x - A Bᵀ x)
        return lambda x: x - (x @ second) @ first.T

    def transposed(self, like: Tensor, columns: int) -> Callable[[Tensor], Tensor]:
        first, second = self.pair(like)  # rows of W T = W - W A Bᵀ
        return lambda x: x - (x @ first) @ second.T

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        vectors = parts["hra_u"]
        if vectors.ndim != 2:
            raise CorruptFileError(
                f"{parts.file}: the hra_u of {quoted(parts.stem)} has the shape {list(vectors.shape)}; (inputs, r) was expected"
            )
        if not vectors.is_meta and not bool(torch.linalg.vector_norm(vectors.float(), dim=0).all()):
            raise CorruptFileError(
                f"{parts.file}: the hra_u of {quoted(parts.stem)} has a column of zeros, which is no reflection"
            )
        return cls(vectors, parts.config is not None and parts.config.on("apply_GS"))
