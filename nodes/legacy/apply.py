"""The apply nodes: IPAdapter, IPAdapterAdvanced and those that differ from it in a few inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from ...ipadapter_core import rules_for
from ...ipadapter_core.attention.schedule import Scaling
from ...ipadapter_core.legacy.settings import SIMPLE_WEIGHT_TYPES, LegacySettings, todays_option
from .. import host
from .encode import Reference, encode_reference
from .pipeline import Pipeline, understand
from .sockets import (
    ADAPTER,
    CLIP_VISION,
    EXTRAS,
    IMAGE,
    INSIGHTFACE,
    MASK,
    MODEL,
    PARAMS,
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
from .weights import rows_of

SOURCE: Inputs = {"model": MODEL, "ipadapter": ADAPTER, "image": IMAGE}
TWO_SOURCES: Inputs = {"model": MODEL, "ipadapter": ADAPTER, "image_style": IMAGE, "image_composition": IMAGE}


def apply_reference(
    model: Any, pipeline: Pipeline, settings: LegacySettings, reference: Reference, mask: Any, switch: str
) -> tuple[Any, Any]:
    """One image prompt under the settings of an old node; returns the patched MODEL and the faces that were found."""
    rules = rules_for(switch)
    encoded = encode_reference(pipeline, reference, settings, rules)
    if encoded.composition is None:
        schedules, prompts = (settings.schedule(),), (encoded.prompt,)
    else:
        schedules, prompts = settings.schedules_of_two(), (encoded.prompt, encoded.composition)
    for schedule, prompt in zip(schedules, prompts, strict=True):
        model, _ = host.adapters.apply(model, pipeline.adapter, prompt, schedule, mask, rules, reference.weight_kolors)
    return model, encoded.faces


class IPAdapter(LegacyNode):
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply_ipadapter"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": SOURCE | weight(3.0) | window(),
            "optional": {"weight_type": choice(SIMPLE_WEIGHT_TYPES), "attn_mask": MASK} | compatibility(),
        }

    def apply_ipadapter(
        self, model: Any, ipadapter: Any, image: Tensor, weight: Any, start_at: float, end_at: float,
        weight_type: str = "standard", attn_mask: Tensor | None = None, compatibility: str = "IPAdapter_plus",
    ) -> tuple[Any, ...]:  # fmt: skip
        pipeline = understand(ipadapter)
        preset = SIMPLE_WEIGHT_TYPES.get(todays_option("weight_type", weight_type), "linear")
        settings = LegacySettings(_first(weight), preset, start_at=start_at, end_at=end_at)
        return apply_reference(model, pipeline, settings, Reference(image), attn_mask, compatibility)


class IPAdapterAdvanced(LegacyNode):
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply_ipadapter"
    UNFOLD = False

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": SOURCE | weight() | weight_type() | combine() | window(),
            "optional": scaling() | EXTRAS | compatibility(),
        }

    def apply_ipadapter(
        self,
        model: Any,
        ipadapter: Any,
        start_at: Any = 0.0,
        end_at: Any = 1.0,
        weight: Any = 1.0,
        weight_style: Any = 1.0,
        weight_composition: float = 1.0,
        expand_style: bool = False,
        weight_type: Any = "linear",
        combine_embeds: str = "concat",
        weight_faceidv2: float | None = None,
        image: Any = None,
        image_style: Tensor | None = None,
        image_composition: Tensor | None = None,
        image_negative: Tensor | None = None,
        clip_vision: Any = None,
        attn_mask: Any = None,
        insightface: Any = None,
        embeds_scaling: Scaling = "V only",
        layer_weights: str | None = None,
        ipadapter_params: dict[str, Any] | None = None,
        encode_batch_size: int = 0,
        style_boost: float | None = None,
        composition_boost: float | None = None,
        enhance_tiles: int = 1,
        enhance_ratio: float = 1.0,
        weight_kolors: float = 1.0,
        compatibility: str = "IPAdapter_plus",
    ) -> tuple[Any, ...]:
        found = understand(ipadapter)
        pipeline = Pipeline(
            found.adapter,
            found.clip_vision if clip_vision is None else clip_vision,
            found.insightface if insightface is None else insightface,
        )
        if image_style is not None:
            image, weight = image_style, weight_style
            weight_type = "strong style and composition" if expand_style else "style and composition"
            image_composition = image_style if image_composition is None else image_composition
        if ipadapter_params is None:
            entries = [(image, attn_mask, weight, weight_type, start_at, end_at)]
        else:
            entries = rows_of(ipadapter_params)
        faces = None
        for picture, mask, strength, kind, start, end in entries:
            if picture is None:
                continue
            settings = LegacySettings(
                strength, kind, combine_embeds, start, end, embeds_scaling, self.UNFOLD,
                weight_composition, style_boost, composition_boost, layer_weights or "",
            )  # fmt: skip
            reference = Reference(
                picture, image_composition, image_negative, weight_faceidv2, weight_kolors,
                encode_batch_size, enhance_tiles, enhance_ratio,
            )  # fmt: skip
            model, faces = apply_reference(model, pipeline, settings, reference, mask, compatibility)
        return model, faces


class IPAdapterBatch(IPAdapterAdvanced):
    UNFOLD = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": SOURCE | weight() | weight_type() | window(),
            "optional": scaling() | batch_size() | EXTRAS | compatibility(),
        }


class IPAdapterStyleComposition(IPAdapterAdvanced):
    WEIGHTS: ClassVar[Inputs] = {
        "weight_style": number(1.0, -1.0, 5.0),
        "weight_composition": number(1.0, -1.0, 5.0),
        "expand_style": ("BOOLEAN", {"default": False}),
    }

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": TWO_SOURCES | cls.WEIGHTS | combine("average") | window(),
            "optional": scaling() | EXTRAS | compatibility(),
        }


class IPAdapterStyleCompositionBatch(IPAdapterStyleComposition):
    UNFOLD = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": TWO_SOURCES | cls.WEIGHTS | window(), "optional": scaling() | EXTRAS | compatibility()}


class IPAdapterMS(IPAdapterAdvanced):
    REPLACEMENT = "Apply Adapter to Model with Adapter Schedule (sites: t3: 0.5)"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": SOURCE
            | weight()
            | {"weight_faceidv2": number(1.0, -1.0, 5.0)}
            | weight_type()
            | combine()
            | window()
            | scaling()
            | {"layer_weights": ("STRING", {"default": "", "multiline": True})},
            "optional": EXTRAS | {"insightface": INSIGHTFACE} | compatibility(),
        }


class IPAdapterFaceID(IPAdapterAdvanced):
    REPLACEMENT = "Encode Face Prompt and Apply Adapter to Model"
    RETURN_TYPES = ("MODEL", "IMAGE")
    RETURN_NAMES = ("MODEL", "face_image")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strength = {"weight_faceidv2": number(1.0, -1.0, 5.0)}
        former_layers = {"layer_weights": former("STRING", "a weight per layer, as IPAdapter Mad Scientist has")}
        return {
            "required": SOURCE | weight(3.0) | strength | weight_type() | combine() | window(),
            "optional": scaling() | EXTRAS | {"insightface": INSIGHTFACE} | former_layers | compatibility(),
        }


class IPAAdapterFaceIDBatch(IPAdapterFaceID):
    UNFOLD = True


class IPAdapterFaceIDKolors(IPAdapterFaceID):
    """``weight_kolors`` scales what the model's own text projection makes of the image tokens."""

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        strengths = {name: number(1.0, -1.0, 5.0) for name in ("weight_faceidv2", "weight_kolors")}
        return {
            "required": SOURCE | weight(3.0) | strengths | weight_type() | combine() | window() | scaling(),
            "optional": EXTRAS | {"insightface": INSIGHTFACE} | compatibility(),
        }


