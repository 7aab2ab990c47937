"""Apply Image to Model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import EncodeOptions, WeightSchedule, rules_for
from ..ipadapter_core.prompt.combine import Combine
from . import host
from .host.schema import schema
from .sockets import (
    CATEGORY,
    adapter_input,
    clip_vision_input,
    combine_input,
    compatibility_input,
    model_input,
    negative_input,
    per_latent_input,
    region_input,
    schedule_input,
    second_encoder_input,
    steering_inputs,
)


class ApplyImageToModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptApplyImage",
            display_name="Apply Image to Model",
            category=CATEGORY,
            search_aliases=[
                "ipadapter",
                "ip adapter",
                "ip-adapter",
                "apply ipadapter",
                "image prompt",
                "style transfer",
                "composition",
                "image reference",
                "reference image",
                "style reference",
                "reference only",
                "regional",
                "style only",
                "composition only",
                "two regions",
                "copy style",
            ],
            description="Encode Image Prompt and Apply Adapter to Model in one node, for when the image prompt is used once.",
            inputs=[
                model_input(),
                adapter_input(),
                clip_vision_input(),
                io.Image.Input("image", tooltip="One or more reference images, of any size."),
                *steering_inputs(),
                combine_input(),
                per_latent_input(),
                region_input(),
                negative_input(),
                schedule_input(),
                compatibility_input(),
                second_encoder_input(),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        adapter: host.adapters.ManagedAdapter,
        clip_vision: object,
        image: Tensor,
        combine: Combine,
        per_latent: bool,
        mask: Tensor | None = None,
        negative: Tensor | None = None,
        schedule: WeightSchedule | None = None,
        compatibility: str = "correct",
        clip_vision_2: object | None = None,
        **steering: Any,
    ) -> io.NodeOutput:
        options = EncodeOptions(combine=combine, per_latent=per_latent, rules=rules_for(compatibility))
        prompt = host.adapters.encode(adapter, clip_vision, image, options, negative=negative, second=clip_vision_2)
        patched = host.adapters.steer(model, adapter, prompt, mask, schedule, compatibility, **steering)
        return io.NodeOutput(patched)
