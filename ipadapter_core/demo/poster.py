"""The demo's style: a poster of four shades of blue ink on cream paper, in coarse dots; how it is printed and recognised."""

from __future__ import annotations

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..generate import to_pillow
from ..images.files import to_tensor

PAPER, INK = (252, 238, 205), (24, 36, 104)
"""What light and dark become."""
TONES, BLOCK = 4, 2
"""Shades between ink and paper, and the side of a print's dots in pixels."""


def as_poster(image: Image.Image) -> Image.Image:
    """A picture as a print of a few shades of one ink, in coarse dots."""
    size = image.width // BLOCK, image.height // BLOCK
    grey = ImageOps.autocontrast(image.convert("L").resize(size, Image.Resampling.BOX), cutoff=1)
    shades = grey.point([round(value * (TONES - 1) / 255) * 255 // (TONES - 1) for value in range(256)])
    return ImageOps.colorize(shades, INK, PAPER).resize(image.size, Image.Resampling.NEAREST)


def posters(images: Tensor) -> Tensor:
    """Prints of images ``b 3 y x`` in 0..1."""
    prints = [to_tensor(as_poster(to_pillow(image.permute(1, 2, 0).clamp(0, 1)))) for image in images]
    return torch.stack(prints).permute(0, 3, 1, 2)


def off_the_inks(images: Tensor) -> Tensor:
    """Mean distance of each picture's pixels to the mixtures of ink and paper, ``b``; 0 for a poster."""
    ink, paper = torch.tensor(INK) / 255, torch.tensor(PAPER) / 255
    pixels, across = images.permute(0, 2, 3, 1) - ink, paper - ink
    share = ((pixels @ across) / (across @ across)).clamp(0, 1)
    return (pixels - share[..., None] * across).square().sum(-1).sqrt().mean((1, 2))
