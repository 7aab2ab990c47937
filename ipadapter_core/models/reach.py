"""What of a base model an adapter family serves: declared by the family, read when image keys and values are made, and by the doors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from .sites import ModelLayout
from .unet import down_up_middle


@dataclass(frozen=True, slots=True)
class Reach:
    """Which sites an adapter's layers serve, what they attend with, and where the result is added.

    ``sites`` gives the index of the site that the i-th layer of a file serves. ``query`` is the model's query as its layer
    projects it (UNets), after the model's norm and before any rotation, or ``raw``, before a norm that follows. The result
    is added where the attention of the text ends, before the output projection, or to the ``residual`` stream behind the
    whole block. ``span`` are the tokens that ask: those of the picture, or all of the stream that the block's attention
    computes, text included.

    ``text_wide``: image tokens are as wide as the text's; else only the layers' channels tell whether a file fits.
    ``own_keys``: the picture's tokens attend to themselves and to the image's together, in one softmax (SD3.5).
    ``gated``: the result is multiplied by what a layer makes of the block's conditioning in every call (Anima).
    ``timed``: image keys and values depend on the timestep. ``block_by_block``: they are too many to keep for all sites at
    once and are made anew where they are needed; only the tokens are kept.
    """

    sites: Callable[[ModelLayout], tuple[int, ...]] = down_up_middle
    query: Literal["projected", "normed", "raw"] = "projected"
    join: Literal["attention", "residual"] = "attention"
    span: Literal["image", "all"] = "image"
    timed: bool = False
    text_wide: bool = True
    own_keys: bool = False
    gated: bool = False
    block_by_block: bool = False

    @property
    def resident(self) -> bool:
        """Whether the adapter's weights are used while sampling, so that they must be on the device then."""
        return self.timed or self.gated


def every(layout: ModelLayout) -> tuple[int, ...]:
    """One layer for every site, in execution order."""
    return tuple(range(len(layout.sites)))


def sites_in(*groups: str) -> Callable[[ModelLayout], tuple[int, ...]]:
    """One layer for every site of these groups of blocks, in execution order."""
    return partial(_in_groups, frozenset(groups))


def _in_groups(groups: frozenset[str], layout: ModelLayout) -> tuple[int, ...]:
    return tuple(i for i, site in enumerate(layout.sites) if site.group in groups)
