from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .model_patcher import ModelPatcher

class CLIP:
    patcher: ModelPatcher
    cond_stage_model: nn.Module
    def __init__(self, target: Any, *, model_options: dict[str, Any]) -> None: ...
    def clone(self) -> CLIP: ...
    def load_sd(self, sd: dict[str, Tensor]) -> Any: ...

class VAE:
    first_stage_model: nn.Module
    patcher: ModelPatcher
    device: torch.device
    latent_channels: int
    downscale_ratio: int
    upscale_ratio: int
    size: int | None
    memory_used_encode: Callable[[tuple[int, ...], torch.dtype], int]
    memory_used_decode: Callable[[tuple[int, ...], torch.dtype], int]
    def __init__(self, sd: dict[str, Tensor], *, config: dict[str, Any], dtype: torch.dtype) -> None: ...

def load_lora_for_models(
    model: ModelPatcher, clip: CLIP | None, lora: dict[str, Tensor], strength_model: float, strength_clip: float
) -> tuple[ModelPatcher, CLIP | None]: ...
