from typing import Any

import torch

from .model_patcher import ModelPatcher

class Output: ...

class ClipVisionModel:
    model: Any
    patcher: ModelPatcher
    load_device: torch.device
    image_size: int
    image_mean: list[float]
    image_std: list[float]
    def __init__(self, json_config: str) -> None: ...
    def load_sd(self, sd: dict[str, torch.Tensor]) -> Any: ...

def clip_preprocess(
    image: torch.Tensor, size: int, mean: list[float], std: list[float], crop: bool = True
) -> torch.Tensor: ...
def load(ckpt_path: str) -> ClipVisionModel | None: ...
