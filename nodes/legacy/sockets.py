"""Inputs that the old pack's nodes share, in its names and order, and the class they all derive from.

Old workflows store widget values by position, so nothing here may be reordered. Widgets that the old pack added later
stand at the head of the optional inputs: a graph from before then has no value for them and still runs.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ...ipadapter_core import SCALINGS
from ...ipadapter_core.errors import quoted
from ...ipadapter_core.legacy.settings import COMBINE_METHODS, WEIGHT_TYPES, todays_option

CATEGORY = "image prompt/old names"

Inputs = dict[str, Any]

MODEL, ADAPTER, IMAGE, MASK = ("MODEL",), ("IPADAPTER",), ("IMAGE",), ("MASK",)
CLIP_VISION, INSIGHTFACE, EMBEDS, PARAMS = ("CLIP_VISION",), ("INSIGHTFACE",), ("EMBEDS",), ("IPADAPTER_PARAMS",)
CONDITIONING, STRATEGY = ("CONDITIONING",), ("WEIGHTS_STRATEGY",)


def number(default: float, low: float, high: float, step: float = 0.05, **more: Any) -> tuple[str, Inputs]:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step} | more


def integer(default: int, low: int, high: int) -> tuple[str, Inputs]:
    return "INT", {"default": default, "min": low, "max": high, "step": 1}


def choice(options: Any, default: str | None = None, **more: Any) -> tuple[list[str], Inputs]:
    return list(options), ({"default": default} if default else {}) | more


def former(kind: str, what: str) -> tuple[str, Inputs]:
    """An input that the old pack has given up: a socket, so that it takes no widget's place in saved graphs."""
    return kind, {"forceInput": True, "tooltip": f"Only for old graphs: {what}."}


def weight(high: float = 5.0) -> Inputs:
    return {"weight": number(1.0, -1.0, high)}


def window() -> Inputs:
    return {"start_at": number(0.0, 0.0, 1.0, 0.001), "end_at": number(1.0, 0.0, 1.0, 0.001)}


def weight_type() -> Inputs:
    return {"weight_type": choice(WEIGHT_TYPES)}


def combine(default: str | None = None) -> Inputs:
    return {"combine_embeds": choice(COMBINE_METHODS, default)}


def scaling() -> Inputs:
    return {"embeds_scaling": choice(SCALINGS)}


def batch_size() -> Inputs:
    return {"encode_batch_size": integer(0, 0, 4096)}


def compatibility() -> Inputs:
    return {
        "compatibility": choice(
            ("IPAdapter_plus", "correct"),
            tooltip="IPAdapter_plus: the same picture as from the old pack. correct: with its errors mended (the middle "
            "block, the picture that stands for no image, masks, norm average; see the documentation).",
        )
    }


EXTRAS: Inputs = {"image_negative": IMAGE, "attn_mask": MASK, "clip_vision": CLIP_VISION}


class LegacyNode:
    """A class type of another pack, ``PACK``; ``REPLACEMENT`` says what takes its place."""

    PACK: ClassVar[str] = "ComfyUI_IPAdapter_plus"
    CATEGORY = CATEGORY
    DEPRECATED = True
    FUNCTION: ClassVar[str]
    """The name of the method that runs it."""
    REPLACEMENT = "Encode Image Prompt and Apply Adapter to Model"

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.DESCRIPTION = f"Here so that workflows made for {cls.PACK} run. New graphs: {cls.REPLACEMENT}."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {}

    @classmethod
    def VALIDATE_INPUTS(cls, weight_type: Any = None, interpolation: Any = None, timing: Any = None) -> bool | str:
        """Let options pass that the old pack had once; ComfyUI does not look at the lists of inputs named here itself."""
        types = cls.INPUT_TYPES()
        inputs = {**types.get("required", {}), **types.get("optional", {})}
        for name, value in (("weight_type", weight_type), ("interpolation", interpolation), ("timing", timing)):
            if value is not None and name in inputs and todays_option(name, value) not in inputs[name][0]:
                return f"{name} is {quoted(value)}; choose one of: {', '.join(inputs[name][0])}"
        return True
