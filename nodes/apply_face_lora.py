"""Apply Face LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .sockets import LORA_CATEGORY, adapter_input, strength_input


class ApplyFaceLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImagePromptApplyFaceLoRA",
            display_name="Apply Face LoRA",
            category=LORA_CATEGORY,
            description="Applies the LoRA that a FaceID adapter carries in its own file; no second download is needed.",
            inputs=[
                io.Model.Input("model", tooltip="A model of the family that the adapter was trained for."),
                adapter_input(),
                strength_input("strength", "The adapter was trained with 1; 0.6 leaves more of the model's own look."),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: object, adapter: host.adapters.ManagedAdapter, strength: float) -> io.NodeOutput:
        model, shown = host.lora.apply_face(model, adapter, strength)
        host.frontend.show_in_node(shown, cls.hidden.unique_id)
        return io.NodeOutput(model)
