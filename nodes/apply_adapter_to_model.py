"""Apply Adapter to Model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import ImagePrompt, WeightSchedule
from . import host
from .host.schema import schema
from .sockets import (
    CATEGORY,
    Prompt,
    adapter_input,
    compatibility_input,
    model_input,
    region_input,
    schedule_input,
    steering_inputs,
)


class ApplyAdapterToModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptApply",
            display_name="Apply Adapter to Model",
            category=CATEGORY,
            search_aliases=[
                "ipadapter",
                "ip adapter",
                "ip-adapter",
                "apply ipadapter",
                "ipadapter advanced",
                "style transfer",
                "composition",
                "image reference",
                "reference image",
                "regional",
                "attention mask",
                "style only",
                "composition only",
                "two regions",
                "region mask",
                "copy style",
            ],
            description="Lets an image prompt steer a model. Chain the node for several adapters; order does not matter.",
            inputs=[
                model_input(),
                adapter_input(),
                Prompt.Input("image_prompt", tooltip="From Encode Image Prompt."),
                *steering_inputs(),
                region_input(),
                schedule_input("From Adapter Schedule: curve over steps, table per site."),
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
        mask: Tensor | None = None,
        schedule: WeightSchedule | None = None,
        compatibility: str = "correct",
        **steering: Any,
    ) -> io.NodeOutput:
        patched = host.adapters.steer(model, adapter, image_prompt, mask, schedule, compatibility, **steering)
        return io.NodeOutput(patched)
