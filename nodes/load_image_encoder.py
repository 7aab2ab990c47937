"""Load Image Encoder."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .host.schema import schema
from .sockets import CATEGORY


class LoadImageEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptLoadEncoder",
            display_name="Load Image Encoder",
            category=CATEGORY,
            search_aliases=[
                "clip vision",
                "siglip",
                "dinov2",
                "dino",
                "pe-core",
                "load clip vision",
                "image embedding",
            ],
            description="Loads an image encoder of any kind that adapters read from models/clip_vision, also those that Load CLIP "
            "Vision cannot: SigLIP with its pooled vector, SigLIP 2, DINOv2, PE-Core, besides CLIP. What the file is comes from "
            "its contents, so it may have any name.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.files.choices("clip_vision"),
                    tooltip="The file that Inspect Adapter names; of Hugging Face repositories their model.safetensors, under a name "
                    "of your own.",
                )
            ],
            outputs=[io.ClipVision.Output(display_name="clip_vision")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return host.files.fingerprint("clip_vision", file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(host.clip_vision.load(file))
