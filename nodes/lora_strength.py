"""LoRA Strength."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import RegionMask, WeightSchedule, Window
from ..ipadapter_core.lora import Partial
from ..ipadapter_core.lora.block_vectors import check_where, parse_where
from ..ipadapter_core.lora.patch import MODES, Mode
from . import host
from .host.schema import advanced, schema
from .sockets import (
    LORA_CATEGORY,
    MODE_TOOLTIP,
    SELECTOR_TOOLTIP,
    Schedule,
    partial_input,
    strength_input,
    window_inputs,
)


class LoRAStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptLoRAStrength",
            display_name="LoRA Strength",
            category=LORA_CATEGORY,
            search_aliases=[
                "lora loader",
                "load lora",
                "block weight",
                "lora block weight",
                "lbw",
                "weights",
                "layers",
                "lora mask",
                "regional lora",
                "lora schedule",
                "lycoris",
                "locon",
                "dora",
                "lora by block",
                "lora by layer",
                "two loras in two regions",
                "lora region",
            ],
            description="Applies a LoRA of any format, exactly: by block and layer, over the steps, in a region. Chain the node for "
            "several; order does not matter.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that it acts on: any that ComfyUI loads. Masks work on UNets (SD1.5, SD2, SDXL), FLUX.1, FLUX.2, "
                    "Chroma, SD3, Qwen-Image, Z-Image, Lumina 2, Anima and Wan.",
                ),
                io.Combo.Input(
                    "file", options=host.files.choices("loras"), tooltip="A LoRA, LyCORIS or PEFT file in models/loras."
                ),
                strength_input("strength", "On the model."),
                strength_input("text_strength", "On the text encoders, if clip is connected."),
                io.String.Input("selector", default="", multiline=True, tooltip=SELECTOR_TOOLTIP),
                io.Combo.Input("mode", options=list(MODES), tooltip=MODE_TOOLTIP),
                *window_inputs("the LoRA"),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The text encoders; they are merged, as a prompt is encoded once."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture it acts (white); live only. On FLUX and its like, tokens of text take as much of it as of the "
                    "picture is white.",
                ),
                Schedule.Input(
                    "schedule", optional=True, tooltip="From Adapter Schedule: its curve over the steps; live only."
                ),
                advanced(
                    io.Float.Input(
                        "negative_strength",
                        optional=True,
                        default=1.0,
                        min=-20.0,
                        max=20.0,
                        step=0.05,
                        tooltip="Strength on the negative prompt's side as a share of the strength: 1 the same, 0 none; other than 1 "
                        "is live only.",
                    )
                ),
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
    def validate_inputs(cls, selector: str | None = None) -> bool | str:
        return host.inputs.valid((check_where, selector))

    @classmethod
    def fingerprint_inputs(cls, file: str, **inputs: object) -> str:
        return host.files.fingerprint("loras", file)

    @classmethod
    def execute(
        cls,
        model: object,
        file: str,
        strength: float,
        text_strength: float,
        selector: str,
        mode: Mode,
        start: float,
        end: float,
        clip: object | None = None,
        mask: Tensor | None = None,
        schedule: WeightSchedule | None = None,
        negative_strength: float = 1.0,
        partial: Partial = "refuse",
    ) -> io.NodeOutput:
        lora = host.lora.load(file)
        settings = {
            "strength": strength,
            "text_strength": text_strength,
            "uncond_strength": None if negative_strength == 1 else strength * negative_strength,
            "selector": parse_where(selector, lora.weights.base_model),
            "window": Window(start, end, schedule.curve if schedule else ()),
            "mask": None if mask is None else RegionMask.from_tensor(mask),
        }
        *outputs, shown = host.lora.apply(model, clip, lora, mode, partial, **settings)
        host.frontend.show_in_node(shown, cls.hidden.unique_id)
        return io.NodeOutput(*outputs)
