from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

class ModelConfig(Protocol):
    def get_model(self, state_dict: Mapping[str, Tensor], prefix: str, device: torch.device) -> Any: ...

def unet_prefix_from_state_dict(state_dict: Mapping[str, Tensor]) -> str: ...
def model_config_from_unet(state_dict: Mapping[str, Tensor], unet_key_prefix: str) -> ModelConfig | None: ...
