"""Apply Tiled Image to Model."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import WeightSchedule, rules_for
from ..ipadapter_core.images.tiles import tiles_in_place
from . import host
from .sockets import (
    CATEGORY,
    Schedule,
    adapter_input,
    clip_vision_input,
    combine_input,
    compatibility_input,
    per_latent_input,
    region_input,
    steering_inputs,
)


class ApplyTiledImageToModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImagePromptApplyTiled",
            display_name="Apply Tiled Image to Model",
            category=CATEGORY,
            description="Cuts a reference into squares and lets each steer its own part of the picture: for references that are not "
            "square, and for more detail in its place.",
            inputs=[
                io.Model.Input("model", tooltip="A model of the SD1.5, SD2 or SDXL family."),
                adapter_input(),
                clip_vision_input(),
                io.Image.Input(
                    "image", tooltip="The reference; of several of one size, tiles in the same place are combined."
                ),
                *steering_inputs(),
                combine_input(),
                per_latent_input(),
                io.Float.Input(
                    "sharpening",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Sharpens the tiles before they are encoded; 0: not.",
                ),
                region_input(),
                io.Image.Input("negative", optional=True, tooltip="An image to steer away from."),
                Schedule.Input("schedule", optional=True, tooltip="From Adapter Schedule."),
                compatibility_input(),
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
        strength: float,
        preset: str,
        scaling: str,
        start: float,
        end: float,
        combine: str,
        per_latent: bool,
        sharpening: float,
        mask: Tensor | None = None,
        negative: Tensor | None = None,
        schedule: WeightSchedule | None = None,
        compatibility: str = "correct",
    ) -> io.NodeOutput:
        rules = rules_for(compatibility)
        tiles, regions = tiles_in_place(image, mask, sharpening, rules)
        settings = (schedule or WeightSchedule()).steering(strength, preset, scaling, start, end)
        options = {"combine": combine, "per_latent": per_latent, "negative": negative, "compatibility": compatibility}
        for tile, region in zip(tiles, regions, strict=True):
            prompt = host.adapters.encode(adapter, clip_vision, tile, **options)
            model, _ = host.adapters.apply(model, adapter, prompt, settings, region, rules)
        return io.NodeOutput(model, torch.cat(tiles), torch.cat(regions))
