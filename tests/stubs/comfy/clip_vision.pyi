from typing import Any

import torch

from .model_patcher import ModelPatcher

class ClipVisionModel:
    model: Any
    patcher: ModelPatcher
    load_device: torch.device
    image_size: int
    image_mean: list[float]
    image_std: list[float]

def load(ckpt_path: str) -> ClipVisionModel | None: ...
