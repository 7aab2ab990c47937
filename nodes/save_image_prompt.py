"""Save Image Prompt."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..ipadapter_core import ImagePrompt, save_prompt
from ..ipadapter_core.prompt.embeds import EXTENSION
from . import host
from .host.schema import schema
from .sockets import CATEGORY, Prompt


class SaveImagePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptSave",
            display_name="Save Image Prompt",
            category=CATEGORY,
            search_aliases=[
                "save embeds of ipadapter",
                "ipadpt",
                "keep reference",
            ],
            description="Writes what the image encoder saw in the references to output/image_prompts, to use again or to share. "
            "The file serves every adapter that reads the same of the same encoder; the pictures are not in it.",
            inputs=[
                Prompt.Input(
                    "image_prompt", tooltip="From Encode Image Prompt, Encode Face Prompt or Combine Image Prompts."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="image_prompt",
                    tooltip="Name under output/image_prompts, folders allowed; a number is added.",
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image_prompt: ImagePrompt, filename_prefix: str) -> io.NodeOutput:
        path = save_prompt(host.access.free_path(filename_prefix, "image_prompts", EXTENSION), image_prompt)
        count = image_prompt.features.shape[0] * image_prompt.features.shape[1]
        text = f"{count} reference{'s' if count > 1 else ''}, {path.stat().st_size:,} bytes in {path}"
        return io.NodeOutput(str(path), ui=ui.PreviewText(text))
