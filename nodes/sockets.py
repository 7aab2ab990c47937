"""Socket types of this pack and inputs that several nodes share.

The type names are ours: another pack's ``IPADAPTER`` carries objects that these nodes could not use.
"""

from __future__ import annotations

from typing import get_args

from comfy_api.latest import io

from ..ipadapter_core import COMPATIBILITIES, PRESETS, SCALINGS
from ..ipadapter_core.lora import PARTIAL
from ..ipadapter_core.prompt.combine import Combine
from .host.schema import advanced

CATEGORY = "image prompt"
LORA_CATEGORY = "image prompt/lora"

Adapter = io.Custom("IMAGE_PROMPT_ADAPTER")
Prompt = io.Custom("IMAGE_PROMPT")
FaceModel = io.Custom("IMAGE_PROMPT_FACE_MODEL")
Schedule = io.Custom("IMAGE_PROMPT_SCHEDULE")
Recording = io.Custom("IMAGE_PROMPT_RECORDING")
DrawnCurve = io.Custom("FLOAT,CURVE")
"""What other nodes draw: ComfyUI's curve, or a list of numbers for a FLOAT."""
LoRAList = io.Custom("LORA_STACK")
"""Other packs' too: a list of (name or path, strength on the model, strength on the text encoders)."""

COMBINE_TOOLTIP = (
    "How several references become one prompt. concat: every image keeps its own tokens. The others mix the encoder's "
    "features: add (sum), subtract (first minus the mean of the others), average, norm average (of directions), max, min."
)


def adapter_input() -> io.Input:
    return Adapter.Input("adapter", tooltip="From Load IP-Adapter.")


def model_input() -> io.Input:
    return io.Model.Input(
        "model",
        tooltip="A model of the family that the adapter was made for: SD1.5, SD2, SDXL, FLUX.1, Chroma, SD3.5 Large, Anima.",
    )


def negative_input() -> io.Input:
    return io.Image.Input("negative", optional=True, tooltip="An image to steer away from.")


def schedule_input(tooltip: str = "From Adapter Schedule.") -> io.Input:
    return Schedule.Input("schedule", optional=True, tooltip=tooltip)


def combine_input(default: str = "concat") -> io.Input:
    return io.Combo.Input("combine", options=list(get_args(Combine)), default=default, tooltip=COMBINE_TOOLTIP)


SELECTOR_TOOLTIP = (
    "Where it acts and how much, later entries win: 'all: 0, out3-5: 0.8', 'attn2 k: 0', 'in4: 1.2', 'ff: 0.5', 'te: 0', "
    "'*proj_in: 1'. Blocks of UNets in0-11, mid, out0-11; Flux, Flux.2, Chroma double0-18, single*; SD3 joint0; Z-Image "
    "layers0-29, noise_refiner*, context_refiner*; Qwen-Image, Wan, Anima and others block3; base is what is in none. Types attn, q, k, v, "
    "out, ff, mod, proj, resnet, conv; attn1 or self and attn2 or cross where there are two attentions; img and txt where "
    "picture and text have layers of their own. In fused layers q, k, v act on their own rows. Or a glob of the whole name: "
    "'*.attn2.to_k'. Also a block vector (12, 17, 20, 21, 26, 27, 58 numbers; for other transformers BASE and one for each "
    "block) or a preset such as SD-OUTALL. Empty: everywhere 1."
)
STRENGTH_TOOLTIP = "0: exactly the plain model, 1: as trained, below 0: the opposite, above 1: exaggerated."
MODE_TOOLTIP = (
    "live: beside the layers, no weight is written, a changed strength costs nothing; needed for schedules, masks and the "
    "negative strength. merged: into the weights, costs nothing per step. auto: merged where possible and cheap."
)


def partial_input() -> io.Input:
    return advanced(
        io.Combo.Input(
            "partial",
            options=list(PARTIAL),
            default="refuse",
            optional=True,
            tooltip="What happens with a file of which much has no place in the model (more than 6 % of a part's modules, or all of a "
            "kind of layer). refuse: the node stops and says what is missing. allow: the rest is applied.",
        )
    )


def strength_input(name: str, what: str) -> io.Input:
    return io.Float.Input(name, default=1.0, min=-20.0, max=20.0, step=0.05, tooltip=f"{what} {STRENGTH_TOOLTIP}")


def clip_vision_input() -> io.Input:
    return io.ClipVision.Input(
        "clip_vision",
        tooltip="The image encoder that the adapter was trained with; Inspect Adapter names it. "
        "Most need CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors. From Load CLIP Vision, or of any kind from Load Image Encoder.",
    )


def second_encoder_input() -> io.Input:
    return io.ClipVision.Input(
        "clip_vision_2",
        optional=True,
        tooltip="A second image encoder, only for adapters that read two: InstantCharacter needs SigLIP and DINOv2 giant, in any "
        "order. Others do not look at it.",
    )


def per_latent_input() -> io.Input:
    return advanced(
        io.Boolean.Input(
            "per_latent",
            default=False,
            tooltip="On: reference i steers image i of the latent batch. Off: all references steer every image.",
        )
    )


def region_input() -> io.Input:
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="Where in the picture the image acts (white), soft edges allowed; one mask, or one per latent.",
    )


def window_inputs(what: str) -> list[io.Input]:
    """Start and end of the sampling progress in which ``what`` acts."""
    return [
        io.Float.Input(
            "start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip=f"Sampling progress at which {what} begins to act (0: first step).",
        ),
        io.Float.Input(
            "end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip=f"Sampling progress after which {what} no longer acts (1: last step).",
        ),
    ]


def steering_inputs() -> list[io.Input]:
    """How much, where in the model, and when: the keyword arguments of ``host.adapters.steer``."""
    return [
        io.Float.Input(
            "strength",
            default=1.0,
            min=-5.0,
            max=5.0,
            step=0.05,
            tooltip="How much the image steers: 0 not at all (exactly the plain model), 1 as trained, 0.5–0.8 leaves "
            "room for the text, below 0 steers away.",
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            tooltip="Where in the model the image acts, and how strongly there: linear is everywhere; style transfer and "
            "composition pick the layers that carry these; the precise ones also push the other part away.",
        ),
        advanced(
            io.Combo.Input(
                "scaling",
                options=list(SCALINGS),
                tooltip="What the strength multiplies: V only (the trained rule), keys too (softer below 1), with a penalty for "
                "narrow layers, or keys and the mean of V.",
            )
        ),
        *window_inputs("the image"),
    ]


def compatibility_input() -> io.Input:
    return advanced(
        io.Combo.Input(
            "compatibility",
            options=list(COMPATIBILITIES),
            default="correct",
            optional=True,
            tooltip="correct: as the adapters were trained. IPAdapter_plus: the picture that ComfyUI_IPAdapter_plus makes with "
            "these settings, its errors included; set it on both the encode and the apply node. IPAdapter-Flux: InstantX' FLUX adapter "
            "with the formula of Shakker's node, which norms values too.",
        )
    )
