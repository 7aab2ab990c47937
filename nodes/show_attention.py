"""Show Image Attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..ipadapter_core import InvalidInputError
from ..ipadapter_core.attention.map_pictures import draw_maps, draw_sites
from ..ipadapter_core.images.files import to_tensor
from . import host
from .host.schema import schema
from .sockets import CATEGORY, Recording

MOST_PICTURES = 16


class ShowAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptAttentionMaps",
            display_name="Show Image Attention",
            category=CATEGORY,
            search_aliases=[
                "attention map",
                "heat map",
                "where did the image act",
                "debug ipadapter",
                "saliency",
                "layer weights",
                "heatmap",
                "attention heatmap",
                "attention heat map",
            ],
            description="Shows where the references of image prompts acted in a picture: heat maps for the whole run and its stages, a bar "
            "for every attention of the model, and numbers. The picture must come from the sampler whose model is recorded.",
            inputs=[
                Recording.Input("recording", tooltip="From Record Image Attention."),
                io.Image.Input(
                    "image", tooltip="What was sampled, from VAE Decode; it also makes this node wait for the sampler."
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="What the sampler gave. Needed only where several samplers use the recorded model: it tells which run is shown.",
                ),
                io.Image.Input(
                    "references",
                    optional=True,
                    tooltip="The reference images in order, shown beside their maps if there are as many.",
                ),
                io.Boolean.Input(
                    "smooth",
                    default=True,
                    tooltip="On: soft between places. Off: squares, as the model has them.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Image.Output(display_name="heat_maps"),
                io.Image.Output(display_name="layers"),
                io.Mask.Output(display_name="maps"),
                io.String.Output(display_name="text"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        recording: host.recording.Recording,
        image: Tensor,
        latent: dict[str, Any] | None = None,
        references: Tensor | None = None,
        smooth: bool = True,
    ) -> io.NodeOutput:
        samples = None if latent is None else latent.get("samples")
        if latent is not None and not isinstance(samples, Tensor):
            raise InvalidInputError("latent holds no samples: connect the latent that a sampler gives")
        maps = recording.of(samples)
        fits = references is not None and len(references) == len(maps.references)
        shown = [picture_of(one) for one in references] if references is not None and fits else []
        sheets = [
            draw_maps(maps, picture_of(picture), shown, number, smooth=smooth)
            for number, picture in enumerate(image[:MOST_PICTURES])
        ]
        heat_maps = torch.stack([to_tensor(sheet) for sheet in sheets])
        layers = to_tensor(draw_sites(maps))[None]
        every = [maps.map(i) for i in range(len(maps.references))] or [maps.map()]
        size = tuple(image.shape[1:3])
        masks = F.interpolate(torch.cat(every)[None], size, mode="bilinear", align_corners=False)[0]
        text = maps.text()
        host.frontend.show_in_node(maps.summary(), cls.hidden.unique_id)
        pictures = [ui.PreviewImage(part, cls=cls).as_dict()["images"] for part in (heat_maps, layers)]
        return io.NodeOutput(
            heat_maps, layers, masks, text, ui={"images": [*pictures[0], *pictures[1]], "text": [text]}
        )


def picture_of(image: Tensor) -> Image.Image:
    """One of an IMAGE, ``y x c`` in 0..1."""
    return Image.fromarray((image[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
