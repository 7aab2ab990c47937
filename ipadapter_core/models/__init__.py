"""Base models: one file per kind, with everything that is known of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import IncompatibleAdapterError
from .sites import BaseModel, ModelLayout
from .unet import SD2, SD15, SDXL

BASE_MODELS: tuple[BaseModel, ...] = (SD15, SD2, SDXL)
"""Every known family."""


def layout_of(model: nn.Module, base_models: Sequence[BaseModel] = BASE_MODELS) -> ModelLayout:
    """The sites of a base model in diffusers' or ComfyUI's form (``UNet2DConditionModel``, ``UNetModel``).

    Raises IncompatibleAdapterError for a model of another family (Flux, SD3 and other transformers have no known sites).
    """
    for walk in dict.fromkeys(base.walk for base in base_models):
        layout = None if walk is None else walk(model)
        if layout is not None:
            if not layout.sites:
                raise IncompatibleAdapterError(
                    f"{type(model).__name__} is a UNet without cross-attention, so there is nothing an image prompt "
                    "could steer; use a text-to-image model of the SD1.5, SD2 or SDXL family"
                )
            return layout
    raise IncompatibleAdapterError(
        f"the model is a {type(model).__name__}, which has no UNet cross-attention; image prompts of this pack work with "
        "the SD1.5, SD2 and SDXL families (and fine-tunes such as Illustrious, NoobAI or Pony), "
        "not with Flux, SD3 or other transformers"
    )
