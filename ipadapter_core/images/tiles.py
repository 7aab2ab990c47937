"""Reference pictures before the encoder sees them: cut square, sharpened, disturbed, cut into tiles.

All pictures are ``b h w c`` in 0..1. The formulas, their rounding and their random numbers are those that users of
ComfyUI_IPAdapter_plus have their pictures from; a private generator leaves everybody else's random numbers alone.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..compatibility import CORRECT, Rules
from ..errors import InvalidInputError
from .preprocess import center_square, check_aspect, check_finite

Interpolation = Literal["LANCZOS", "BICUBIC", "HAMMING", "BILINEAR", "BOX", "NEAREST"]
Position = Literal["top", "bottom", "left", "right", "center", "pad"]

SIDE = 224
"""Pixels on a side of what most encoders look at."""


def prepare_square(
    images: Tensor,
    side: int = SIDE,
    *,
    interpolation: Interpolation = "LANCZOS",
    position: Position = "center",
    sharpening: float = 0.0,
) -> Tensor:
    """The square at ``position`` (or everything on a black square: ``pad``), resized with Pillow, then sharpened."""
    check_pictures(images)
    pixels = images.movedim(-1, 1)
    h, w = pixels.shape[-2:]
    if position == "pad":
        x, y = max(0, h - w) // 2, max(0, w - h) // 2
        pixels = F.pad(pixels, (x, x, y, y))
    else:
        square = min(h, w)
        x = {"left": 0, "right": w - square}.get(position, (w - square) // 2)
        y = {"top": 0, "bottom": h - square}.get(position, (h - square) // 2)
        pixels = pixels[..., y : y + square, x : x + square]
    pixels = resize_with_pillow(pixels, side, side, interpolation)
    return sharpen(pixels, sharpening).movedim(1, -1)


def resize_with_pillow(pixels: Tensor, height: int, width: int, interpolation: Interpolation = "LANCZOS") -> Tensor:
    """``b c h w`` through 8-bit pictures."""
    if interpolation not in get_args(Interpolation):
        raise InvalidInputError(
            f"interpolation is {interpolation!r}; choose one of: {', '.join(get_args(Interpolation))}"
        )
    method = Image.Resampling[interpolation]
    resized: list[Tensor] = []
    for picture in pixels.detach().to("cpu", torch.float32):
        eight_bits = picture.mul(255).byte().movedim(0, -1).squeeze(-1).numpy()
        array = np.asarray(Image.fromarray(eight_bits).resize((width, height), method))
        resized.append(torch.from_numpy(array.reshape(height, width, -1).copy()).movedim(-1, 0).float() / 255)
    return torch.stack(resized)


def sharpen(pixels: Tensor, amount: float) -> Tensor:
    """Contrast-adaptive sharpening of ``b c h w``, 0 (unchanged) to 1.

    Source: AMD FidelityFX CAS; https://github.com/Jamy-L/Pytorch-Contrast-Adaptive-Sharpening.
    """
    if amount <= 0:
        return pixels
    h, w = pixels.shape[-2:]
    padded = F.pad(pixels, (1, 1, 1, 1))
    around = [[padded[..., y : y + h, x : x + w] for x in range(3)] for y in range(3)]
    cross = torch.stack([around[0][1], around[1][0], around[1][1], around[1][2], around[2][1]])
    corners = torch.stack([around[0][0], around[0][2], around[2][0], around[2][2]])
    low = cross.amin(0).clamp(min=0) + corners.amin(0).clamp(min=0)
    high = cross.amax(0).clamp(max=1) + corners.amax(0).clamp(max=1)
    # reciprocals, as the reference has them: another rounding can become another 8-bit value later
    weight = -torch.sqrt(torch.reciprocal(high) * torch.minimum(low, 2 - high)) * (amount * (1 / 5 - 1 / 8) + 1 / 8)
    plus = around[0][1] + around[1][0] + around[1][2] + around[2][1]
    return torch.nan_to_num((plus * weight + around[1][1]) * torch.reciprocal(1 + 4 * weight)).clamp(0, 1)


MOST_TILES = 16
"""Of one picture; a longer strip would bury all other references, and the text."""


def square_tiles(image: Tensor) -> list[tuple[slice, slice]]:
    """Rows and columns of squares that together cover ``1 h w c``, evenly spread along its long side; they overlap.

    A tenth of a square more than fits is cut off instead. Raises InvalidInputError for more than MOST_TILES.
    """
    h, w = image.shape[1:3]
    side, long = min(h, w), max(h, w)
    starts = covering(long, side)
    if len(starts) > MOST_TILES:
        raise InvalidInputError(
            f"a reference of {w}x{h} would become {len(starts)} tiles, at most {MOST_TILES} are made; cut it before"
        )
    short = slice(0, side)
    spans = [slice(start, start + side) for start in starts]
    return [(span, short) if h > w else (short, span) for span in spans]


def split_tiles(image: Tensor, count: int) -> list[Tensor]:
    """``1 h w c`` in count x count parts, row by row; what division leaves over at the right and bottom is dropped."""
    h, w = (max(1, side // count) for side in image.shape[1:3])
    return [image[:, y * h : (y + 1) * h, x * w : (x + 1) * w] for y in range(count) for x in range(count)]


def tiles_in_place(
    images: Tensor, mask: Tensor | None = None, sharpening: float = 0.0, rules: Rules = CORRECT
) -> tuple[list[Tensor], list[Tensor]]:
    """Parts of the references ``b s s c`` and the region of the picture ``m y x`` that each steers."""
    return (region_tiles if rules.crossing_tiles else placed_tiles)(images, mask, sharpening)


def region_tiles(
    images: Tensor, mask: Tensor | None = None, sharpening: float = 0.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Parts of the references and the region mask of each: 256 on a side, at most four in the longer direction.

    A nearly square reference becomes two by two parts. Returns parts ``b 256 256 c`` and masks ``m y x`` that together
    cover the picture (or ``mask`` ``m h w``).
    """
    check_pictures(images)
    tile = 256
    h, w = images.shape[1:3]
    region = torch.ones(1, h, w) if mask is None else mask.detach().to("cpu", torch.float32)
    region = _resize_bicubic(region[:, None] if region.ndim == 3 else region[None, None], h, w)
    pixels = images.detach().cpu().movedim(-1, 1)
    if 0.75 < h / w < 1.33:
        pixels, region = center_square(pixels), center_square(region)
        height = width = 2 * tile
    else:
        height, width = (tile, int(tile * w / h)) if h < w else (int(tile * h / w), tile)
    pixels = resize_with_pillow(pixels, height, width)
    region = _resize_bicubic(region, height, width)
    if h / w > 4 or h / w < 0.25:
        size = (tile, 4 * tile) if h < w else (4 * tile, tile)
        pixels, region = (_center_crop(t, *size) for t in (pixels, region))
    pixels = sharpen(pixels, sharpening).movedim(1, -1)
    region = region[:, 0]

    height, width = pixels.shape[1:3]
    rows, columns = math.ceil(height / tile), math.ceil(width / tile)
    down, right = (
        tile - max(0, (count * tile - side) / max(count - 1, 1)) for count, side in ((rows, height), (columns, width))
    )
    tiles: list[Tensor] = []
    masks: list[Tensor] = []
    for row in range(rows):
        for column in range(columns):
            y, x = int(row * down), int(column * right)
            part = (slice(None), slice(y, y + tile), slice(x, x + tile))
            inside = torch.zeros(len(region), height, width)
            inside[part] = region[part]
            tiles.append(pixels[part])
            masks.append(inside)
    return tiles, masks


