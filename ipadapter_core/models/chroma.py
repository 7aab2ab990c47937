"""Chroma: the blocks of FLUX.1 with one network that makes the modulations of all of them from timestep and guidance.

No image adapter was trained for it. Those of FLUX.1 fit by shape, and what they do here is an experiment.
"""

from __future__ import annotations

from torch import nn

from .flux import FLUX, name_layers, sites_of, text_width
from .sites import BaseModel, ModelLayout


def walk_chroma(model: nn.Module) -> ModelLayout | None:
    """The layout of a Chroma transformer; None for another model, also for Chroma Radiance, whose tokens are other patches."""
    latents = getattr(model, "img_in", None) or getattr(model, "x_embedder", None)
    if not hasattr(model, "distilled_guidance_layer") or latents is None:
        return None
    sites = sites_of(model)
    return ModelLayout(CHROMA, text_width(model), sites) if sites else None


CHROMA = BaseModel(
    name="Chroma",
    walk=walk_chroma,
    negative="apart",
    reference_width=FLUX.reference_width,
    layers=name_layers,
    steps=35,
    guidance=5.0,
)
