"""What of a base model an adapter family serves: declared by the family, read when image keys and values are made, and by the doors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .sites import ModelLayout
from .unet import down_up_middle


@dataclass(frozen=True, slots=True)
class Reach:
    """Which sites an adapter's layers serve, what they attend with, and where the result is added.

    ``sites`` gives the index of the site that the i-th layer of a file serves. ``query`` is the model's query as its layer
    projects it (UNets), after the model's norm and before any rotation, or ``raw``, before a norm that follows. The result
    is added where the attention of the text ends, before the output projection, or to the ``residual`` stream behind the
    whole block. ``span`` are the tokens that ask: those of the picture, or all, text included. ``timed``: image keys and
    values depend on the timestep.
    """

    sites: Callable[[ModelLayout], tuple[int, ...]] = down_up_middle
    query: Literal["projected", "normed", "raw"] = "projected"
    join: Literal["attention", "residual"] = "attention"
    span: Literal["image", "all"] = "image"
    timed: bool = False


def every(layout: ModelLayout) -> tuple[int, ...]:
    """One layer for every site, in execution order."""
    return tuple(range(len(layout.sites)))
