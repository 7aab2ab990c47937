"""Load IP-Adapter."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .host.schema import schema
from .sockets import CATEGORY, Adapter


class LoadIPAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptLoadAdapter",
            display_name="Load IP-Adapter",
            category=CATEGORY,
            search_aliases=[
                "ipadapter",
                "ip adapter",
                "ipadapter model loader",
                "ipadapter unified loader",
                "style transfer",
                "xlabs",
                "instantx",
                "flux ipadapter",
            ],
            description="Loads an IP-Adapter file of any public layout from models/ipadapter (or output/ipadapter). "
            "What the file is comes from its contents, so it may have any name.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.files.choices("ipadapter"),
                    tooltip="An IP-Adapter for SD1.5, SD2, SDXL, FLUX.1, SD3.5 or Anima (.safetensors, .bin, .pt, .pth, .ckpt).",
                )
            ],
            outputs=[Adapter.Output(display_name="adapter")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return host.files.fingerprint("ipadapter", file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(host.adapters.load(file))
