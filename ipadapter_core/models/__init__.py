"""Base models: one file per kind, with everything that is known of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from ..errors import IncompatibleAdapterError
from . import flux, sd3
from .anima import ANIMA
from .chroma import CHROMA
from .flux import FLUX
from .layers import LayerNames, Shapes, numbered_blocks, own_names
from .sd3 import SD3
from .sites import BaseModel, ModelLayout
from .unet import SD2, SD15, SDXL

BASE_MODELS: tuple[BaseModel, ...] = (SD15, SD2, SDXL, FLUX, CHROMA, SD3, ANIMA)
"""Every known family."""


def layout_of(model: nn.Module) -> ModelLayout:
    """The sites of a base model in diffusers' or ComfyUI's form (``UNet2DConditionModel``, ``UNetModel``).

    Raises IncompatibleAdapterError for a model of another family, or of one where image prompts cannot act.
    """
    layout, walked = _walked(model), [base for base in BASE_MODELS if base.walk]
    if layout is None:
        without = "".join(f"{base.name}, " for base in BASE_MODELS if not base.walk)
        raise IncompatibleAdapterError(
            f"the model is a {type(model).__name__}, which is of no family that image prompts of this pack know; they work with "
            f"the {listed(walked)} families (and fine-tunes such as Illustrious, NoobAI or Pony), not with {without}or others"
        )
    if not layout.sites:
        raise IncompatibleAdapterError(
            f"{type(model).__name__} has no attention that an image prompt could steer, as a model without text has none; "
            f"use a text-to-image model of the {listed(walked, 'or')} family"
        )
    return layout


def family_of(model: nn.Module) -> BaseModel:
    """The family of a model; one without a name, and with what most have, where its family has no walk, as no UNet is."""
    layout = _walked(model)
    return BaseModel(name="") if layout is None else layout.model


def _walked(model: nn.Module) -> ModelLayout | None:
    walks = dict.fromkeys(base.walk for base in BASE_MODELS if base.walk)
    return next((layout for walk in walks if (layout := walk(model)) is not None), None)


def listed(families: Iterable[BaseModel], last: str = "and") -> str:
    """Families by name, for sentences: ``SD1.5, SD2 and SDXL``."""
    *most, end = [base.name for base in families]
    return f"{', '.join(most)} {last} {end}" if most else end


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
