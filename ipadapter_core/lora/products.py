"""All low-rank LoRAs on one layer as one: concatenated along the rank, so that their number costs no more products.

One product down, the strengths (and masks) on the few columns between, one product up that adds to the layer's output.
``r`` is the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device_cache import DeviceCache
from .layer import Layer
from .matching import TargetMatch


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What the patch of this ``index`` does to one layer, and the selector's ``factor`` there."""

    index: int
    match: TargetMatch
    factor: float

    @property
    def joins(self) -> bool:
        """Whether it is a product of two matrices on the weight."""
        return self.match.update.joins and self.match.parameter == "weight" and not self.match.target.grouped


class Acting(NamedTuple):
    """A part in one call: its strength on every chunk of the batch (one entry if they are equal), and its region."""

    part: Part
    strengths: tuple[float, ...]
    mask: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _Joined:
    """Low-rank updates of one layer as two matrices; ``columns`` are where each one's rank begins and ends."""

    down: Tensor
    up: Tensor
    columns: tuple[tuple[int, int], ...]


class Products:
    """What is kept for the low-rank LoRAs of one layer, by those that act."""

    def __init__(self) -> None:
        self._joined: DeviceCache[_Joined] = DeviceCache()
        self._vectors: DeviceCache[Tensor] = DeviceCache()  # a curve has a value per step

    @property
    def held_bytes(self) -> int:
        """Bytes of the factors that are kept for devices now."""
        return sum(t.nbytes for _, joined in self._joined.items() for t in (joined.down, joined.up))

    def release(self) -> None:
        """Forget what was made for a device."""
        self._joined.release()
        self._vectors.release()

    def add(self, layer: Layer, x: Tensor, y: Tensor, acting: Sequence[Acting]) -> Tensor:
        """``y`` and what they add to it."""
        joined = self._prepare(layer, tuple(one.part for one in acting), y)
        inner, alpha = layer.apply(x, joined.down), 1.0
        strengths = [one.strengths for one in acting]
        if any(len(s) > 1 or one.mask is not None for s, one in zip(strengths, acting, strict=True)):
            inner = self._scaled(layer, inner, joined, acting)
        elif len(set(strengths)) == 1:
            alpha = strengths[0][0]
        else:
            numbers = [
                s for (s,), (begin, end) in zip(strengths, joined.columns, strict=True) for _ in range(begin, end)
            ]
            inner = inner * layer.channels(self._kept(tuple(numbers), y))
        if layer.kind == "conv":
            return torch.add(y, layer.pointwise(inner, joined.up), alpha=alpha)
        if y.ndim == 2:
            return torch.addmm(y, inner, joined.up.T, alpha=alpha)
        rows = torch.addmm(y.reshape(-1, y.shape[-1]), inner.reshape(-1, inner.shape[-1]), joined.up.T, alpha=alpha)
        return rows.view(y.shape)

    def _scaled(self, layer: Layer, inner: Tensor, joined: _Joined, acting: Sequence[Acting]) -> Tensor:
        """Each one's columns times its strengths and its region."""
        pieces: list[Tensor] = []
        channel = 1 if layer.kind == "conv" else -1
        for (begin, end), one in zip(joined.columns, acting, strict=True):
            piece = inner.narrow(channel, begin, end - begin) * self._per_row(one.strengths, inner)
            pieces.append(piece if one.mask is None else piece * one.mask)
        return torch.cat(pieces, channel)

    def _prepare(self, layer: Layer, parts: tuple[Part, ...], like: Tensor) -> _Joined:
        key = (parts, like.device, like.dtype, torch.is_inference_mode_enabled())
        found = self._joined.get(key)
        if found is None:
            downs: list[Tensor] = []
            ups: list[Tensor] = []
            columns: list[tuple[int, int]] = []
            begin = 0
            for part in parts:
                down, up = part.match.update.products(layer, like)
                if part.match.rows is not None:  # a part of a fused layer: zeros elsewhere
                    start, length = part.match.rows
                    up = F.pad(up, (0, 0, start, layer.shape[0] - start - length))
                downs.append(down)
                ups.append(up)
                columns.append((begin, begin + down.shape[0]))
                begin += down.shape[0]
            found = self._joined.keep(key, _Joined(torch.cat(downs), torch.cat(ups, 1), tuple(columns)))
        return found

    def _per_row(self, strengths: tuple[float, ...], like: Tensor) -> float | Tensor:
        """One number, or one per chunk of the batch, shaped ``b 1 …``."""
        if len(strengths) == 1:
            return strengths[0]
        rows = like.shape[0] // len(strengths)
        return self._kept(strengths, like).repeat_interleave(rows).reshape(-1, *[1] * (like.ndim - 1))

    def _kept(self, numbers: tuple[float, ...], like: Tensor) -> Tensor:
        """Numbers as a tensor; kept, as making one waits for the device."""
        key = (numbers, like.device, like.dtype)
        found = self._vectors.get(key)
        return (
            self._vectors.keep(key, torch.tensor(numbers, dtype=like.dtype).to(like.device)) if found is None else found
        )
