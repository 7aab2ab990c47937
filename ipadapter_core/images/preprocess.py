"""Pictures to an encoder's pixel values: resized, cut to a square, normalised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import (
    InvalidInputError,
)
from ..features import Crop, Framing, TakesPixels
from .pictures import Picture, as_mask, as_picture

FRAMINGS = (*get_args(Crop), "fit", "shapes", "subject")

LONGEST_STRIP = 8
"""Sides' ratio past which a picture is cut near its crop before it is resized: a 20000 x 10 strip would else become
448,000 pixels long at 224."""


FAR = 1e30
"""Values past it overflow when they are resized."""


SHAPES = ((34, 17), (29, 20), (28, 21), (24, 24), (21, 28), (20, 29), (17, 34))
"""Rows and columns of patches that PE-Core sees of a picture: near the 576 that it was trained with (sorryhyun/anima_lora,
library/vision/buckets.py)."""

SHAPED_PATCH = 14

STEPWISE = 2048
"""Longest side up to which ``subject`` first makes a picture square at that size, as the authors do; beyond it that is no other
picture, and would take gigabytes."""


def nearest_shape(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of SHAPES, in pixels, that is nearest to pictures of ``sizes`` (h, w): the sum of differences of log aspects."""

    def distance(shape: tuple[int, int]) -> float:
        return sum(abs(math.log(shape[0] / shape[1]) - math.log(h / w)) for h, w in sizes)

    rows, columns = min(SHAPES, key=distance)
    return rows * SHAPED_PATCH, columns * SHAPED_PATCH


