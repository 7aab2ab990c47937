"""An independent judge of pictures: colour and shape statistics, no network, nothing shared with any encoder.

It tells the subject from its plain background by the colours at the border, then compares where the subject is (its
silhouette), what colours it has (a histogram) and where they are (a coarse grid).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .pictures import BACKGROUNDS, colour_table, recolour

GRID = 8
BINS = 4
SUBJECT_DISTANCE = 0.2
"""Difference of a colour channel beyond which a pixel differs from the background."""


def border_colour(images: Tensor) -> Tensor:
    """Median colour ``b 3`` of the two outermost pixels of ``b 3 y x`` images: the background."""
    edge = torch.ones(images.shape[-2:], dtype=torch.bool)
    edge[2:-2, 2:-2] = False
    return images[:, :, edge].median(-1).values


def named_background(images: Tensor) -> Tensor:
    """Index of the named background colour nearest to each picture's border."""
    return torch.cdist(border_colour(images), colour_table()).argmin(1)


def subject(images: Tensor) -> Tensor:
    """Soft mask ``b 1 y x`` of what differs from the background."""
    difference = (images - border_colour(images)[:, :, None, None]).abs().amax(1, keepdim=True)
    return ((difference - SUBJECT_DISTANCE / 2) / SUBJECT_DISTANCE).clamp(0, 1)


def describe(images: Tensor) -> Tensor:
    """Feature vector of each picture's subject ``b f``: three parts of unit length each, so that each counts a third."""
    images = F.avg_pool2d(images, 5, 1, 2, count_include_pad=False)  # grain is no shape
    mask = subject(images)
    silhouette = F.adaptive_avg_pool2d(mask, GRID).flatten(1)
    weight = F.adaptive_avg_pool2d(mask, GRID).clamp(min=1e-3)
    # colours of the subject where it is, mid grey elsewhere
    colours = (F.adaptive_avg_pool2d(images * mask, GRID) / weight - 0.5) * (weight > 0.2)
    parts = [silhouette - silhouette.mean(1, keepdim=True), colours.flatten(1), _histogram(images, mask).sqrt()]
    return torch.cat([F.normalize(part, dim=1) for part in parts], 1) / len(parts) ** 0.5


def _histogram(images: Tensor, mask: Tensor) -> Tensor:
    """Share of the subject in each of 4×4×4 colours, softly binned, ``b 64``."""
    centres = (torch.arange(BINS) + 0.5) / BINS
    near = (1 - (images[..., None] - centres).abs() * BINS).clamp(min=0)  # b 3 y x bins
    near = near / near.sum(-1, keepdim=True).clamp(min=1e-6)
    joint = torch.einsum("byxr,byxg,byxe,byx->brge", near[:, 0], near[:, 1], near[:, 2], mask[:, 0]).flatten(1)
    return joint / joint.sum(1, keepdim=True).clamp(min=1e-6)


def similarity(results: Tensor, references: Tensor) -> Tensor:
    """Similarity of every result to every reference, ``r s`` in about -1..1; a mirrored subject counts as the same."""
    described = describe(references)
    return torch.maximum(describe(results) @ described.T, describe(results.flip(-1)) @ described.T)


def with_decoys(references: Tensor) -> Tensor:
    """References ``r 3 y x`` and behind them the same ones in two wrong hues each, ``3r 3 y x``."""
    opaque = torch.cat([references, torch.ones_like(references[:, :1])], 1)
    turns = [torch.full((len(references),), turn * 2 * math.pi / 3) for turn in (1, 2)]
    return torch.cat([references, *(recolour(opaque, turn)[:, :3] for turn in turns)])


def background_names(images: Tensor) -> list[str]:
    """Names of the pictures' backgrounds."""
    names = list(BACKGROUNDS)
    return [names[i] for i in named_background(images).tolist()]
