"""Reference pictures before encoding: noise, squares; and tiles, which are applied one by one."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from ...ipadapter_core import rules_for
from ...ipadapter_core.attention.schedule import Scaling
from ...ipadapter_core.images.noise import Noise, noise_picture
from ...ipadapter_core.images.tiles import Interpolation, Position, prepare_square, tiles_in_place
from ...ipadapter_core.legacy.settings import LegacySettings, todays_option
from .apply import SOURCE, apply_reference
from .encode import Reference
from .pipeline import Pipeline, understand
from .sockets import (
    EXTRAS,
    IMAGE,
    Inputs,
    LegacyNode,
    batch_size,
    choice,
    combine,
    compatibility,
    former,
    integer,
    number,
    scaling,
    weight,
    weight_type,
    window,
)


class IPAdapterNoise(LegacyNode):
    REPLACEMENT = "Noise Image, into 'negative' of Encode Image Prompt"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make_noise"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "type": choice(get_args(Noise)),
                "strength": number(1.0, 0.0, 1.0),
                "blur": integer(0, 0, 32),
            },
            "optional": {"image_optional": IMAGE},
        }

    def make_noise(
        self, type: Noise, strength: float, blur: int, image_optional: Tensor | None = None
    ) -> tuple[Any, ...]:
        return (noise_picture(type, strength, blur, image_optional),)


class PrepImageForClipVision(LegacyNode):
    REPLACEMENT = "the crop input of Encode Image Prompt"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "prep_image"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "image": IMAGE,
                "interpolation": choice(get_args(Interpolation)),
                "crop_position": choice(get_args(Position)),
                "sharpening": number(0.0, 0.0, 1.0),
            },
            "optional": {"add_weight": former("BOOLEAN", "the picture twice")},
        }

    def prep_image(
        self, image: Tensor, interpolation: Interpolation = "LANCZOS", crop_position: Position = "center", sharpening: float = 0.0,
        add_weight: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        interpolation = todays_option("interpolation", interpolation)
        square = prepare_square(image, interpolation=interpolation, position=crop_position, sharpening=sharpening)
        return (torch.cat([square, square]) if add_weight else square,)


class IPAdapterTiled(LegacyNode):
    REPLACEMENT = "Apply Tiled Image to Model"
    RETURN_TYPES = ("MODEL", "IMAGE", "MASK")
    RETURN_NAMES = ("MODEL", "tiles", "masks")
    FUNCTION = "apply_tiled"
    UNFOLD = False
    SHARPENING: ClassVar[Inputs] = {"sharpening": number(0.0, 0.0, 1.0)}

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": SOURCE | weight(3.0) | weight_type() | combine() | window() | cls.SHARPENING,
            "optional": scaling() | EXTRAS | compatibility(),
        }

    def apply_tiled(
        self, model: Any, ipadapter: Any, image: Tensor, weight: Any, weight_type: str, start_at: float, end_at: float,
        sharpening: float, combine_embeds: str = "concat", image_negative: Tensor | None = None,
        attn_mask: Tensor | None = None, clip_vision: Any = None, embeds_scaling: Scaling = "V only",
        encode_batch_size: int = 0, compatibility: str = "IPAdapter_plus",
    ) -> tuple[Any, ...]:  # fmt: skip
        found = understand(ipadapter)
        pipeline = Pipeline(found.adapter, found.clip_vision if clip_vision is None else clip_vision)
        settings = LegacySettings(weight, weight_type, combine_embeds, start_at, end_at, embeds_scaling, self.UNFOLD)
        tiles, masks = tiles_in_place(image, attn_mask, sharpening, rules_for(compatibility))
        for tile, mask in zip(tiles, masks, strict=True):
            reference = Reference(tile, negative=image_negative, batch_size=encode_batch_size)
            model, _ = apply_reference(model, pipeline, settings, reference, mask, compatibility)
        return model, torch.cat(tiles), torch.cat(masks)


class IPAdapterTiledBatch(IPAdapterTiled):
    UNFOLD = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": SOURCE | weight(3.0) | weight_type() | window() | cls.SHARPENING,
            "optional": scaling() | batch_size() | EXTRAS | compatibility(),
        }
