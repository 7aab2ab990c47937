"""Save/Convert LoRA."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from ..ipadapter_core.lora.convert import KEY_FORMATS
from ..ipadapter_core.lora.factors import Smaller, resize
from ..ipadapter_core.lora.saving import DTYPES, save_lora
from ..ipadapter_core.lora.weights import left_out_lines
from . import host
from .host.schema import schema
from .sockets import LORA_CATEGORY


class SaveLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptLoRASave",
            display_name="Save/Convert LoRA",
            category=LORA_CATEGORY,
            search_aliases=["convert lora", "resize lora", "lora rank", "kohya", "diffusers", "peft"],
            description="Writes a LoRA in another key format, type or rank to output/loras, where LoRA lists find it.",
            inputs=[
                io.Combo.Input("file", options=host.files.choices("loras"), tooltip="The LoRA to convert."),
                io.String.Input(
                    "filename_prefix", default="converted", tooltip="Name under output/loras; a number is added."
                ),
                io.Combo.Input(
                    "spelling",
                    options=list(KEY_FORMATS),
                    tooltip="kohya: read by every UI. diffusers: PEFT's names, plain LoRA and DoRA only. generic: ComfyUI's own.",
                ),
                io.Combo.Input("dtype", options=list(DTYPES), tooltip="Type of the numbers; keep: as they are."),
                io.Int.Input(
                    "rank", default=0, min=0, max=1024, tooltip="Largest rank, the best of that size; 0: as it is."
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **inputs: object) -> str:
        return host.files.fingerprint("loras", file)

    @classmethod
    def execute(cls, file: str, filename_prefix: str, spelling: str, dtype: str, rank: int) -> io.NodeOutput:
        weights = host.lora.load(file).weights
        if rank:
            weights, _ = resize(weights, Smaller(rank))
        facts = save_lora(
            weights,
            Path(host.access.free_path(filename_prefix, "loras", ".safetensors")),
            key_format=spelling,
            dtype=dtype,
        )
        text = f"{facts['modules']} modules, {facts['bytes']:,} bytes in {facts['file']}"
        text = "\n".join((text, *(f"not written: {line}" for line in left_out_lines(weights.left_out))))
        return io.NodeOutput(facts["file"], ui=ui.PreviewText(text))
