from enum import Enum

import torch
from torch import nn

from .supported_models import SD15

class ModelType(Enum):
    V_PREDICTION = 2

class BaseModel(nn.Module):
    diffusion_model: nn.Module
    def __init__(self, model_config: SD15, model_type: ModelType, device: torch.device | None = None) -> None: ...
