"""Base models: how each family's cross-attention sites are found by walking the model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import IncompatibleAdapterError
from .sites import ModelLayout
from .unet import walk_comfy_unet, walk_diffusers_unet

LAYOUTS: tuple[Callable[[nn.Module], ModelLayout | None], ...] = (walk_diffusers_unet, walk_comfy_unet)


def layout_of(model: nn.Module) -> ModelLayout:
    """The sites of a diffusers ``UNet2DConditionModel`` or of ComfyUI's ``UNetModel``.

    Raises IncompatibleAdapterError for any other model (Flux, SD3 and other transformers have no such sites).
    """
    for walk in LAYOUTS:
        layout = walk(model)
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