def placed_tiles(
    images: Tensor, mask: Tensor | None = None, sharpening: float = 0.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Squares ``b s s c`` that cover the references, and for each the region ``m h w`` of the picture that is its own.

    One square on the short side, of a nearly square reference two. Where squares overlap their regions fade into each
    other, so that everywhere they add up to 1 (or to ``mask`` ``m y x``, stretched over the reference).
    """
    check_pictures(images)
    h, w = images.shape[1:3]
    side = min(h, w) // (2 if max(h, w) < NEARLY_SQUARE * min(h, w) else 1)
    if side == 0 or max(h, w) > MOST_SQUARES * side:
        raise InvalidInputError(
            f"a picture of {w}x{h} cannot be cut into at most {MOST_SQUARES} squares a row; cut it before"
        )
    pixels = sharpen(images.detach().to("cpu", torch.float32).movedim(-1, 1), sharpening).movedim(1, -1)
    region = torch.ones(1, h, w)
    if mask is not None:
        given = mask.detach().to("cpu", torch.float32).reshape(-1, 1, *mask.shape[-2:])
        region = F.interpolate(given, (h, w), mode="bilinear", antialias=True)[:, 0]
    tiles: list[Tensor] = []
    regions: list[Tensor] = []
    for top, rows in _spans(h, side):
        for left, columns in _spans(w, side):
            tiles.append(pixels[:, top : top + side, left : left + side])
            regions.append(region * rows[:, None] * columns)
    return tiles, regions


def covering(length: int, side: int) -> list[int]:
    """Where spans of ``side`` that together cover ``length`` start, evenly spread; they overlap.

    A tenth of a span more than fits is cut off instead, at both ends.
    """
    count = max(1, math.ceil(length / side - 0.1))
    spare = length - side
    return [round(spare * i / (count - 1)) for i in range(count)] if count > 1 else [spare // 2]


MOST_BYTES = 2**33
"""Of the masks of all tiles together."""
NEARLY_SQUARE, MOST_SQUARES = 4 / 3, 16


def _spans(length: int, side: int) -> list[tuple[int, Tensor]]:
    """Where spans start that cover ``length``, and how much of each number is each one's own."""
    starts = covering(length, side)
    at = torch.arange(length) + 0.5
    rise = [torch.ones(length)]
    for before, start in pairwise(starts):  # a neighbour fades in where they overlap, or over a gap of what is cut off
        low, high = sorted((start, before + side))
        rise.append(((at - low) / max(high - low, 0.01)).clamp(0, 1))
    rise.append(torch.zeros(length))
    return [(start, rise[i] - rise[i + 1]) for i, start in enumerate(starts)]


def masked_tiles(image: Tensor, short_side_tiles: int, weight: float) -> tuple[Tensor, Tensor]:
    """The tiles of IPAdapterTilesMasked, ``t y x c``, and their masks ``t h w`` filled with the tiles' weights.

    Where there are several rows and columns, larger tiles of the whole picture with weight 1 come first.
    """
    check_pictures(image)
    tile, count = SIDE, max(short_side_tiles, 1)
    h, w = image.shape[1:3]
    height, width = (h * tile * count // w, tile * count) if w < h else (tile * count, w * tile * count // h)
    if 4 * height * width * (height // tile + 1) * (width // tile + 1) > MOST_BYTES:
        raise InvalidInputError(
            f"a picture of {w}x{h} with {count} tiles along the short side needs too many masks of {width}x{height}; use fewer tiles"
        )
    pixels = F.interpolate(image.movedim(-1, 1), (height, width), mode="bicubic").movedim(1, -1)
    counts: list[int] = []
    starts: list[int] = []
    for side in (height, width):
        whole = side // tile
        enlarge = side % tile >= tile // 4
        counts.append(whole + enlarge)
        starts.append(0 if enlarge else (side - tile * whole) // 2)
    if 1 in counts:
        weight = 1.0
    tiles: list[Tensor] = []
    masks: list[Tensor] = []
    for row in range(counts[0]):
        for column in range(counts[1]):
            spans: list[slice] = []
            for index, start, side in ((row, starts[0], height), (column, starts[1], width)):
                begin = index * tile + start
                end = begin + tile + start
                spans.append(slice(side - tile, side) if end > side else slice(begin, end))
            mask = torch.zeros(height, width)
            mask[spans[0], spans[1]] = weight
            tiles.append(pixels[0, spans[0], spans[1]])
            masks.append(mask)
    parts, regions = torch.stack(tiles), torch.stack(masks)
    if 1 not in counts:
        whole_parts, whole_regions = masked_tiles(pixels, 1, 1.0)
        whole_parts = F.interpolate(whole_parts.movedim(-1, 1), parts.shape[1:3], mode="bicubic").movedim(1, -1)
        whole_regions = F.interpolate(whole_regions[:, None], regions.shape[1:], mode="bicubic")[:, 0]
        parts, regions = torch.cat([whole_parts, parts]), torch.cat([whole_regions, regions])
    return parts, regions


def _resize_bicubic(pixels: Tensor, height: int, width: int) -> Tensor:
    if tuple(pixels.shape[-2:]) == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)


def _center_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    h, w = pixels.shape[-2:]
    top, left = round((h - height) / 2), round((w - width) / 2)
    return pixels[..., top : top + height, left : left + width]


def check_pictures(images: Tensor) -> None:
    if images.ndim != 4 or 0 in images.shape or images.shape[-1] not in (1, 3, 4):
        raise InvalidInputError(
            f"pictures have the shape (count, height, width, 1, 3 or 4 channels), got {tuple(images.shape)}"
        )
    check_aspect(images)
    check_finite(images)
