"""Extract LoRA."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from ..ipadapter_core.lora.convert import KEY_FORMATS
from ..ipadapter_core.lora.extract import extract
from ..ipadapter_core.lora.factors import Smaller
from ..ipadapter_core.lora.saving import save_lora
from . import host
from .host.schema import advanced, schema
from .sockets import LORA_CATEGORY


class ExtractLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = host.files.choices("checkpoints")
        return schema(
            node_id="ImagePromptLoRAExtract",
            display_name="Extract LoRA",
            category=LORA_CATEGORY,
            search_aliases=["lora from checkpoint", "svd", "difference", "subtract", "kohya"],
            description="Makes a LoRA of what a fine-tuned checkpoint differs from its base, and writes it to output/loras.",
            inputs=[
                io.Combo.Input("tuned", options=files, tooltip="The fine-tuned checkpoint."),
                io.Combo.Input(
                    "base", options=files, tooltip="The checkpoint that it was tuned from, of the same base model."
                ),
                io.Int.Input("rank", default=32, min=1, max=1024, tooltip="Largest rank: more is closer and larger."),
                advanced(
                    io.Float.Input(
                        "energy",
                        default=1.0,
                        min=0.01,
                        max=1.0,
                        step=0.01,
                        tooltip="Share of every layer's squared difference to keep; below 1 each layer gets the rank that it needs.",
                    )
                ),
                io.Combo.Input(
                    "spelling", options=list(KEY_FORMATS), tooltip="How names are written; kohya is read by every UI."
                ),
                io.String.Input(
                    "filename_prefix", default="extracted", tooltip="Name under output/loras; a number is added."
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, tuned: str, base: str, rank: int, energy: float, spelling: str, filename_prefix: str
    ) -> io.NodeOutput:
        paths = host.files.path("checkpoints", tuned), host.files.path("checkpoints", base)
        weights, errors = extract(
            *paths, Smaller(rank, energy), name=filename_prefix, progress=host.frontend.progress_bar()
        )
        facts = save_lora(
            weights,
            Path(host.access.free_path(filename_prefix, "loras", ".safetensors")),
            key_format=spelling,
            dtype="float16",
        )
        mean = sum(errors.values()) / len(errors)
        text = f"{facts['modules']} modules in {facts['file']}; relative error {mean:.2g} on average"
        return io.NodeOutput(facts["file"], ui=ui.PreviewText(text))
