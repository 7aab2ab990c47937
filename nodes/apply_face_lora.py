"""Apply Face LoRA."""

from __future__ import annotations

from typing import Literal, get_args

from comfy_api.latest import io

from . import host
from .host.schema import advanced, schema
from .sockets import LORA_CATEGORY, adapter_input, strength_input

Layers = Literal["all", "cross-attention"]


class ApplyFaceLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptApplyFaceLoRA",
            display_name="Apply Face LoRA",
            category=LORA_CATEGORY,
            search_aliases=[
                "faceid",
                "face id",
                "faceid lora",
                "faceid of ipadapter",
            ],
            description="Applies the LoRA that an adapter (FaceID, Anima Character Reference) carries in its own file; no second "
            "download is needed.",
            inputs=[
                io.Model.Input("model", tooltip="A model of the family that the adapter was trained for."),
                adapter_input(),
                strength_input("strength", "The adapter was trained with 1; 0.6 leaves more of the model's own look."),
                advanced(
                    io.Combo.Input(
                        "layers",
                        options=list(get_args(Layers)),
                        default="all",
                        optional=True,
                        tooltip="Which layers of the model the LoRA changes: all that it was trained for, or only the attention to the "
                        "text, as the first nodes for Anima's Character Reference did.",
                    )
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: object, adapter: host.adapters.ManagedAdapter, strength: float, layers: Layers = "all"
    ) -> io.NodeOutput:
        cross_attention = layers == "cross-attention"
        model, shown = host.lora.apply_inside(model, adapter, strength, cross_attention=cross_attention)
        host.frontend.show_in_node(shown, cls.hidden.unique_id)
        return io.NodeOutput(model)
