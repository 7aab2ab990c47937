"""What PEFT's orthogonal methods share: they turn what a layer reads, ``W' = W Tᵀ``; LyCORIS's turn what it writes.

A convolution's kernel counts as inputs. Strength s is ``W + s (W' - W)``. Letters: k blocks of n, i inputs, o outputs, r
reflections.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..layer import Layer
from ..update import Change, Update, flat, near


@dataclass(frozen=True, slots=True, eq=False)
class InputRotation(Update):
    """A change of the inputs: ``turned`` acts on vectors of all inputs, on the last axis."""

    reads_weight: ClassVar[bool] = True
    learns: ClassVar[bool] = False

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

    def unfused(self, layer: Layer, like: Tensor) -> Change:
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