def preprocess(
    images: Picture,
    encoder: TakesPixels,
    *,
    crop: Framing = "center",
    mask: Picture | None = None,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """Turn images into an encoder's pixel values ``b 3 y x`` (float32, image_size on a side, mean 0 and std 1).

    Args:
        images: ``b h w c`` in 0..1 with 1 (grey), 3 or 4 channels; what alpha hides becomes the encoder's mean
            colour, that is 0 after normalisation: nothing to see. One in another form, see ``Picture``, is a batch of its own.
        crop: which square is kept. ``center``: as CLIP's own processor; ``top``/``bottom`` move the square along the
            long side of a tall image, ``left``/``right`` along that of a wide one (centred otherwise). ``pad`` keeps
            all of the image and fills up with the mean colour, ``stretch`` keeps all and ignores the aspect ratio.
            As some families were trained: ``fit`` keeps all, fills up with black, which is also what masks and alpha
            leave, and resizes bilinearly; ``subject`` stretches, or cuts what a mask or alpha shows out and puts it in a
            white square; ``shapes`` stretches to the nearest of SHAPES, bilinearly and without antialiasing.
        mask: ``b h w`` or ``1 h w`` in 0..1 of the images' size; outside it the image becomes the mean colour.
        shape: (y, x) that ``shapes`` stretches to, for pictures that must become as large as others.

    Resizing is bicubic with antialiasing, within 2/255 of transformers' CLIPImageProcessor for ``center``.
    Images whose sides differ by more than LONGEST_STRIP are first cut near the square that is kept.
    Raises InvalidInputError for images or masks of another kind.
    """
    if crop not in FRAMINGS:
        raise InvalidInputError(f"crop is {crop!r}; it must be one of {', '.join(FRAMINGS)}")
    images, mask = _batched(images, as_picture, 3), None if mask is None else _batched(mask, as_mask, 2)
    _check_images(images)
    pixels = images.detach().to(torch.float32).permute(0, 3, 1, 2).clamp(0, 1)
    seen = None if mask is None else _check_mask(mask, images)[:, None].to(pixels)
    if pixels.shape[1] == 4:
        seen = pixels[:, 3:] if seen is None else pixels[:, 3:] * seen
        pixels = pixels[:, :3]
    pixels = pixels.expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (encoder.mean, encoder.std))
    size = encoder.image_size
    if crop == "subject":
        whole = [_subject(one, None if seen is None else seen[i % len(seen)], size) for i, one in enumerate(pixels)]
        return (torch.stack(whole) - mean) / std
    if seen is not None:
        pixels = pixels * seen + (mean * (1 - seen) if crop != "fit" else 0)
    if crop == "shapes":
        shape = shape or nearest_shape([(pixels.shape[-2], pixels.shape[-1])])
        return F.interpolate((pixels - mean) / std, shape, mode="bilinear")
    if crop == "stretch":
        return (_resize(pixels, size, size) - mean) / std
    if crop == "pad" or crop == "fit":
        h, w = pixels.shape[-2:]
        inner = [max(1, round(size * side / max(h, w))) for side in (h, w)]
        pixels = _resize(pixels, inner[0], inner[1], "bicubic" if crop == "pad" else "bilinear")
        top, left = ((size - side) // 2 for side in inner)
        border = (left, size - inner[1] - left, top, size - inner[0] - top)
        return F.pad((pixels - mean) / std, border) if crop == "pad" else (F.pad(pixels, border) - mean) / std
    return (_crop(pixels, size, crop) - mean) / std


def _batched(picture: Picture, read: Callable[[Picture], Tensor], axes: int) -> Tensor:
    """A tensor as it is, and anything else with a batch dimension."""
    given = read(picture)
    return given[None] if given.ndim == axes and not isinstance(picture, Tensor) else given


def preprocess_as_host(images: Tensor, encoder: TakesPixels, *, mask: Tensor | None = None) -> Tensor:
    """Pixel values ``b 3 y x`` as ComfyUI's ``clip_preprocess`` makes them, see Rules.host_pixels.

    The short side is resized in one bicubic pass, the centre cut out, values clipped to 0..1 (HDR pictures too) and rounded
    to 8 bits. A mask ``b|1 h w`` of any size is cut and resized apart and multiplies the normalised pixels; NaN in it is 0.
    """
    _check_images(images, clipped=True)
    check_aspect(images)
    size = encoder.image_size
    pixels = images.detach().to(torch.float32)[..., :3].movedim(-1, 1).expand(-1, 3, -1, -1)
    pixels = pixels.clamp(-FAR, FAR)
    h, w = pixels.shape[-2:]
    if (h, w) != (size, size):
        scale = size / min(h, w)
        pixels = F.interpolate(pixels, (round(scale * h), round(scale * w)), mode="bicubic", antialias=True)
        top, left = ((side - size) // 2 for side in pixels.shape[-2:])
        pixels = pixels[..., top : top + size, left : left + size]
    pixels = (255.0 * pixels).clamp(0, 255).round() / 255.0
    mean, std = (torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (encoder.mean, encoder.std))
    pixels = (pixels - mean) / std
    if mask is None:
        return pixels
    mask = mask.nan_to_num(0, 1, 0)
    if tuple(mask.shape[-2:]) != (size, size):
        mask = F.interpolate(center_square(mask[:, None]), (size, size), mode="bicubic", antialias=True)[:, 0]
    return pixels * mask[:, None].to(pixels)


def center_square(pixels: Tensor) -> Tensor:
    """The largest square in the middle of ``b c h w``."""
    h, w = pixels.shape[-2:]
    side = min(h, w)
    top, left = round((h - side) / 2), round((w - side) / 2)
    return pixels[..., top : top + side, left : left + side]


def _crop(pixels: Tensor, size: int, crop: Crop) -> Tensor:
    """Resize the short side to ``size``, then cut a square out of the long side."""
    h, w = pixels.shape[-2:]
    tall = h > w
    position = {"top": 0.0, "bottom": 1.0} if tall else {"left": 0.0, "right": 1.0}
    at = position.get(crop, 0.5)
    dim = -2 if tall else -1
    short, long = min(h, w), max(h, w)
    if long > LONGEST_STRIP * short:
        pixels = pixels.narrow(dim, round((long - 2 * short) * at), 2 * short)
        long = 2 * short
    long = size * long // short
    pixels = _resize(pixels, long, size) if tall else _resize(pixels, size, long)
    return pixels.narrow(dim, int((long - size) * at), size)


def _subject(pixels: Tensor, seen: Tensor | None, size: int) -> Tensor:
    """One picture ``3 h w`` as a square of ``size``: stretched, or what is ``seen`` of it (``1 h w``) cut out and put on white.

    As InstantCharacter has its references (app.py and pipeline.py there).
    """
    if seen is not None and not bool((seen == 1).all()):
        pixels = pixels * seen + (1 - seen)
        shown = seen[0] >= 0.5
        if bool(shown.any()):
            rows, columns = (torch.nonzero(shown.any(axis)).flatten() for axis in (1, 0))
            pixels = pixels[:, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
        h, w = pixels.shape[-2:]
        if max(h, w) > STEPWISE:
            h, w = (max(1, side * STEPWISE // max(h, w)) for side in (h, w))
            pixels = _resize(pixels[None], h, w)[0]
        top, left = (max(0, w - h) // 2, max(0, h - w) // 2)
        side = max(h, w)
        pixels = F.pad(pixels, (left, side - w - left, top, side - h - top), value=1.0)
    h, w = pixels.shape[-2:]
    if h != w and max(h, w) <= STEPWISE:
        pixels = _resize(pixels[None], max(h, w), max(h, w))[0]
    return _resize(pixels[None], size, size)[0]


def _resize(pixels: Tensor, h: int, w: int, mode: str = "bicubic") -> Tensor:
    # one axis after the other, each clamped, as Pillow does it: overshoot at hard edges must not pass from x to y
    for shape in ((pixels.shape[-2], w), (h, w)):
        pixels = F.interpolate(pixels, shape, mode=mode, antialias=True).clamp(0, 1)
    return pixels


def check_finite(images: Tensor) -> tuple[float, float]:
    """Lowest and highest value. Raises InvalidInputError if there is NaN or infinity among them."""
    if not images.numel():
        return 0.0, 0.0
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise InvalidInputError("the images hold NaN or infinite values; look at the node or file they come from")
    return low, high


MOST_ASPECT = 200
"""Long side to short side of a picture that is resized before it is cut: a line of 16,384 x 1 pixels would take 10 GB."""


def check_aspect(images: Tensor) -> None:
    """Raise InvalidInputError for pictures ``b h w c`` that are lines."""
    h, w = images.shape[1:3]
    if max(h, w) > MOST_ASPECT * min(h, w):
        raise InvalidInputError(
            f"a picture of {w}x{h} is a line: its sides may differ {MOST_ASPECT}-fold at most; cut it before"
        )


def _check_images(images: Tensor, *, clipped: bool = False) -> None:
    shape = tuple(images.shape)
    if images.ndim != 4:
        hint = "; add the batch dimension with image[None]" if images.ndim == 3 else ""
        raise InvalidInputError(f"images must have shape (b, h, w, c), got {shape}{hint}")
    if shape[3] not in (1, 3, 4):
        hint = "; channels come last: images.permute(0, 2, 3, 1)" if shape[1] in (1, 3, 4) else ""
        raise InvalidInputError(f"images must have 1, 3 or 4 channels, got shape {shape}{hint}")
    if shape[0] == 0:
        raise InvalidInputError(f"the batch of images is empty (shape {shape}); give at least one image")
    if 0 in shape:
        raise InvalidInputError(f"the images have no pixels (shape {shape})")
    if not images.dtype.is_floating_point:
        raise InvalidInputError(
            f"images must be floating point in 0..1, got {images.dtype}; divide 8-bit images by 255"
        )
    low, high = check_finite(images)
    if not clipped and (low < -0.5 or high > 2):
        raise InvalidInputError(
            f"images must lie in 0..1, got values from {low:.3g} to {high:.3g}; rescale or clamp them"
        )


def _check_mask(mask: Tensor, images: Tensor) -> Tensor:
    b, h, w = images.shape[:3]
    shape = tuple(mask.shape)
    if mask.ndim != 3 or shape[0] not in (1, b):
        raise InvalidInputError(f"the mask must have shape (1, h, w) or ({b}, h, w), got {shape}")
    if shape[1:] != (h, w):
        raise InvalidInputError(
            f"the mask is {shape[2]}x{shape[1]} and its image {w}x{h} (width x height); they must have the same size"
        )
    mask = mask.detach().to(torch.float32)
    low, high = (value.item() for value in torch.aminmax(mask))
    if not (low >= 0 and high <= 1):
        raise InvalidInputError(f"the mask must lie in 0..1, got values from {low:.3g} to {high:.3g}")
    return mask
