"""Chroma: the blocks of FLUX.1 with one network that makes the modulations of all of them from timestep and guidance.

No image adapter was trained for it. Those of FLUX.1 fit by shape, and what they do here is an experiment.
"""

from __future__ import annotations

from torch import nn

from .flux import ATTENTION, FEED_FORWARD, FLUX, INPUTS, OUTPUTS, SINGLE, sites_of, streams, text_width
from .naming import Blocks, Naming, Signs, layer
from .sites import BaseModel, ModelLayout


def walk_chroma(model: nn.Module) -> ModelLayout | None:
    """The layout of a Chroma transformer; None for another model, also for Chroma Radiance, whose tokens are other patches."""
    latents = getattr(model, "img_in", None) or getattr(model, "x_embedder", None)
    if not hasattr(model, "distilled_guidance_layer") or latents is None:
        return None
    sites = sites_of(model)
    return ModelLayout(CHROMA, text_width(model), sites) if sites else None


_GUIDANCE = "distilled_guidance_layer"
NAMES = Naming(
    "Chroma",
    original=Signs(("double_blocks.0.img_attn.qkv", f"{_GUIDANCE}.in_proj")),
    diffusers=Signs(("transformer_blocks.0.attn.to_q", f"{_GUIDANCE}.in_proj")),
    lists=(
        Blocks("double_blocks", "transformer_blocks", "double", (*ATTENTION, *FEED_FORWARD), counts=(19,)),
        Blocks("single_blocks", "single_transformer_blocks", "single", SINGLE, counts=(38,)),
        Blocks(
            f"{_GUIDANCE}.layers",
            f"{_GUIDANCE}.layers",
            "guidance",
            (layer("in_layer", "linear_1", "mod"), layer("out_layer", "linear_2", "mod")),
        ),
    ),
    ends=(
        *INPUTS,
        layer(f"{_GUIDANCE}.in_proj", f"{_GUIDANCE}.in_proj", "mod"),
        layer(f"{_GUIDANCE}.out_proj", f"{_GUIDANCE}.out_proj", "mod"),
        OUTPUTS[0],
    ),
    widths=(3072,),
)
CHROMA = BaseModel(
    name="Chroma",
    walk=walk_chroma,
    groups=FLUX.groups,
    negative="apart",
    reference_width=FLUX.reference_width,
    naming=NAMES,
    streams=streams,
    steps=35,
    guidance=5.0,
)
