"""Load Image Prompt Models."""

from __future__ import annotations

from comfy_api.latest import io

from ..ipadapter_core.images.faces import PROVIDERS
from ..ipadapter_core.wishes import WISHES
from . import host
from .host.schema import advanced, schema
from .sockets import CATEGORY, Adapter, FaceModel, model_input


class LoadImagePromptModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptLoadModels",
            display_name="Load Image Prompt Models",
            category=CATEGORY,
            search_aliases=[
                "ipadapter", "ip adapter", "ipadapter unified loader", "unified loader", "load ipadapter", "style transfer",
                "composition", "faceid", "face id", "reference", "image reference", "clip vision", "style only", "which file",
                "missing models", "character",
            ],
            description="Picks the adapter that serves a need on the connected model, its image encoders, its LoRA and its face model "
            "from the files that are there; where one is missing it says which, where it belongs and where it is.",
            inputs=[
                model_input(),
                io.Combo.Input(
                    "need",
                    options=list(WISHES),
                    tooltip="What the reference is for. " + " ".join(f"{wish}: {what}." for wish, what in WISHES.items()),
                ),
                io.Float.Input(
                    "lora_strength",
                    default=0.6,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of the LoRA that comes with adapters for faces and for Anima; 0: none. 0.6 for faces, 1 for "
                    "Anima. Others have none.",
                ),
                advanced(
                    io.Combo.Input(
                        "provider",
                        options=list(PROVIDERS),
                        tooltip="Where onnxruntime runs the face model; falls back to the CPU, which is fast enough.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                Adapter.Output(display_name="adapter"),
                io.ClipVision.Output(display_name="clip_vision"),
                io.ClipVision.Output(display_name="clip_vision_2"),
                FaceModel.Output(display_name="face_model"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        return host.files.listing("ipadapter", "clip_vision", "loras")

    @classmethod
    def execute(cls, model: object, need: str, lora_strength: float, provider: str) -> io.NodeOutput:
        found = host.by_need.load(model, need, lora_strength, provider)
        host.frontend.show_in_node(found.report, cls.hidden.unique_id)
        first, second = (*found.encoders, None, None)[:2]
        return io.NodeOutput(found.model, found.adapter, first, second, found.face_model, found.report)
