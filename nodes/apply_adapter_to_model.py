"""Apply Adapter to Model."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import ImagePrompt, WeightSchedule, rules_for
from . import host
from .sockets import CATEGORY, Prompt, Schedule, adapter_input, compatibility_input, region_input, steering_inputs


class ApplyAdapterToModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImagePromptApply",
            display_name="Apply Adapter to Model",
            category=CATEGORY,
            description="Lets an image prompt steer a model. Chain the node for several adapters; order does not matter.",
            inputs=[
                io.Model.Input("model", tooltip="A model of the SD1.5, SD2 or SDXL family."),
                adapter_input(),
                Prompt.Input("image_prompt", tooltip="From Encode Image Prompt."),
                *steering_inputs(),
                region_input(),
                Schedule.Input(
                    "schedule", optional=True, tooltip="From Adapter Schedule: curve over steps, table per site."
                ),
                compatibility_input(),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        adapter: host.adapters.ManagedAdapter,
        image_prompt: ImagePrompt,
        strength: float,
        preset: str,
        scaling: str,
        start: float,
        end: float,
        mask: Tensor | None = None,
        schedule: WeightSchedule | None = None,
        compatibility: str = "correct",
    ) -> io.NodeOutput:
        settings = (schedule or WeightSchedule()).steering(strength, preset, scaling, start, end)
        patched, _ = host.adapters.apply(model, adapter, image_prompt, settings, mask, rules_for(compatibility))
        return io.NodeOutput(patched)
