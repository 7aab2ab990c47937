"""Where this package and packs before it give different pictures: one switch, every difference with its reason.

``correct`` is how the adapters were trained and what users mean; ``IPAdapter_plus`` reproduces the pictures of that
pack (as it was from September 2024 on) to the last digit that floating point allows, ``IPAdapter-Flux`` the formula of
Shakker's ComfyUI-IPAdapter-Flux. Nothing else in the core asks which it is: code reads the one rule that concerns it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from .errors import InvalidInputError

Compatibility = Literal["correct", "IPAdapter_plus", "IPAdapter-Flux"]
"""Whose pictures are made: those of the adapters' training, or another pack's, its errors included."""
COMPATIBILITIES: tuple[Compatibility, ...] = get_args(Compatibility)
"""All of them, the usual one first."""


@dataclass(frozen=True, slots=True)
class Rules:
    """One entry per difference; the defaults are the correct ones."""

    middle_block: bool = True
    """The image acts in the middle block. The old pack patches ("middle", 1) since its commit b188a6c, but ComfyUI
    calls that block ("middle", 0): 10 of SDXL's 70 layers and 1 of SD1.5's 16 never see the image."""

    black_unconditional: bool = False
    """Adapters that read penultimate tokens get an encoded black picture where there is no image. They were trained
    with zero *normalised* pixels, the encoder's mean colour (tencent ip_adapter.py)."""

    norm_average_over_images: bool = False
    """"norm average" divides each number of a feature by its norm over the images, instead of each image's feature by
    its own length; the result has the length of no image."""

    features_scaled: bool = False
    """The weight of an encoded image multiplies its feature, so that weak images move towards the zero vector, which
    no picture encodes to; instead of towards the feature of no image."""

    host_pixels: bool = False
    """References are resized by ComfyUI's ``clip_preprocess`` (one bicubic pass, rounded to 8 bits) instead of as the
    encoders' own processor does it; masks on references are cut and resized apart and multiply normalised pixels. Values
    outside 0..1 (HDR) are clipped, where the correct mode refuses those far outside: they are no picture as users see it."""

    stretched_masks: Literal["bilinear", "bicubic"] | None = None
    """A region mask is stretched straight to a guessed size of each attention's token grid (old: V2 bilinear, V1
    bicubic), padded or cut as a flat row where the guess is wrong, and stretched over the crop where only an area is
    sampled. NaN in it is 0 (the old pack painted black). Correct: averaged over exactly the cells that a token covers, in the
    picture's own coordinates, and NaN is refused."""

    branches_by_index: bool = False
    """A chunk of a model call is the negative prompt if its index is 1. True for plain guidance; with dual guidance
    (CosXL) it is the middle conditioning, and the negative prompt gets the image."""

    mean_per_image: bool = False
    """K+mean(V) scales the mean of V over each image's tokens, instead of over all tokens of the prompt. The same for
    one image; for several side by side the penalty then depends on how tokens are grouped."""

    crossing_tiles: bool = False
    """Tiles of a reference act with full weight where they overlap, so twice; a nearly square reference shows its middle,
    and one longer than four squares its middle four. Correct: all of it, tiles fade into each other."""

    faces_without_negative: bool = False
    """A negative picture is ignored by FaceID adapters that read nothing but faces (FaceID Plus looks at it). Correct: the
    face in it stands where training had no face, as a negative picture does for every other adapter."""

    normed_values: bool = False
    """InstantX' adapter for FLUX.1 gets its values normed by RMS over each head, as Shakker's node does; a third of the
    adapter's effect is another. In its training only the keys were."""


CORRECT = Rules()

IPADAPTER_PLUS = Rules(
    middle_block=False,
    black_unconditional=True,
    norm_average_over_images=True,
    features_scaled=True,
    host_pixels=True,
    stretched_masks="bilinear",
    branches_by_index=True,
    mean_per_image=True,
    crossing_tiles=True,
    faces_without_negative=True,
)

IPADAPTER_PLUS_V1 = replace(IPADAPTER_PLUS, middle_block=True, stretched_masks="bicubic")
"""The old pack before its rewrite of 2024-03-23, when its class types were IPAdapterApply and the like."""

IPADAPTER_FLUX = Rules(normed_values=True)


def rules_for(compatibility: str, *, v1: bool = False) -> Rules:
    """The rules of a switch position; ``v1`` for nodes that exist only in the old pack's first version."""
    match compatibility:
        case "correct":
            return CORRECT
        case "IPAdapter_plus":
            return IPADAPTER_PLUS_V1 if v1 else IPADAPTER_PLUS
        case "IPAdapter-Flux":
            return IPADAPTER_FLUX
        case _:
            raise InvalidInputError(f"compatibility is {compatibility!r}; choose one of: {', '.join(COMPATIBILITIES)}")
