"""PEFT's orthogonal methods: OFT, BOFT and HRA turn what a layer reads, ``W' = W Tᵀ``; LyCORIS's turn what it writes.

OFT: arXiv 2306.07280, with the blocks of peft's oft/layer.py (Cayley transform, or its series); BOFT: arXiv 2311.06243,
boft/layer.py; HRA: arXiv 2405.17484, hra/layer.py. A convolution's kernel counts as inputs. Strength s is
``W + s (W' - W)``. Letters: k blocks of n, i inputs, o outputs, r reflections.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .update import Change, Layer, Update, flat, near


@dataclass(frozen=True, slots=True, eq=False)
class InputRotation(Update):
    """A change of the inputs: ``turned`` acts on vectors of all inputs, on the last axis."""

    reads_weight: ClassVar[bool] = True

    def turner(self, like: Tensor, columns: int) -> Callable[[Tensor], Tensor]:
        """The function ``x → x T`` for rows ``… i``; W' is ``W Tᵀ``, so rows of weights need ``transposed``."""
        raise NotImplementedError

    def transposed(self, like: Tensor, columns: int) -> Callable[[Tensor], Tensor]:
        """The function ``x → x Tᵀ``."""
        raise NotImplementedError

    def factor(self, like: Tensor) -> Tensor | None:
        """What outputs are multiplied by, ``o``."""
        return None

    def rows(self, start: int, length: int) -> Update:
        return self  # every row is turned by itself

    def delta(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        turned = self.transposed(weight, rows.shape[1])(rows)
        factor = self.factor(weight)
        turned = turned if factor is None else turned * factor[:, None]
        return turned.reshape(weight.shape) - weight

    def live(self, layer: Layer, like: Tensor) -> Change:
        columns = flat(layer.shape)[1]
        factor = self.factor(like)
        if layer.kind != "linear" and columns != layer.shape[1]:  # a kernel: no turn of the channels alone
            wide = torch.promote_types(like.dtype, torch.float32)
            delta = near(self.delta(layer.weight(like.device, wide)), like)
            return lambda x, y, s: layer.apply(x, delta) * s
        turn = self.turner(like, columns)
        channel = 1 if layer.kind == "conv" else -1
        scale = None if factor is None else layer.channels(factor)

        def change(x: Tensor, y: Tensor, s: float) -> Tensor:
            out = layer.again(turn(x.movedim(channel, -1)).movedim(-1, channel))
            return ((out if scale is None else out * scale) - layer.without_bias(y)) * s

        return change


def cayley(skew: Tensor) -> Tensor:
    """``(I - S)(I + S)⁻¹`` of ``… n n``, in float32 or wider."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity + skew, identity - skew, left=False)


def _in_blocks(blocks: Tensor) -> Callable[[Tensor], Tensor]:
    """``x → x · diag(blocks)`` for ``… k n`` flattened; one block is used for all."""
    count, size = blocks.shape[:2]
    form = "...kn,nm->...km" if count == 1 else "...kn,knm->...km"
    matrices = blocks[0] if count == 1 else blocks
    return lambda x: torch.einsum(form, x.unflatten(-1, (-1, size)), matrices).flatten(-2)


@dataclass(frozen=True, slots=True, eq=False)
class InputOrthogonal(InputRotation):
    """OFT of PEFT: ``vectors`` is ``k n(n-1)/2``, the upper triangles of k antisymmetric blocks; k of 1 is shared by all.

    ``terms`` above 0: as many terms of the Cayley transform's series, as PEFT counts them. ``largest``: the norm to which
    every block is shortened (COFT), 0 for none. ``divisor`` divides the vectors (OneTrainer's scaled OFT).
    """

    algorithm: ClassVar[str] = "OFT"
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


@dataclass(frozen=True, slots=True, eq=False)
class InputButterfly(InputRotation):
    """BOFT of PEFT: ``blocks`` is ``m k n n``, m stages of turns of differently mixed inputs; ``rescale`` has ``o`` factors."""

    algorithm: ClassVar[str] = "BOFT"
    blocks: Tensor
    rescale: Tensor

    def fits(self, shape: tuple[int, ...]) -> bool:
        columns = int(self.blocks.shape[1] * self.blocks.shape[2])
        return len(shape) > 1 and flat(shape)[1] == columns and self.rescale.numel() == shape[0]

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return self.rescale.numel(), int(self.blocks.shape[1] * self.blocks.shape[2])

    def factor(self, like: Tensor) -> Tensor:
        return near(self.rescale.flatten(), like)

    def rows(self, start: int, length: int) -> Update:
        return replace(self, rescale=self.rescale.flatten()[start : start + length])

    def _stages(self, like: Tensor) -> list[_Stage]:
        wide = torch.promote_types(like.dtype, torch.float32)
        blocks = self.blocks.to(like.device, wide)
        turns = near(cayley((blocks - blocks.mT) / 2), like)
        stages, count, size = (int(n) for n in blocks.shape[:3])
        orders = [butterfly_order(count, size, stage, stages).to(like.device) for stage in range(stages)]
        return [_Stage(turn, order, torch.argsort(order)) for turn, order in zip(turns, orders, strict=True)]

    def turner(self, like: Tensor, columns: int) -> Callable[[Tensor], Tensor]:
        stages = self._stages(like)[::-1]  # T = B_m … B_1 with B = P D Pᵀ, so x T is x B_m … B_1
        return lambda x: _through(x, stages)

    def transposed(self, like: Tensor, columns: int) -> Callable[[Tensor], Tensor]:
        stages = [replace(stage, blocks=stage.blocks.mT) for stage in self._stages(like)]
        return lambda x: _through(x, stages)


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    """``B = P D Pᵀ``: D of blocks ``k n n``; (P v)[i] is v[order[i]], ``back`` undoes it."""

    blocks: Tensor
    order: Tensor
    back: Tensor


def _through(x: Tensor, stages: list[_Stage]) -> Tensor:
    """``x · B`` for every stage."""
    for stage in stages:
        mixed = x[..., stage.back].unflatten(-1, (-1, stage.blocks.shape[1]))
        x = torch.einsum("...kn,knm->...km", mixed, stage.blocks).flatten(-2)[..., stage.order]
    return x


def butterfly_order(count: int, size: int, stage: int, stages: int) -> Tensor:
    """The order in which a stage takes the inputs (boft/layer.py, block_butterfly_perm); with one stage it is unchanged."""
    inputs = count * size
    places = torch.arange(inputs)
    half, groups = size // 2, count // 2**stage
    if stages == 1:
        return places
    steps = inputs // groups // half
    order = torch.cat((torch.arange(0, steps, 2), torch.arange(1, steps, 2)))
    return places.reshape(groups, steps, half)[:, order].reshape(-1)


def butterfly_is_possible(count: int, size: int, stages: int) -> bool:
    """Whether inputs of ``count`` blocks can be mixed in so many stages."""
    if stages == 1:
        return True
    return size % 2 == 0 and stages < 32 and count % 2 ** (stages - 1) == 0


@dataclass(frozen=True, slots=True, eq=False)
class Reflections(InputRotation):
    """HRA: ``T = H_1 … H_r`` of reflections ``H = I - 2 u uᵀ`` at the columns of ``vectors`` (``i r``), applied as ``W T``.

    ``orthogonal``: the columns are made orthogonal first (Gram-Schmidt). Kept as ``T = I - A Bᵀ``.
    """

    algorithm: ClassVar[str] = "HRA"
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
