"""Values that belong to latents one by one: stretched to a batch, or to a window of an animation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

WINDOWS_KEPT = 64
"""How many values made for windows of an animation are kept: some hundred frames in windows of sixteen, and their levels."""


@dataclass(frozen=True, slots=True)
class Frames:
    """Which latents of a longer animation a call sees (AnimateDiff's context window): their numbers out of ``count``."""

    numbers: tuple[int, ...]
    count: int


Key = TypeVar("Key")


def keep(cache: dict[Key, Tensor], key: Key, value: Tensor, limit: int = WINDOWS_KEPT) -> Tensor:
    """Put a value into a cache that forgets its oldest entries beyond ``limit``; returns the value."""
    for oldest in list(cache)[: max(len(cache) - limit + 1, 0)]:  # a list: threads share the cache
        cache.pop(oldest, None)
    cache[key] = value
    return value


def fit_batch(rows: Tensor, latents: int, frames: Frames | None = None, dim: int = 0) -> Tensor:
    """One row per latent of this call along ``dim``: surplus ones are dropped, missing ones repeat the last."""
    count = latents if frames is None else frames.count
    size = rows.shape[dim]
    if size < count:
        last = rows.narrow(dim, size - 1, 1)
        rows = torch.cat([rows, last.repeat_interleave(count - size, dim)], dim)
    elif size > count and frames is None:
        rows = rows.narrow(dim, 0, count)
    if frames is None:
        return rows
    return rows.index_select(dim, torch.tensor(frames.numbers, device=rows.device))
