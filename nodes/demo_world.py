"""Demo World."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .host.schema import schema
from .sockets import CATEGORY, Adapter


class DemoWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptDemoWorld",
            display_name="Demo World",
            category=CATEGORY,
            search_aliases=[
                "no download",
                "try",
                "example",
                "tutorial",
                "first picture",
                "demo of ipadapter",
                "checkpoint",
                "load model",
                "quick start",
                "try it",
                "test",
            ],
            description="A small world of 64-pixel emoji that ships with this pack: everything that a first picture needs, as Load "
            "Checkpoint, Load CLIP Vision, Load IP-Adapter and Load Image would give it. Draw on an Empty Latent Image of 128 x "
            "128, with euler_ancestral, sgm_uniform, 20 steps, cfg 2. It knows texts such as 'fox face on red background'.",
            inputs=[
                io.Combo.Input(
                    "reference",
                    options=host.demo.reference_names(),
                    tooltip="A picture of an emoji that no training saw, for the image output; or the batch of all 24.",
                ),
                io.Combo.Input(
                    "adapter",
                    options=list(host.demo.ADAPTERS),
                    tooltip="plus: sees layout and detail (16 tokens). base: sees the whole at a glance (4 tokens).",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
                io.ClipVision.Output(display_name="clip_vision"),
                Adapter.Output(display_name="adapter"),
                io.Image.Output(display_name="image"),
            ],
        )

    @classmethod
    def execute(cls, reference: str, adapter: str) -> io.NodeOutput:
        world = host.demo.load(adapter)
        picture = host.demo.reference(reference)
        return io.NodeOutput(world.model, world.clip, world.vae, world.vision, world.adapter, picture)
