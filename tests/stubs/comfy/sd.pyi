from torch import Tensor, nn

from .model_patcher import ModelPatcher

class CLIP:
    patcher: ModelPatcher
    cond_stage_model: nn.Module
    def clone(self) -> CLIP: ...

def load_lora_for_models(
    model: ModelPatcher, clip: CLIP | None, lora: dict[str, Tensor], strength_model: float, strength_clip: float
) -> tuple[ModelPatcher, CLIP | None]: ...
