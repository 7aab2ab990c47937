"""Halves of pictures compared by their subjects: what a mask let in, and what it kept.

The subject is cut from its plain background as ``judge`` does, set on grey, and the other half is blanked before the world's
image encoder looks, so that neither the background nor what stands beside it counts.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import math
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features import CLIP_MEAN, CLIP_STD
from .judge import subject
from .world import World

GREY = 0.5


class Half(Enum):
    """A half of a picture, as columns of pixels or patches."""

    LEFT = 0
    RIGHT = 1

    def of(self, grid: Tensor) -> Tensor:
        """The half's columns of a tensor whose last dimension is x."""
        return grid.chunk(2, -1)[self.value]


def right_half_mask(side: int) -> Tensor:
    """A mask ``side side`` that lets the image into the right half alone."""
    mask = torch.zeros(side, side)
    Half.RIGHT.of(mask).fill_(1)
    return mask


def describe_half(world: World, images: Tensor, half: Half) -> Tensor:
    """Penultimate patch tokens of the subject's ``half`` in images ``b 3 y x`` (0..1), ``b f``."""
    mask = subject(images)
    shown = torch.full_like(images, GREY)
    half.of(shown).copy_(half.of(images * mask + GREY * (1 - mask)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    tokens = world.encoder.encode((shown - mean) / std).penultimate[:, 1:]
    side = math.isqrt(tokens.shape[1])
    return half.of(tokens.unflatten(1, (side, side)).movedim(-1, 1)).flatten(1)


def half_similarity(world: World, half: Half, pictures: Tensor, others: Tensor, among: Tensor) -> float:
    """Mean similarity of each picture's ``half`` to that of its own of the ``others``; 0 is that of two of ``among`` by chance.

    It is a cosine of features less their mean over the pictures ``among``.
    """
    average = describe_half(world, among, half).mean(0)
    a, b = (describe_half(world, images, half) - average for images in (pictures, others))
    return F.cosine_similarity(a, b).mean().item()
