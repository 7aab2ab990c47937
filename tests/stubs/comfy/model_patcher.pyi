from collections.abc import Callable
from typing import Any

import torch
from torch import nn

class ModelPatcher:
    model: nn.Module
    load_device: torch.device
    offload_device: torch.device
    cached_patcher_init: tuple[Callable[..., ModelPatcher], tuple[Any, ...]] | None
    model_options: dict[str, Any]
    def __init__(
        self, model: nn.Module, load_device: torch.device, offload_device: torch.device, size: int = 0
    ) -> None: ...
    def clone(self) -> ModelPatcher: ...
    def model_dtype(self) -> torch.dtype: ...
    def get_model_object(self, name: str) -> Any: ...
    def set_additional_models(self, key: str, models: list[ModelPatcher]) -> None: ...
