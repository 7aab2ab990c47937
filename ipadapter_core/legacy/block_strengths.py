"""How x-flux-comfyui spreads two strengths over the blocks of a model."""

from __future__ import annotations

import math
from typing import Literal, get_args

Smoothing = Literal["Linear", "First half", "Second half", "Sigmoid"]
SMOOTHINGS: tuple[Smoothing, ...] = get_args(Smoothing)

DOUBLE_BLOCKS = 19
"""Of FLUX.1, each with a layer of an XLabs adapter."""


def strengths_of_blocks(kind: Smoothing, begin: float, end: float, blocks: int = DOUBLE_BLOCKS) -> list[float]:
    """A strength for each block, as that pack's ``smothing_type`` says.

    ``Linear`` rises over all of them; ``First half`` over the first half, then stays; ``Second half`` stays, then rises.
    ``Sigmoid`` adds a logistic curve of slope 8 over all blocks, less a half, times ``end - begin``: it begins half of that below
    ``begin`` and ends half above it, not at ``end``. Graphs were made with that.
    """
    span = end - begin
    if kind == "Sigmoid":
        return [begin + span * (1 / (1 + math.exp(-(i - blocks / 2) * 8 / blocks)) - 0.5) for i in range(blocks)]
    if kind == "Linear":
        return [begin + span * i / (blocks - 1) for i in range(blocks)]
    half = blocks // 2
    rising = [begin + span * i / (half - 1) for i in range(half)]
    return rising + [end] * (blocks - half) if kind == "First half" else [begin] * (blocks - half) + rising
