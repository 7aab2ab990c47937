"""Reference pictures on their way to the encoder: one by one, cut into tiles, as pixel values."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..errors import InvalidInputError
from ..features import Framing, ImageEncoder
from ..images.packed import PackedEncoder
from ..images.pictures import Picture, as_mask, as_picture
from ..images.preprocess import nearest_shape, preprocess, preprocess_as_host
from ..images.tiles import square_tiles
from .options import EncodeOptions

Part = tuple[Tensor, Tensor | None]
"""A picture ``1 h w c`` that is encoded alone, and its mask ``1 h w``."""


def parts_of(
    images: Picture | Sequence[Picture], masks: Picture | Sequence[Picture | None] | None, options: EncodeOptions
) -> list[list[Part]]:
    """Every reference as the parts of it that are encoded alone: one, or with ``crop`` "tiles" its tiles."""
    singles = single_images(images)
    seen = list(zip(singles, single_masks(masks, singles), strict=True))
    if options.crop != "tiles":
        return [[one] for one in seen]
    parts = [_tiles(*one, keep_hidden=options.per_latent) for one in seen]
    lengths = [len(part) for part in parts]
    if options.per_latent and len(set(lengths)) > 1:
        raise InvalidInputError(
            f"the images of a latent each become {', '.join(map(str, lengths))} tiles; with per_latent they need as many each: "
            "give images of one shape"
        )
    return parts


def negatives_of(negative: Picture | None, count: int, options: EncodeOptions) -> list[Tensor]:
    """The negative pictures of ``count`` references, none, one, or with ``per_latent`` one each."""
    negatives = [] if negative is None else single_images(negative)
    if len(negatives) not in ((0, 1, count) if options.per_latent else (0, 1)):
        wanted = f"one or {count}" if options.per_latent else "one"
        raise InvalidInputError(f"got {len(negatives)} negative images; {wanted} can be used here")
    return negatives


@dataclass(frozen=True, slots=True)
class View:
    """How pictures become an encoder's pixels: ``framing``, and the one shape (y, x) of all where that is not the encoder's square;
    ``as_host``: by Rules.host_pixels, which know only ``center``."""

    framing: Framing
    shape: tuple[int, int] | None = None
    as_host: bool = False


def view_of(options: EncodeOptions, trained: Framing, pictures: Sequence[Tensor]) -> View:
    """How ``pictures`` ``1 h w c`` become pixels: as the user chose, else as the family was ``trained``.

    Features of one prompt have as many tokens each, so that pictures of several shapes share the one nearest to all.
    """
    framing: Framing = "center" if options.crop == "tiles" else trained if options.crop == "auto" else options.crop
    sizes = [tuple(picture.shape[1:3]) for picture in pictures]
    usable = framing == "shapes" and all(
        len(size) == 2 and min(size) > 0 for size in sizes
    )  # else preprocess() says it
    untold = options.crop == "auto" and trained != "center"  # the old pack knows no such family
    return View(
        framing,
        nearest_shape([(h, w) for h, w in sizes]) if usable else None,
        options.rules.host_pixels and not untold,
    )


def pixels_of(image: Tensor, mask: Tensor | None, encoder: ImageEncoder, view: View) -> Tensor:
    """The encoder's pixel values of a picture ``1 h w c``."""
    if isinstance(encoder, PackedEncoder):
        return encoder.pixels(image, view.framing, mask)
    if view.as_host:
        return preprocess_as_host(image, encoder, mask=mask)
    return preprocess(image, encoder, crop=view.framing, mask=mask, shape=view.shape)


def no_image_pixels(rule: str, encoder: ImageEncoder, like: Tensor) -> Tensor:
    """Pixel values that stand for no image: zeros, or those of a black picture."""
    # zero *normalised* pixels, the encoder's mean colour: tencent ip_adapter.py; the black image is what users of the
    # old pack have their pictures from
    if rule == "zero_pixels":
        return torch.zeros_like(like)
    mean, std = (torch.tensor(value, device=like.device).view(3, 1, 1) for value in (encoder.mean, encoder.std))
    return (-mean / std).expand_as(like).to(like)


def single_images(images: Picture | Sequence[Picture]) -> list[Tensor]:
    """One ``1 h w c`` tensor per image; shapes are judged by preprocess()."""
    singles: list[Tensor] = []
    for picture in images if isinstance(images, (list, tuple)) else [cast("Picture", images)]:
        image = as_picture(picture)
        if image.ndim == 4 and image.shape[0] > 0:
            singles += image.split(1)
        else:
            singles.append(image[None] if image.ndim == 3 else image)
    if not singles:
        raise InvalidInputError("the list of images is empty; give at least one image")
    return singles


def single_masks(masks: Picture | Sequence[Picture | None] | None, images: list[Tensor]) -> list[Tensor | None]:
    """One ``1 h w`` mask or None per image."""
    if masks is None:
        return [None] * len(images)
    if isinstance(masks, (list, tuple)):
        listed = [None if mask is None else as_mask(mask) for mask in masks]
    else:
        given = as_mask(cast("Picture", masks))
        listed: list[Tensor | None] = [*(given[None] if given.ndim == 2 else given)]
        if len(listed) == 1:
            listed = listed * len(images)
    if len(listed) != len(images):
        raise InvalidInputError(f"got {len(listed)} masks for {len(images)} images; give one mask, or one per image")
    return [mask[None] if mask is not None and mask.ndim == 2 else mask for mask in listed]


def _tiles(image: Tensor, mask: Tensor | None, *, keep_hidden: bool) -> list[Part]:
    """A picture and its mask cut into square_tiles(); those that the mask hides only where asked for."""
    if image.ndim != 4 or 0 in image.shape or (mask is not None and mask.shape[-2:] != image.shape[1:3]):
        return [(image, mask)]  # preprocess() says what is wrong with it
    cut = [
        (image[:, rows, columns], None if mask is None else mask[..., rows, columns])
        for rows, columns in square_tiles(image)
    ]
    seen = [part for part in cut if part[1] is None or bool(part[1].any())]
    return cut if keep_hidden or not seen else seen
