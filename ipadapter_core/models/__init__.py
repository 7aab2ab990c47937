"""Base models: one file per kind, with everything that is known of it."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..errors import IncompatibleAdapterError
from . import flux, sd3
from .flux import FLUX
from .layers import LayerNames, Shapes, numbered_blocks, own_names
from .sd3 import SD3
from .sites import BaseModel, ModelLayout
from .unet import SD2, SD15, SDXL

BASE_MODELS: tuple[BaseModel, ...] = (SD15, SD2, SDXL, FLUX, SD3)
"""Every known family."""


def layout_of(model: nn.Module) -> ModelLayout:
    """The sites of a base model in diffusers' or ComfyUI's form (``UNet2DConditionModel``, ``UNetModel``).

    Raises IncompatibleAdapterError for a model of another family, or of one where image prompts cannot act.
    """
    *most, last = [base.name for base in BASE_MODELS if base.walk]
    families = f"{', '.join(most)} {{}} {last}"
    for walk in dict.fromkeys(base.walk for base in BASE_MODELS):
        layout = None if walk is None else walk(model)
        if layout is not None:
            if not layout.sites:
                raise IncompatibleAdapterError(
                    f"{type(model).__name__} is a UNet without cross-attention, so there is nothing an image prompt "
                    f"could steer; use a text-to-image model of the {families.format('or')} family"
                )
            return layout
    others = [base.name for base in BASE_MODELS if not base.walk]
    raise IncompatibleAdapterError(
        f"the model is a {type(model).__name__}, which has no UNet cross-attention; image prompts of this pack work with "
        f"the {families.format('and')} families (and fine-tunes such as Illustrious, NoobAI or Pony), "
        f"not with {', '.join(others)} or other transformers"
    )


def marked(names: Collection[str]) -> list[BaseModel]:
    """The families that alone have such layers, by underscored names."""
    return [base for base in BASE_MODELS if base.marks and any(map(base.marks.search, names))]


def names_of_layers(model: nn.Module, shapes: Shapes) -> LayerNames:
    """All names of a UNet's or transformer's layers; of an unknown model, its own paths. ``shapes`` are those of the weights."""
    for name_layers in dict.fromkeys(base.layers for base in BASE_MODELS):
        named = None if name_layers is None else name_layers(model, shapes)
        if named is not None:
            return named
    return LayerNames("unknown", own_names(shapes), {}, numbered_blocks(shapes, sd3.BLOCKS | flux.BLOCKS))
