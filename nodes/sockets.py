"""Socket types of this pack and inputs that several nodes share.

The type names are ours: another pack's ``IPADAPTER`` carries objects that these nodes could not use.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..ipadapter_core import COMPATIBILITIES

CATEGORY = "image prompt"

Adapter = io.Custom("IMAGE_PROMPT_ADAPTER")
Prompt = io.Custom("IMAGE_PROMPT")
Schedule = io.Custom("IMAGE_PROMPT_SCHEDULE")

COMBINE_TOOLTIP = (
    "How several references become one prompt. concat: every image keeps its own tokens. The others mix the encoder's "
    "features: add (sum), subtract (first minus the mean of the others), average, norm average (of directions), max, min."
)


def adapter_input() -> io.Input:
    return Adapter.Input("adapter", tooltip="From Load IP-Adapter.")


def combine_input(default: str = "concat") -> io.Input:
    options = ["concat", "add", "subtract", "average", "norm average", "max", "min"]
    return io.Combo.Input("combine", options=options, default=default, tooltip=COMBINE_TOOLTIP)


def compatibility_input() -> io.Input:
    return io.Combo.Input(
        "compatibility",
        options=list(COMPATIBILITIES),
        default="correct",
        optional=True,
        tooltip="correct: as the adapters were trained. IPAdapter_plus: the picture that ComfyUI_IPAdapter_plus makes with "
        "these settings, its errors included; set it on both the encode and the apply node.",
    )
