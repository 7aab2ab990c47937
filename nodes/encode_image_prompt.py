"""Encode Image Prompt."""

from __future__ import annotations

from typing import get_args

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import EncodeOptions, parse_numbers, rules_for
from ..ipadapter_core.features import Crop
from ..ipadapter_core.prompt.combine import Combine
from ..ipadapter_core.prompt.options import PromptCrop, Unconditional
from . import host
from .host.schema import advanced, schema
from .sockets import (
    CATEGORY,
    Prompt,
    adapter_input,
    clip_vision_input,
    combine_input,
    compatibility_input,
    negative_input,
    per_latent_input,
    second_encoder_input,
)


class EncodeImagePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptEncode",
            display_name="Encode Image Prompt",
            category=CATEGORY,
            search_aliases=[
                "ipadapter",
                "ip adapter",
                "ip-adapter",
                "ipadapter encoder",
                "reference",
                "image reference",
                "reference image",
                "clip vision encode",
                "image to prompt",
                "image to image prompt",
                "several references",
            ],
            description="Turns reference images into an image prompt for one adapter. A batch of images is several references.",
            inputs=[
                adapter_input(),
                clip_vision_input(),
                io.Image.Input("image", tooltip="One or more reference images, of any size."),
                io.Combo.Input(
                    "crop",
                    options=[*get_args(Crop), "tiles", "auto"],
                    default="auto",
                    tooltip="How a reference that is not square becomes the encoder's square. auto: as the adapter was trained. Else "
                    "keep one part, pad with the encoder's mean colour, or stretch. tiles: all of it, as several squares along "
                    "the long side, each encoded alone; with concat every tile keeps its own tokens.",
                ),
                combine_input(),
                io.String.Input(
                    "strengths",
                    default="",
                    tooltip="Strength of each reference, such as '1, 0.5'; one number: of all; empty: all 1. 0 is no image, below 0 "
                    "steers away.",
                ),
                advanced(
                    io.Combo.Input(
                        "unconditional",
                        options=list(get_args(Unconditional)),
                        tooltip="What the negative prompt sees instead of the image. auto: as in the adapter's training. "
                        "black: an encoded black image, as ComfyUI_IPAdapter_plus had it for plus adapters. same: the image too. off: "
                        "nothing, as if there were no adapter.",
                    )
                ),
                per_latent_input(),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Part of the reference that counts (white); same size as the image."
                ),
                negative_input(),
                compatibility_input(),
                second_encoder_input(),
            ],
            outputs=[Prompt.Output(display_name="image_prompt")],
        )

    @classmethod
    def validate_inputs(cls, strengths: str | None = None) -> bool | str:
        return host.inputs.valid((parse_numbers, strengths))

    @classmethod
    def execute(
        cls,
        adapter: host.adapters.ManagedAdapter,
        clip_vision: object,
        image: Tensor,
        crop: PromptCrop,
        combine: Combine,
        strengths: str,
        unconditional: Unconditional,
        per_latent: bool,
        mask: Tensor | None = None,
        negative: Tensor | None = None,
        compatibility: str = "correct",
        clip_vision_2: object | None = None,
    ) -> io.NodeOutput:
        values = parse_numbers(strengths)
        options = EncodeOptions(
            crop=crop, combine=combine, unconditional=unconditional, per_latent=per_latent,
            strengths=values * len(image) if len(values) == 1 else values or None, rules=rules_for(compatibility),
        )  # fmt: skip
        prompt = host.adapters.encode(
            adapter, clip_vision, image, options, masks=mask, negative=negative, second=clip_vision_2
        )
        return io.NodeOutput(prompt)
