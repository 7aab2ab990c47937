"""Image tokens through the base model's own text projection, for adapters that were trained behind it (Kolors FaceID)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import IncompatibleAdapterError
from .image_prompt import ImagePrompt

ATTRIBUTE = "encoder_hid_proj"
"""What diffusers and ComfyUI's Kolors nodes call the layer, on the UNet itself."""


@torch.no_grad()
def project_by_model(prompt: ImagePrompt, unet: nn.Module, scale: float = 1.0) -> ImagePrompt:
    """The prompt with tokens ``b n d`` as the UNet's ``encoder_hid_proj`` makes them, times ``scale``.

    ``scale`` is the ``weight_kolors`` of ComfyUI_IPAdapter_plus. Computed in float32, on the tokens' device.

    Raises IncompatibleAdapterError for a model without that layer, or with one of another width.
    """
    width = prompt.cond.shape[-1]
    layer = getattr(unet, ATTRIBUTE, None)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (prompt.token_dim, width):
        seen = "has none" if layer is None else f"has a {type(layer).__name__} of shape {_shape(weight)}"
        raise IncompatibleAdapterError(
            f"{prompt.adapter!r} makes tokens {width} wide for Kolors' own {ATTRIBUTE} ({width} to {prompt.token_dim}), but "
            f"the model {seen}: load a Kolors model with a Kolors loader, which keeps that layer on the UNet"
        )

    def projected(tokens: Tensor) -> Tensor:
        matrix = weight.to(tokens.device, torch.float32)
        shift = None if bias is None else bias.to(tokens.device, torch.float32)
        return (F.linear(tokens.float(), matrix, shift) * scale).to(tokens.dtype)

    return replace(prompt, cond=projected(prompt.cond), uncond=projected(prompt.uncond))


def _shape(weight: object) -> str:
    return str(list(weight.shape)) if isinstance(weight, Tensor) else "unknown"
