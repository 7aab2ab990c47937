"""Class types of the old pack before its rewrite of 2024-03-23, which shared workflows still use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ipadapter_core import (
    EncodeOptions,
    InvalidInputError,
    prompt_from_features,
    rules_for,
)
from ...ipadapter_core.images.noise import negative_picture
from ...ipadapter_core.images.tiles import Position, masked_tiles, prepare_square
from ...ipadapter_core.legacy.settings import FIRST_WEIGHT_TYPES, LegacySettings
from ...ipadapter_core.prompt.embeds import combine_embeds
from .. import host
from .encode import Reference, encode_pictures, encode_reference, vision
from .pipeline import Pipeline, understand
from .sockets import (
    ADAPTER,
    CLIP_VISION,
    EMBEDS,
    IMAGE,
    MASK,
    MODEL,
    Inputs,
    LegacyNode,
    choice,
    compatibility,
    integer,
    number,
    window,
)

SOURCE: Inputs = {"ipadapter": ADAPTER, "clip_vision": CLIP_VISION, "image": IMAGE, "model": MODEL}
FACES = ("INSIGHTFACE",)
UNFOLD: Inputs = {"unfold_batch": ("BOOLEAN", {"default": False})}


def _weight(default: float = 1.0) -> Inputs:
    return {"weight": number(default, -1.0, 3.0)}


def _noise() -> Inputs:
    return {"noise": number(0.0, 0.0, 1.0, 0.01)}


def _weight_type() -> Inputs:
    return {"weight_type": choice(FIRST_WEIGHT_TYPES)}


def _settings(weight: float, weight_type: str, start_at: float, end_at: float, unfold: bool) -> LegacySettings:
    scaling = FIRST_WEIGHT_TYPES.get(weight_type, "V only")
    return LegacySettings(weight, start_at=start_at, end_at=end_at, embeds_scaling=scaling, unfold_batch=unfold)


class IPAdapterCLIPVisionEncode(LegacyNode):
    """The encoder of the first twelve days: what IPAdapterApply of then is given in place of a picture."""

    RETURN_TYPES = ("CLIP_VISION_OUTPUT",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"clip_vision": CLIP_VISION, "image": IMAGE}}

    def encode(self, clip_vision: Any, image: Tensor) -> tuple[Any, ...]:
        return (Unencoded(clip_vision, image),)


@dataclass(frozen=True, eq=False)
class Unencoded:
    """A picture and its encoder; which of the encoder's layers is read, only the adapter knows."""

    clip_vision: Any
    image: Tensor


