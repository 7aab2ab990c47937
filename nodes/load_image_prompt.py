"""Load Image Prompt."""

from __future__ import annotations

from comfy_api.latest import io

from ..ipadapter_core import rules_for
from . import host
from .host.schema import schema
from .sockets import CATEGORY, Prompt, adapter_input, compatibility_input


class LoadImagePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptLoad",
            display_name="Load Image Prompt",
            category=CATEGORY,
            search_aliases=[
                "load embeds of ipadapter",
                "ipadpt",
                "saved reference",
            ],
            description="Loads saved references from output/image_prompts or models/image_prompts, and .ipadpt files of other "
            "tools also from input. No picture and, for files of Save Image Prompt, no image encoder is needed.",
            inputs=[
                adapter_input(),
                io.Combo.Input(
                    "file",
                    options=host.files.choices("image_prompts"),
                    tooltip="A file of Save Image Prompt, of IPAdapter Save Embeds or of diffusers (.safetensors, .ipadpt).",
                ),
                io.Boolean.Input(
                    "per_latent",
                    default=False,
                    tooltip="On: reference i of the file steers image i of the latent batch. Off: as it was saved (all references "
                    "steer every image, in files of other tools).",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The image encoder, only for files that do not hold what stands for no image, as .ipadpt files for plus "
                    "adapters; needed to combine these with other prompts.",
                ),
                compatibility_input(),
            ],
            outputs=[Prompt.Output(display_name="image_prompt")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **inputs: object) -> str:
        return host.files.fingerprint("image_prompts", file)

    @classmethod
    def execute(
        cls,
        adapter: host.adapters.ManagedAdapter,
        file: str,
        per_latent: bool,
        clip_vision: object | None = None,
        compatibility: str = "correct",
    ) -> io.NodeOutput:
        rules = rules_for(compatibility)
        return io.NodeOutput(
            host.adapters.load_image_prompt(adapter, file, clip_vision, per_latent=per_latent, rules=rules)
        )
