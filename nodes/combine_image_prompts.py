"""Combine Image Prompts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ipadapter_core import combine_prompts
from ..ipadapter_core.prompt.combine import Combine
from . import host
from .host.schema import schema
from .sockets import CATEGORY, Prompt, adapter_input, combine_input

COUNT = 5


class CombineImagePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        prompts = [
            Prompt.Input(f"prompt_{i}", optional=i > 1, tooltip="From Encode Image Prompt, with the same adapter.")
            for i in range(1, COUNT + 1)
        ]
        strengths = [
            io.Float.Input(
                f"strength_{i}", default=1.0, min=-5.0, max=5.0, step=0.05, tooltip=f"Strength of prompt {i}; 0: none."
            )
            for i in range(1, COUNT + 1)
        ]
        return schema(
            node_id="ImagePromptCombine",
            display_name="Combine Image Prompts",
            category=CATEGORY,
            search_aliases=[
                "combine ipadapter",
                "combine embeds of ipadapter",
                "merge",
                "mix images",
                "average",
                "multiple references",
            ],
            description="Joins up to five encoded image prompts into one; chain the node for more.",
            inputs=[adapter_input(), combine_input(), *prompts, *strengths],
            outputs=[Prompt.Output(display_name="image_prompt")],
        )

    @classmethod
    def execute(cls, adapter: host.adapters.ManagedAdapter, combine: Combine, **inputs: Any) -> io.NodeOutput:
        given = [i for i in range(1, COUNT + 1) if inputs.get(f"prompt_{i}") is not None]
        prompts = [inputs[f"prompt_{i}"] for i in given]
        strengths = [inputs[f"strength_{i}"] for i in given]
        return io.NodeOutput(combine_prompts(adapter.to_device(), prompts, combine=combine, strengths=strengths))