class IPAdapterClipVisionEnhancer(IPAdapterAdvanced):
    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": SOURCE | weight() | weight_type() | combine() | window() | scaling() | cls.tiles(1.0),
            "optional": EXTRAS | compatibility(),
        }

    @staticmethod
    def tiles(ratio: float) -> Inputs:
        return {"enhance_tiles": integer(2, 1, 16), "enhance_ratio": number(ratio, 0.0, 1.0)}


class IPAdapterClipVisionEnhancerBatch(IPAdapterClipVisionEnhancer):
    UNFOLD = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": SOURCE | weight() | weight_type() | window() | scaling() | cls.tiles(0.5) | batch_size(),
            "optional": EXTRAS | compatibility(),
        }


class IPAdapterFromParams(IPAdapterAdvanced):
    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"model": MODEL, "ipadapter": ADAPTER, "ipadapter_params": PARAMS} | combine(),
            "optional": scaling() | {"image_negative": IMAGE, "clip_vision": CLIP_VISION} | compatibility(),
        }


class IPAdapterPreciseStyleTransfer(IPAdapterAdvanced):
    BOOST: ClassVar[Inputs] = {"style_boost": number(1.0, -5.0, 5.0)}

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": SOURCE | weight() | cls.BOOST | combine() | window(),
            "optional": scaling() | EXTRAS | compatibility(),
        }


class IPAdapterPreciseStyleTransferBatch(IPAdapterPreciseStyleTransfer):
    UNFOLD = True


class IPAdapterPreciseComposition(IPAdapterPreciseStyleTransfer):
    BOOST: ClassVar[Inputs] = {"composition_boost": number(0.0, -5.0, 5.0)}


class IPAdapterPreciseCompositionBatch(IPAdapterPreciseComposition):
    UNFOLD = True


def _first(value: Any) -> Any:
    """A widget's number, also where a list of weights was wired to it."""
    given = cast("Sequence[Any]", value)
    return given[0] if isinstance(value, (list, tuple)) and given else given
