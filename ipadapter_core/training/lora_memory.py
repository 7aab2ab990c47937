"""How much memory a LoRA's run will need: as for adapters, by a dry run on `meta`, of the text encoders too if they learn."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..lora import Component, Layer
from .config import RunConfig
from .frozen import FrozenBase
from .lora_adapter import Parts, TrainedLoRA
from .memory import Keeper, Memory, call_twin, element_size, fused_attention, largest_latent, memory_of


class GhostLayer(Layer):
    """A layer without numbers, whose weight may be read all the same."""

    def weight(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return self.module.get_parameter("weight").detach().to(dtype=dtype)


def predict_lora(
    config: RunConfig, base: FrozenBase, lora: TrainedLoRA, parts: Parts, device: torch.device, factor: int
) -> Memory:
    """Predict the peak of a run. `factor`: pixels per latent."""
    activations = lora_activation_bytes(
        base,
        lora,
        parts,
        largest_latent(config, factor),
        element_size(config),
        checkpointing=config.train.checkpointing,
    )
    return memory_of(config, base, sum(p.numel() for p in lora.parameters()), activations, device)


def lora_activation_bytes(
    base: FrozenBase, lora: TrainedLoRA, parts: Parts, latent: tuple[int, int], element: int, *, checkpointing: bool
) -> int:
    """Bytes that autograd keeps for one sample, the models computing in numbers of `element` bytes."""
    unet: Any = type(base.unet)
    twins: dict[Component, Any] = {}
    with torch.device("meta"):
        twins["unet"] = unet.from_config(base.unet.config)
        for component, model in parts.items():
            if component != "unet":
                encoder: Any = model
                twins[component] = type(encoder)(encoder.config)
    for twin in twins.values():
        twin.requires_grad_(False)
    learned = copy.deepcopy(lora).to("meta")
    learned.attach(twins, GhostLayer)
    keeper = Keeper(nn.ModuleList([*twins.values(), learned]))
    with keeper, fused_attention():
        for component, ids in zip(("te1", "te2"), base.tokenize([""]), strict=False):
            if component in twins:
                twins[component](ids.to("meta"))
        context = torch.zeros(1, 77, twins["unet"].config.cross_attention_dim, device="meta")
        call_twin(twins["unet"], context.requires_grad_(len(twins) > 1), latent, sdxl=base.is_sdxl)
    return keeper.total(checkpointing) * element // 4
