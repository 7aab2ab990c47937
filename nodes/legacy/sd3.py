"""The class types of ComfyUI-InstantX-IPAdapter-SD3 (Slickytail): InstantX's adapter in SD3.5 Large.

That pack norms the normed query and keys once more; here the formula is the authors' own.
"""

from __future__ import annotations

from typing import Any

import torch

from ...ipadapter_core import InvalidInputError, WeightSchedule, prompt_from_features
from .. import host
from .flux import carried
from .pipeline import Pipeline
from .sockets import MODEL, Inputs, LegacyNode, choice, number


class SlickytailNode(LegacyNode):
    PACK = "ComfyUI-InstantX-IPAdapter-SD3"


class IPAdapterSD3Loader(SlickytailNode):
    REPLACEMENT = "Load IP-Adapter"
    RETURN_TYPES = ("IP_ADAPTER_SD3_INSTANTX",)
    RETURN_NAMES = ("ipadapter",)
    FUNCTION = "load_model"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        files, devices = (host.files.names("ipadapter"),), choice(["cuda", "cpu", "mps"])
        return {"required": {"ipadapter": files, "provider": devices}}

    def load_model(self, ipadapter: str, provider: str) -> tuple[Any, ...]:
        return (Pipeline(host.adapters.load(ipadapter)),)


class ApplyIPAdapterSD3(SlickytailNode):
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply_ipadapter"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": MODEL,
                "ipadapter": ("IP_ADAPTER_SD3_INSTANTX",),
                "image_embed": ("CLIP_VISION_OUTPUT",),
                "weight": number(1.0, -1.0, 5.0),
                "start_percent": number(0.0, 0.0, 1.0, 0.01),
                "end_percent": number(1.0, 0.0, 1.0, 0.01),
            }
        }

    def apply_ipadapter(
        self, model: Any, ipadapter: Any, image_embed: Any, weight: float, start_percent: float, end_percent: float
    ) -> tuple[Any, ...]:
        pipeline = carried(ipadapter, "Load IPAdapter SD3 Model")
        try:
            features = image_embed["penultimate_hidden_states"]
        except (AttributeError, KeyError, TypeError):
            raise InvalidInputError(
                f"image_embed carries a {type(image_embed).__name__} without penultimate_hidden_states; connect CLIP Vision "
                "Encode with a SigLIP model such as sigclip_vision_patch14_384.safetensors"
            ) from None
        adapter = pipeline.adapter.to_device()
        features = features[:1].float()  # of several pictures that pack took the second for the negative prompt
        prompt = prompt_from_features(adapter, features, torch.zeros_like(features), encoder="CLIP Vision Encode")
        schedule = WeightSchedule(strength=weight, start_percent=start_percent, end_percent=end_percent)
        return (host.adapters.apply(model, pipeline.adapter, prompt, schedule, None)[0],)
