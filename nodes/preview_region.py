"""Preview Region."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..ipadapter_core import InvalidInputError, RegionMask
from ..ipadapter_core.attention.region_pictures import draw_region, grids_of
from ..ipadapter_core.images.files import to_tensor
from . import host
from .host.schema import schema
from .show_attention import picture_of
from .sockets import CATEGORY

MOST_PICTURES = 16


class PreviewRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptPreviewRegion",
            display_name="Preview Region",
            category=CATEGORY,
            search_aliases=[
                "mask preview",
                "attention mask",
                "regional",
                "token grid",
                "mask resolution",
                "region mask",
                "two regions",
                "regions",
            ],
            description="Shows a region mask as the layers of a model see it: how much of every token lies inside, over the picture, at every "
            "resolution that the model has.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the region is for."),
                io.Mask.Input("mask", tooltip="The region (white), one mask or one per latent."),
                io.Latent.Input(
                    "latent", tooltip="What goes into the sampler, or comes from it: its size is that of the picture."
                ),
                io.Image.Input("image", optional=True, tooltip="The picture to show it over; grey without one."),
            ],
            outputs=[io.Image.Output(display_name="preview")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: object, mask: Tensor, latent: dict[str, Any], image: Tensor | None = None) -> io.NodeOutput:
        samples = latent.get("samples")
        if not isinstance(samples, Tensor) or samples.ndim < 4:
            raise InvalidInputError("latent holds no samples: connect the latent that goes into a sampler")
        size = int(samples.shape[-2]), int(samples.shape[-1])
        region = RegionMask.from_tensor(mask)
        grids = grids_of(host.adapters.layout(model).model.tokens, size)
        count = min(len(region.values), MOST_PICTURES)
        sheets = [to_tensor(draw_region(region, size, grids, _at(image, i), i)) for i in range(count)]
        preview = torch.stack(sheets)
        return io.NodeOutput(preview, ui=ui.PreviewImage(preview, cls=cls).as_dict())


def _at(image: Tensor | None, number: int) -> Image.Image | None:
    return None if image is None else picture_of(image[min(number, len(image) - 1)])
