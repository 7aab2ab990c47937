"""LoRA Stack."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ipadapter_core.lora import Partial
from ..ipadapter_core.lora.patch import MODES, Mode
from . import host
from .host.schema import schema
from .sockets import LORA_CATEGORY, MODE_TOOLTIP, STRENGTH_TOOLTIP, partial_input

ROWS = 5
NONE = "none"


class LoRAStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [NONE, *host.files.names("loras")]
        rows: list[io.Input] = []
        for i in range(1, ROWS + 1):
            rows += [
                io.Boolean.Input(f"on_{i}", default=True, tooltip=f"Whether row {i} acts."),
                io.Combo.Input(f"file_{i}", options=files, default=NONE, tooltip="A LoRA in models/loras, or none."),
                io.Float.Input(
                    f"strength_{i}", default=1.0, min=-20.0, max=20.0, step=0.05, tooltip=f"Row {i}. {STRENGTH_TOOLTIP}"
                ),
            ]
        return schema(
            node_id="ImagePromptLoRAStack",
            display_name="LoRA Stack",
            category=LORA_CATEGORY,
            search_aliases=[
                "power lora",
                "power lora loader",
                "lora loader",
                "multi lora",
                "several loras",
                "lora stacker",
            ],
            description="Up to five LoRAs in rows, each switched and weighted; chain the node for more.",
            inputs=[
                io.Model.Input("model", tooltip="The model that they act on."),
                io.Combo.Input("mode", options=list(MODES), tooltip=MODE_TOOLTIP),
                *rows,
                io.Clip.Input("clip", optional=True, tooltip="The text encoders, at the same strengths."),
                partial_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return host.files.fingerprint("loras", *(file for file, _ in _rows(inputs)))

    @classmethod
    def execute(
        cls, model: object, mode: Mode, clip: object | None = None, partial: Partial = "refuse", **inputs: Any
    ) -> io.NodeOutput:
        reports: list[str] = []
        shown: list[str] = []
        for file, strength in _rows(inputs):
            loaded = host.lora.load(file)
            model, clip, report, part = host.lora.apply(model, clip, loaded, mode, partial, strength=strength)
            reports.append(report)
            shown.append(part)
        host.frontend.show_in_node("\n".join(shown), cls.hidden.unique_id)
        return io.NodeOutput(model, clip, "\n".join(reports) or "no row is on")


def _rows(inputs: dict[str, Any]) -> list[tuple[str, float]]:
    """File and strength of every row that acts."""
    rows = ((inputs[f"on_{i}"], inputs[f"file_{i}"], inputs[f"strength_{i}"]) for i in range(1, ROWS + 1))
    return [(file, strength) for on, file, strength in rows if on and file not in (NONE, None) and strength != 0]
