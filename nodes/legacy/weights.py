"""Weights over frames, and regional parameters: values that the apply nodes take."""

from __future__ import annotations

from numbers import Real
from typing import Any, cast, get_args

from torch import Tensor

from ...ipadapter_core import InvalidInputError
from ...ipadapter_core.legacy.frame_weights import Method, Timing, WeightsStrategy
from ...ipadapter_core.legacy.settings import todays_option
from .sockets import (
    CONDITIONING,
    IMAGE,
    MASK,
    PARAMS,
    STRATEGY,
    Inputs,
    LegacyNode,
    choice,
    integer,
    number,
    weight_type,
    window,
)

FRAME_COUNTS = ("frames", "start_frame", "end_frame", "add_starting_frames", "add_ending_frames")
PARAM_NAMES = ("image", "attn_mask", "weight", "weight_type", "start_at", "end_at")


class IPAdapterWeights(LegacyNode):
    REPLACEMENT = "this node still, into per_latent strengths"
    RETURN_TYPES = ("FLOAT", "FLOAT", "INT", "IMAGE", "IMAGE", "WEIGHTS_STRATEGY")
    RETURN_NAMES = ("weights", "weights_invert", "total_frames", "image_1", "image_2", "weights_strategy")
    FUNCTION = "weights"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        counts = {name: integer(9999 if name == "end_frame" else 0, 0, 9999) for name in FRAME_COUNTS}
        later = {name: counts.pop(name) for name in FRAME_COUNTS[3:]}
        return {
            "required": {
                "weights": ("STRING", {"default": "1.0, 0.0", "multiline": True}),
                "timing": choice(get_args(Timing), "linear"),
                **counts,
            },
            "optional": {**later, "method": choice(get_args(Method), "full batch"), "image": IMAGE},
        }

    def weights(
        self, weights: str = "", timing: Timing = "custom", frames: int = 0, start_frame: int = 0, end_frame: int = 9999,
        add_starting_frames: int = 0, add_ending_frames: int = 0, method: Method = "full batch",
        weights_strategy: dict[str, Any] | None = None, image: Tensor | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        timing = todays_option("timing", timing)
        if weights_strategy is None:
            count = 0 if image is None else len(image)
            strategy = WeightsStrategy(
                weights, timing, frames, start_frame, end_frame, add_starting_frames, add_ending_frames, method, count
            )
        else:
            strategy = WeightsStrategy.from_mapping(weights_strategy)
        values, first, second = strategy.frames_of(image)
        return values, values[::-1], len(values), first, second, strategy.as_mapping()


class IPAdapterWeightsFromStrategy(IPAdapterWeights):
    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"weights_strategy": STRATEGY}, "optional": {"image": IMAGE}}


class IPAdapterPromptScheduleFromWeightsStrategy(LegacyNode):
    REPLACEMENT = "this node still"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("prompt_schedule",)
    FUNCTION = "prompt_schedule"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"weights_strategy": STRATEGY, "prompt": ("STRING", {"default": "", "multiline": True})}}

    def prompt_schedule(self, weights_strategy: dict[str, Any], prompt: str = "") -> tuple[str]:
        return (WeightsStrategy.from_mapping(weights_strategy).prompt_schedule(prompt),)


class IPAdapterCombineWeights(LegacyNode):
    REPLACEMENT = "this node still"
    RETURN_TYPES = ("FLOAT", "INT")
    RETURN_NAMES = ("weights", "count")
    FUNCTION = "combine"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"weights_1": number(0.0, 0.0, 1.0), "weights_2": number(0.0, 0.0, 1.0)}}

    def combine(self, weights_1: Any, weights_2: Any) -> tuple[list[float], int]:
        lists = (cast("list[float]", w) if isinstance(w, list) else [w] for w in (weights_1, weights_2))
        both = [w for weights in lists for w in weights]
        return both, len(both)


class IPAdapterRegionalConditioning(LegacyNode):
    REPLACEMENT = "one Apply Adapter to Model with a mask per region"
    RETURN_TYPES = ("IPADAPTER_PARAMS", "CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("IPADAPTER_PARAMS", "POSITIVE", "NEGATIVE")
    FUNCTION = "conditioning"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "image": IMAGE,
                "image_weight": number(1.0, -1.0, 3.0),
                "prompt_weight": number(1.0, 0.0, 10.0),
            }
            | weight_type()
            | window(),
            "optional": {"mask": MASK, "positive": CONDITIONING, "negative": CONDITIONING},
        }

    def conditioning(
        self, image: Tensor, image_weight: float, prompt_weight: float, weight_type: str, start_at: float, end_at: float,
        mask: Tensor | None = None, positive: Any = None, negative: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        for conds in (positive, negative):
            if conds is not None and not all(map(_is_conditioning, conds)):
                raise InvalidInputError("positive or negative is no conditioning: connect CLIP Text Encode or its like")
        if mask is not None:
            region = {"mask": mask, "set_area_to_bounds": False, "mask_strength": prompt_weight}
            positive, negative = (
                None if conds is None else [[cond, {**more, **region}] for cond, more in conds]
                for conds in (positive, negative)
            )
        values = (image, mask, image_weight, weight_type, start_at, end_at)
        return {name: [value] for name, value in zip(PARAM_NAMES, values, strict=True)}, positive, negative


class IPAdapterCombineParams(LegacyNode):
    REPLACEMENT = "one Apply Adapter to Model per region"
    RETURN_TYPES = ("IPADAPTER_PARAMS",)
    FUNCTION = "combine"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"params_1": PARAMS, "params_2": PARAMS},
            "optional": {f"params_{i}": PARAMS for i in range(3, 6)},
        }

    def combine(
        self, params_1: Any, params_2: Any, params_3: Any = None, params_4: Any = None, params_5: Any = None
    ) -> tuple[dict[str, Any]]:
        given = [params for params in (params_1, params_2, params_3, params_4, params_5) if params is not None]
        rows = [row for params in given for row in rows_of(params)]
        return ({name: [row[i] for row in rows] for i, name in enumerate(PARAM_NAMES)},)


def _is_conditioning(value: Any) -> bool:
    match value:
        case [_, dict()]:
            return True
        case _:
            return False


def rows_of(params: Any) -> list[tuple[Any, ...]]:
    """What IPADAPTER_PARAMS hold, a row of PARAM_NAMES for each region.

    Raises InvalidInputError for anything else: a graph may hold a table of its own making.
    """
    table = cast("dict[str, Any]", params) if isinstance(params, dict) else {}
    columns: list[Any] = [table.get(name) for name in PARAM_NAMES]
    rows: list[tuple[Any, ...]] = []
    if all(isinstance(column, list) for column in columns):
        rows = list(zip(*columns, strict=False))
    kinds = (Tensor, Tensor, (Real, list, tuple), str, Real, Real)
    known = all(
        isinstance(value, kind) or (value is None and kind is Tensor)
        for row in rows
        for value, kind in zip(row, kinds, strict=True)
    )
    if not rows or not known or any(len(column) != len(rows) for column in columns):
        raise InvalidInputError(
            "ipadapter_params does not hold lists of equal length for image, weight, weight_type, start_at, end_at and "
            "attn_mask; connect IPAdapter Regional Conditioning or IPAdapter Combine Params"
        )
    return rows