class IPAdapterApply(LegacyNode):
    """``clip_vision_output`` and ``mask`` are the inputs of before 2023-09-15; so nothing of today's can be required."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply_ipadapter"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        pictures: Inputs = {"clip_vision": CLIP_VISION, "image": IMAGE, "clip_vision_output": ("CLIP_VISION_OUTPUT",)}
        widgets = _noise() | _weight_type() | window() | UNFOLD
        return {
            "required": {"ipadapter": ADAPTER, "model": MODEL} | _weight(),
            "optional": pictures | widgets | {"attn_mask": MASK, "mask": MASK, "insightface": FACES} | compatibility(),
        }

    def apply_ipadapter(
        self, ipadapter: Any, model: Any, weight: float, clip_vision: Any = None, image: Tensor | None = None,
        weight_type: str = "original", noise: float = 0.0, attn_mask: Tensor | None = None, start_at: float = 0.0,
        end_at: float = 1.0, unfold_batch: bool = False, compatibility: str = "IPAdapter_plus",
        clip_vision_output: Any = None, mask: Tensor | None = None, insightface: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        if insightface is not None:
            raise InvalidInputError(
                "Apply IPAdapter has a face model, as for two days in December 2023: take IPAdapter FaceID in its place"
            )
        if isinstance(clip_vision_output, Unencoded):
            clip_vision, image = clip_vision_output.clip_vision, clip_vision_output.image
        if image is None:
            raise InvalidInputError(
                "Apply IPAdapter has no image: connect image and clip_vision (of clip_vision_output it reads what CLIP Vision "
                "Encode (IPAdapter) gives)"
            )
        pipeline = Pipeline(understand(ipadapter).adapter, clip_vision)
        positive, negative = _encoded(pipeline, image, noise, compatibility)
        settings = _settings(weight, weight_type, start_at, end_at, unfold_batch)
        attn_mask = mask if attn_mask is None else attn_mask
        return (_applied(model, pipeline, positive, negative, settings, attn_mask, compatibility),)


class IPAdapterApplyFaceID(LegacyNode):
    """``faceid_v2`` says whether the file is of version 2, whatever its name says."""

    REPLACEMENT = "IPAdapter FaceID"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply_ipadapter"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        v2 = {"faceid_v2": ("BOOLEAN", {"default": False}), "weight_v2": number(1.0, -1.0, 3.0)}
        source = {"ipadapter": ADAPTER, "clip_vision": CLIP_VISION, "insightface": FACES, "image": IMAGE}
        return {
            "required": source | {"model": MODEL} | _weight() | _noise() | _weight_type(),
            "optional": window() | v2 | UNFOLD | {"attn_mask": MASK} | compatibility(),
        }

    def apply_ipadapter(
        self, ipadapter: Any, clip_vision: Any, insightface: Any, image: Tensor, model: Any, weight: float, noise: float,
        weight_type: str, start_at: float = 0.0, end_at: float = 1.0, faceid_v2: bool = False, weight_v2: float = 1.0,
        unfold_batch: bool = False, attn_mask: Tensor | None = None, compatibility: str = "IPAdapter_plus",
    ) -> tuple[Any, ...]:  # fmt: skip
        rules = rules_for(compatibility, v1=True)
        adapter = understand(ipadapter).adapter
        pipeline = Pipeline(host.adapters.with_version(adapter, 2 if faceid_v2 else 1), clip_vision, insightface)
        settings = _settings(weight, weight_type, start_at, end_at, unfold_batch)
        negative = partial(negative_picture, noise=noise) if noise > 0 else None
        reference = Reference(image, negative=negative, weight_faceidv2=weight_v2, crop=256)
        encoded = encode_reference(pipeline, reference, settings, rules)
        return (host.adapters.apply(model, pipeline.adapter, encoded.prompt, settings.schedule(), attn_mask, rules)[0],)


class IPAdapterTilesMasked(LegacyNode):
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply_ipadapter"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        tiles = {"short_side_tiles": integer(1, 0, 12), "tile_weight": number(0.6, 0.0, 1.0)}
        return {
            "required": SOURCE | _weight(0.7) | _noise() | _weight_type() | window() | tiles,
            "optional": compatibility(),
        }

    def apply_ipadapter(
        self, ipadapter: Any, clip_vision: Any, image: Tensor, model: Any, weight: float, noise: float, weight_type: str,
        start_at: float, end_at: float, short_side_tiles: int, tile_weight: float, compatibility: str = "IPAdapter_plus",
    ) -> tuple[Any, ...]:  # fmt: skip
        pipeline = Pipeline(understand(ipadapter).adapter, clip_vision)
        settings = _settings(weight, weight_type, start_at, end_at, False)
        masks = None
        if short_side_tiles > 0:
            image, masks = masked_tiles(image, short_side_tiles, tile_weight)
        positive, negative = _encoded(pipeline, image, noise, compatibility)
        if masks is None:
            return (_applied(model, pipeline, positive, negative, settings, None, compatibility),)
        negatives = negative.expand(len(positive), *negative.shape[1:])
        for tile, without, mask in zip(torch.split(positive, 1), torch.split(negatives, 1), masks, strict=True):
            model = _applied(model, pipeline, tile, without, settings, mask, compatibility)
        return (model,)


class IPAdapterApplyEncoded(LegacyNode):
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply_ipadapter"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"ipadapter": ADAPTER, "embeds": EMBEDS, "model": MODEL} | _weight(),
            "optional": _weight_type() | window() | UNFOLD | {"attn_mask": MASK} | compatibility(),
        }

    def apply_ipadapter(
        self, ipadapter: Any, embeds: Tensor, model: Any, weight: float, weight_type: str = "original", start_at: float = 0.0,
        end_at: float = 1.0, unfold_batch: bool = False, attn_mask: Tensor | None = None,
        compatibility: str = "IPAdapter_plus",
    ) -> tuple[Any, ...]:  # fmt: skip
        positive, negative = embeds
        settings = _settings(weight, weight_type, start_at, end_at, unfold_batch)
        pipeline = Pipeline(understand(ipadapter).adapter)
        return (_applied(model, pipeline, positive, negative, settings, attn_mask, compatibility),)


class IPAdapterBatchEmbeds(LegacyNode):
    """Embeds of that version are pairs [positive, negative], ``2 i ...``."""

    REPLACEMENT = "Combine Image Prompts"
    RETURN_TYPES = ("EMBEDS",)
    FUNCTION = "batch"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"embed1": EMBEDS, "embed2": EMBEDS}}

    def batch(self, embed1: Tensor, embed2: Tensor) -> tuple[Any, ...]:
        return (combine_embeds([embed1.transpose(0, 1), embed2.transpose(0, 1)]).transpose(0, 1),)


class PrepImageForInsightFace(LegacyNode):
    REPLACEMENT = "nothing: faces are found in pictures of any shape"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "prep_image"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "image": IMAGE,
                "crop_position": choice(["center", "top", "bottom", "left", "right"]),
                "sharpening": number(0.0, 0.0, 1.0),
                "pad_around": ("BOOLEAN", {"default": True}),
            }
        }

    def prep_image(
        self, image: Tensor, crop_position: Position, sharpening: float = 0.0, pad_around: bool = True
    ) -> tuple[Any, ...]:
        square = prepare_square(image, 580 if pad_around else 640, position=crop_position, sharpening=sharpening)
        if pad_around:  # white beyond any scale, as the old node padded
            square = torch.nn.functional.pad(square, (0, 0, 30, 30, 30, 30), value=255.0)
        return (square,)


def _encoded(pipeline: Pipeline, image: Tensor, noise: float, switch: str) -> tuple[Tensor, Tensor]:
    options = EncodeOptions(rules=rules_for(switch, v1=True), progress=host.frontend.progress_bar())
    negative = negative_picture(image, noise) if noise > 0 else None
    return encode_pictures(pipeline.adapter.weights, vision(pipeline), image, negative, options)


def _applied(
    model: Any, pipeline: Pipeline, positive: Tensor, negative: Tensor, settings: LegacySettings, mask: Any, switch: str
) -> Any:
    rules = rules_for(switch, v1=True)
    adapter = pipeline.adapter.to_device()
    options = EncodeOptions(per_latent=settings.unfold_batch, rules=rules)
    prompt = prompt_from_features(adapter, positive, negative, options)
    return host.adapters.apply(model, pipeline.adapter, prompt, settings.schedule(), mask, rules)[0]
