"""Apply Tiled Image to Model."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import EncodeOptions, WeightSchedule, rules_for
from ..ipadapter_core.images.tiles import tiles_in_place
from ..ipadapter_core.prompt.combine import Combine
from . import host
from .host.schema import advanced, schema
from .sockets import (
    CATEGORY,
    adapter_input,
    clip_vision_input,
    combine_input,
    compatibility_input,
    model_input,
    negative_input,
    per_latent_input,
    region_input,
    schedule_input,
    second_encoder_input,
    steering_inputs,
)


class ApplyTiledImageToModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptApplyTiled",
            display_name="Apply Tiled Image to Model",
            category=CATEGORY,
            search_aliases=["ipadapter tiled", "ip adapter", "tile", "tiles", "panorama", "reference image"],
            description="Cuts a reference into squares and lets each steer its own part of the picture: for references that are not "
            "square, and for more detail in its place.",
            inputs=[
                model_input(),
                adapter_input(),
                clip_vision_input(),
                io.Image.Input(
                    "image", tooltip="The reference; of several of one size, tiles in the same place are combined."
                ),
                *steering_inputs(),
                combine_input(),
                per_latent_input(),
                advanced(
                    io.Float.Input(
                        "sharpening",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=0.05,
                        tooltip="Sharpens the tiles before they are encoded; 0: not.",
                    )
                ),
                region_input(),
                negative_input(),
                schedule_input(),
                compatibility_input(),
                second_encoder_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Image.Output(display_name="tiles"),
                io.Mask.Output(display_name="masks"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        adapter: host.adapters.ManagedAdapter,
        clip_vision: object,
        image: Tensor,
        combine: Combine,
        per_latent: bool,
        sharpening: float,
        mask: Tensor | None = None,
        negative: Tensor | None = None,
        schedule: WeightSchedule | None = None,
        compatibility: str = "correct",
        clip_vision_2: object | None = None,
        **steering: Any,
    ) -> io.NodeOutput:
        rules = rules_for(compatibility)
        tiles, regions = tiles_in_place(image, mask, sharpening, rules)
        options = EncodeOptions(combine=combine, per_latent=per_latent, rules=rules)
        for tile, region in zip(tiles, regions, strict=True):
            prompt = host.adapters.encode(adapter, clip_vision, tile, options, negative=negative, second=clip_vision_2)
            model = host.adapters.steer(model, adapter, prompt, region, schedule, compatibility, **steering)
        return io.NodeOutput(model, torch.cat(tiles), torch.cat(regions))
