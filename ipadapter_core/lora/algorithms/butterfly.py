"""BOFT of LyCORIS: stages of rotations of differently mixed output channels. arXiv 2311.06243.

With strength s each stage is ``I + s (R - I)``, so the change is a polynomial in s.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import CorruptFileError, quoted
from ..layer import Layer
from ..parts import Parts
from ..update import Change, Update, near
from .rotation import Rotation


@dataclass(frozen=True, slots=True, eq=False)
class Butterfly(Rotation):
    """BOFT: ``blocks`` is ``m k b b``; stage i rotates groups of channels that lie ``2^i b/2`` apart."""

    algorithm: ClassVar[str] = "BOFT"

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

    def delta(self, weight: Tensor) -> Tensor:
        return self.turned(weight, self.rotations(weight), 1.0) - weight

    def change(self, weight: Tensor, total: Tensor, strength: float) -> None:
        total.add_(self.turned(weight, self.rotations(weight), strength) - weight)

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        stages = self.rotations(like)
        axis = 1 if layer.kind == "conv" else -1

        def change(x: Tensor, y: Tensor, s: float) -> Tensor:
            base = layer.without_bias(y)
            return self.turned(base.movedim(axis, 0), stages, s).movedim(0, axis) - base

        return change

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        return "oft_blocks" in parts and parts.tensors["oft_blocks"].ndim == 4

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        update = super(Butterfly, cls).from_parts(parts)
        blocks = parts["oft_blocks"]
        stages, count, size = (int(n) for n in blocks.shape[:3])
        if size % 2 or stages > 30 or count * size % (2 ** (stages - 1) * size):
            raise CorruptFileError(
                f"{parts.file}: the oft_blocks of {quoted(parts.stem)} have the shape {list(blocks.shape)}, but {count} blocks of "
                f"{size} cannot be mixed in {stages} stages; the file is damaged"
            )
        return update
