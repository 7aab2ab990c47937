"""Noise Image."""

from __future__ import annotations

from typing import get_args

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core.images.noise import Noise, noise_picture
from .host.schema import schema
from .sockets import CATEGORY


class NoiseImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptNoise",
            display_name="Noise Image",
            category=CATEGORY,
            search_aliases=[
                "noise for ipadapter",
                "negative image",
                "image noise",
            ],
            description="Noise, or a reference disturbed by it, for 'negative' of Encode Image Prompt: steering away from a "
            "disturbed copy of the reference makes pictures cleaner and richer. The same image always gives the same noise.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(get_args(Noise)),
                    tooltip="fade: mixed with noise; dissolve: pixels replaced by noise; gaussian: noise added; shuffle: pixels "
                    "moved about and noise added.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of it is noise; 0: the image as it is (shuffle: moved smoothly).",
                ),
                io.Int.Input(
                    "blur",
                    default=0,
                    min=0,
                    max=32,
                    tooltip="Blurred afterwards, over so many pixels of 224; 0: not at all.",
                ),
                io.Image.Input("image", optional=True, tooltip="The reference, cut square; without one: noise alone."),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls, kind: Noise, strength: float, blur: int, image: Tensor | None = None) -> io.NodeOutput:
        return io.NodeOutput(noise_picture(kind, strength, blur, image))
