"""How references become an image prompt, in one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..checkpoints.format import TrainedUnconditional
from ..compatibility import CORRECT, Rules
from ..errors import InvalidInputError
from ..features import Crop
from ..images.faces import Which
from .combine import Combine, check_choice

Unconditional = Literal["auto", "zero_pixels", "zero_embeds", "black", "same", "off"]
NoImage = Literal["zero_pixels", "zero_embeds", "black", "same", "off"]
PromptCrop = Crop | Literal["tiles", "auto"]


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How references become an image prompt.

    Raises InvalidInputError for values that are none of the choices.
    """

    combine: Combine = "concat"
    """How several references become one, see combine_features()."""

    per_latent: bool = False
    """Reference i belongs to latent i, instead of all references to all latents; nothing is combined then."""

    strengths: Sequence[float] | None = None
    """One number per reference: 0 is no image, 1 changes nothing, more exaggerates, below 0 turns it around. The feature moves
    on the line from no image to the image, see at_strength()."""

    crop: PromptCrop = "auto"
    """Which square of each picture is kept, see preprocess(). ``auto`` does as the adapter was trained: the centre of the picture
    for CLIP's, else what its family says. The rules of the old pack know only ``center``. ``tiles`` keeps all
    of it: squares side by side along its long side (see square_tiles), each encoded alone. For concat and per_latent every tile
    keeps its own tokens; otherwise an image's tiles are averaged before images are combined. Tiles that a mask hides wholly
    are left out, except with per_latent."""

    unconditional: Unconditional = "auto"
    """What the negative branch of guidance sees. ``auto`` does as the adapter was trained; otherwise ``zero_pixels`` (a picture
    of the encoder's mean colour), ``zero_embeds`` (no encoder at all), ``black`` (a black picture, as
    ComfyUI_IPAdapter_plus feeds plus adapters), ``same`` (the image itself) or ``off`` (nothing, as if there were no adapter)."""

    which: Which = "best"
    """The choice among the faces of a picture, see find_faces()."""

    face_scale: float = 1.0
    """How much FaceID Plus v2 reads in the picture of the face beside its embedding; 1 as trained."""

    face_side: int | None = None
    """Side in pixels of the aligned face; None: as the adapter was trained."""

    tiles: int = 1
    """n > 1: every picture is also cut into n x n parts that are encoded alone and put together again, see encode_features()."""

    tile_ratio: float = 1.0
    """How much of the whole picture's feature stays where ``tiles`` is above 1."""

    chunk: int = 8
    """How many images the encoder and the projector see at once."""

    progress: Callable[[int, int], None] | None = None
    """Called with (images done, images in all) after each chunk of the encoder; the unconditional picture counts."""

    rules: Rules = CORRECT
    """See compatibility.Rules."""

    def __post_init__(self) -> None:
        check_choice("combine", self.combine, get_args(Combine))
        check_choice("unconditional", self.unconditional, get_args(Unconditional))
        if self.chunk < 1:
            raise InvalidInputError(f"chunk is {self.chunk}; it must be at least 1")

    def no_image(self, trained: TrainedUnconditional) -> NoImage:
        """What stands for no image with an adapter that was trained so."""
        if self.unconditional != "auto":
            return self.unconditional
        if trained == "black_picture" or (trained == "zero_pixels" and self.rules.black_unconditional):
            return "black"
        return trained


def changed(options: EncodeOptions | None, changes: Mapping[str, Any]) -> EncodeOptions:
    """Options with some fields changed, which users may give as keyword arguments; TypeError for one that there is not."""
    return replace(options or EncodeOptions(), **changes)
