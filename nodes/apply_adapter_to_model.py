"""Apply Adapter to Model."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import PRESETS, SCALINGS, ImagePrompt, WeightSchedule, rules_for
from . import host
from .sockets import CATEGORY, Prompt, Schedule, adapter_input, compatibility_input


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
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    tooltip="How much the image steers: 0 not at all (exactly the plain model), 1 as trained, 0.5–0.8 leaves "
                    "room for the text, below 0 steers away.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    tooltip="Where in the model the image acts, and how strongly there: linear is everywhere; style transfer and "
                    "composition pick the layers that carry these; the precise ones also push the other part away.",
                ),
                io.Combo.Input(
                    "scaling",
                    options=list(SCALINGS),
                    tooltip="What the strength multiplies: V only (the trained rule), keys too (softer below 1), with a penalty for "
                    "narrow layers, or keys and the mean of V.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Sampling progress at which the image begins to act (0: first step).",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Sampling progress after which the image no longer acts (1: last step).",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture the image acts (white), soft edges allowed; one mask, or one per latent.",
                ),
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
        adapter: host.ManagedAdapter,
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
        settings = replace(
            schedule or WeightSchedule(),
            strength=strength,
            preset=preset,
            scaling=scaling,
            start_percent=start,
            end_percent=end,
        )
        patched, _ = host.apply(model, adapter, image_prompt, settings, mask, rules_for(compatibility))
        return io.NodeOutput(patched)
