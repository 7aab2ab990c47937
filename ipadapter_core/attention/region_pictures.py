"""A region mask as the layers of a model see it: over the picture, in the cells of every token grid."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..models.grids import Size, TokenGrid, TokenRule
from .map_pictures import BACK, FAINT, INK, Floats
from .masks import RegionMask

PANEL = 288
"""Longer side of a panel, in pixels."""
GAP, LABEL = 12, 24
LEVELS = 4
"""Times that a UNet halves its latent, at most."""
INSIDE = np.array((86.0, 180.0, 233.0))
LEAST_CELL = 5
"""Pixels of a token from which on lines are drawn between them."""


def grids_of(rule: TokenRule, latent: Size) -> tuple[TokenGrid, ...]:
    """The different grids that sites of a model can have on a latent, finest first."""
    levels = ((-(-latent[0] // 2**n), -(-latent[1] // 2**n)) for n in range(LEVELS))
    found = (rule.grid(latent, rows * columns) for rows, columns in levels)
    return tuple(dict.fromkeys(grid for grid in found if grid is not None))


def draw_region(
    mask: RegionMask, latent: Size, grids: tuple[TokenGrid, ...], picture: Image.Image | None = None, number: int = 0
) -> Image.Image:
    """One panel for each grid: the more of a token lies inside, the bluer. ``picture`` is what is under it; grey without one.

    ``number`` says which of several masks.
    """
    longest = max(latent)
    size = max(1, round(PANEL * latent[1] / longest)), max(1, round(PANEL * latent[0] / longest))
    under = Image.new("RGB", size, (120, 120, 120)) if picture is None else picture.convert("RGB").resize(size)
    dark = np.asarray(under, dtype=np.float64) * 0.6
    sheet = Image.new("RGB", (GAP + len(grids) * (size[0] + GAP), size[1] + LABEL + 2 * GAP), BACK)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for i, grid in enumerate(grids):
        rows = mask.grid(latent, None, grid, torch.zeros(1), number + 1)
        shares: Floats = rows[min(number, len(rows) - 1)].reshape(grid.rows, grid.columns).double().numpy()
        cells = _image(shares * 255).resize(size, Image.Resampling.NEAREST)
        share = 0.7 * np.asarray(cells, dtype=np.float64)[..., None] / 255
        panel = _image(dark * (1 - share) + INSIDE * share)
        _lines(ImageDraw.Draw(panel), grid, size)
        left = GAP + i * (size[0] + GAP)
        sheet.paste(panel, (left, GAP))
        inside = f"{100 * float(shares.mean()):.0f} % inside"
        pen.text((left, size[1] + GAP + 6), f"{grid.rows} by {grid.columns} tokens", fill=INK, font=font)
        pen.text((left + size[0], size[1] + GAP + 6), inside, fill=FAINT, font=font, anchor="ra")
    return sheet


def _image(values: Floats) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _lines(pen: ImageDraw.ImageDraw, grid: TokenGrid, size: tuple[int, int]) -> None:
    width, height = size
    if width / grid.columns < LEAST_CELL:
        return
    for column in range(1, grid.columns):
        x = round(column * width / grid.columns)
        pen.line((x, 0, x, height), fill=FAINT)
    for row in range(1, grid.rows):
        y = round(row * height / grid.rows)
        pen.line((0, y, width, y), fill=FAINT)
