"""Apply Image to Model."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import WeightSchedule, rules_for
from . import host
from .sockets import (
    CATEGORY,
    Schedule,
    adapter_input,
    clip_vision_input,
    combine_input,
    compatibility_input,
    per_latent_input,
    region_input,
    steering_inputs,
)


class ApplyImageToModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImagePromptApplyImage",
            display_name="Apply Image to Model",
            category=CATEGORY,
            description="Encode Image Prompt and Apply Adapter to Model in one node, for when the image prompt is used once.",
            inputs=[
                io.Model.Input("model", tooltip="A model of the SD1.5, SD2 or SDXL family."),
                adapter_input(),
                clip_vision_input(),
                io.Image.Input("image", tooltip="One or more reference images, of any size."),
                *steering_inputs(),
                combine_input(),
                per_latent_input(),
                region_input(),
                io.Image.Input("negative", optional=True, tooltip="An image to steer away from."),
                Schedule.Input("schedule", optional=True, tooltip="From Adapter Schedule."),
                compatibility_input(),
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
        strength: float,
        preset: str,
        scaling: str,
        start: float,
        end: float,
        combine: str,
        per_latent: bool,
        mask: Tensor | None = None,
        negative: Tensor | None = None,
        schedule: WeightSchedule | None = None,
        compatibility: str = "correct",
    ) -> io.NodeOutput:
        prompt = host.adapters.encode(
            adapter,
            clip_vision,
            image,
            combine=combine,
            per_latent=per_latent,
            negative=negative,
            compatibility=compatibility,
        )
        settings = (schedule or WeightSchedule()).steering(strength, preset, scaling, start, end)
        patched, _ = host.adapters.apply(model, adapter, prompt, settings, mask, rules_for(compatibility))
        return io.NodeOutput(patched)
