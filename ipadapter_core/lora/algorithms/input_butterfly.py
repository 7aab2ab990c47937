"""BOFT of PEFT: stages of turns of differently mixed inputs. arXiv 2311.06243, peft's boft/layer.py."""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import CorruptFileError, quoted
from ..parts import ADAPTER, Key, Parts, key
from ..update import Update, flat, near
from .input_rotation import InputRotation, cayley


@dataclass(frozen=True, slots=True, eq=False)
class InputButterfly(InputRotation):
    """BOFT of PEFT: ``blocks`` is ``m k n n``, m stages of turns of differently mixed inputs; ``rescale`` has ``o`` factors."""

    algorithm: ClassVar[str] = "BOFT"
    keys: ClassVar[tuple[Key, ...]] = (key(".boft_", rf"\.boft_([Rs]){ADAPTER}$", r"boft_\1", peft=True),)
    marks: ClassVar[tuple[str, ...]] = ("boft_R",)
    peft: ClassVar[tuple[str, ...]] = ("BOFT",)
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

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        blocks, rescale = parts["boft_R"], parts["boft_s"]
        if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3]:
            raise CorruptFileError(
                f"{parts.file}: the boft_R of {quoted(parts.stem)} has the shape {list(blocks.shape)}; (stages, blocks, n, n) was expected"
            )
        stages, count, size = (int(n) for n in blocks.shape[:3])
        if not butterfly_is_possible(count, size, stages):
            raise CorruptFileError(
                f"{parts.file}: the boft_R of {quoted(parts.stem)} has {count} blocks of {size}, which cannot be mixed in {stages} "
                "stages; the file is damaged"
            )
        return cls(blocks, rescale)


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
