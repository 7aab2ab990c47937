from typing import Any

import torch

from .latent_formats import LatentFormat

class SD15:
    unet_config: dict[str, Any]
    latent_format: LatentFormat
    sampling_settings: dict[str, Any]
    def __init__(self, unet_config: dict[str, Any]) -> None: ...
    def set_inference_dtype(self, dtype: torch.dtype, manual_cast_dtype: torch.dtype | None) -> None: ...
