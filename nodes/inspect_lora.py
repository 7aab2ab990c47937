"""Inspect LoRA."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..ipadapter_core.images.files import to_tensor
from ..ipadapter_core.lora.inspection import describe_facts, draw_heat_map, facts_of, heat_map
from . import host
from .host.schema import schema
from .sockets import LORA_CATEGORY


class InspectLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptLoRAInspect",
            display_name="Inspect LoRA",
            category=LORA_CATEGORY,
            search_aliases=[
                "trigger words",
                "lora metadata",
                "lora tags",
                "heat map",
                "block weight",
                "lbw",
                "weights",
            ],
            description="Shows what a LoRA file is: base model, format, ranks, trigger words and training tags, and a heat map of how "
            "strongly it changes each block and kind of layer.",
            inputs=[
                io.Combo.Input(
                    "file", options=host.files.choices("loras"), tooltip="A LoRA, LyCORIS or PEFT file in models/loras."
                )
            ],
            outputs=[io.String.Output(display_name="text"), io.Image.Output(display_name="heat_map")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return host.files.fingerprint("loras", file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        weights = host.lora.load(file).weights
        text = describe_facts(facts_of(weights))
        image = to_tensor(draw_heat_map(heat_map(weights), file).convert("RGB"))[None]
        host.frontend.show_in_node(text, cls.hidden.unique_id)
        shown = ui.PreviewImage(image, cls=cls).as_dict()
        return io.NodeOutput(text, image, ui={**shown, "text": [text]})
