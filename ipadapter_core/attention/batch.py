"""Values that belong to latents one by one: stretched to a batch, or to a window of an animation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Frames:
    """Which latents of a longer animation a call sees (AnimateDiff's context window): their numbers out of ``count``."""

    numbers: tuple[int, ...]
    count: int


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
