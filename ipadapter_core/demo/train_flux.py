"""The demo world's transformer: a small FLUX.1, learned by flow matching, with adapters in InstantX' and in XLabs' layout.

FLUX.1 was distilled to take its guidance as a number. This one was not: the number is always GUIDANCE while it learns, and guidance
is true, by the empty prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from ..checkpoints import instantx, xlabs
from ..models.flux import FLUX
from .pictures import SIZE
from .train_base import RESAMPLER, Adapter, Base
from .train_parts import LATENT_CHANNELS, TEXT_DIM, TEXT_LENGTH

SHIFT = 3.0
"""Of the noise, as SD3's: half of the samples have more than three quarters, where what is shown and where is settled."""
GUIDANCE = FLUX.guidance
SIDE = SIZE // 8
"""Tokens of the picture in a row: one for 2 by 2 latents."""


class Flux(Base):
    """A FluxTransformer2DModel of 17.9 million parameters, with heads as wide as FLUX.1's.

    The world's image encoder has no pooling head, so of InstantX' two projectors the resampler is the one that can read it.
    """

    name = "flux"
    part = "transformer"
    blocks, heads = (4, 8), 2
    """Double and single blocks, and heads of 128 channels."""
    adapters: ClassVar[Mapping[str, Adapter]] = {
        "instantx": Adapter(instantx.RESAMPLER, 16, RESAMPLER),
        "xlabs": Adapter(xlabs.FORMAT, 16),
    }

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        places = torch.zeros(SIDE, SIDE, 3)
        places[..., 1], places[..., 2] = torch.arange(SIDE)[:, None], torch.arange(SIDE)
        self.places, self.text_places = places.flatten(0, 1).to(device), torch.zeros(TEXT_LENGTH, 3, device=device)

    def build(self) -> nn.Module:
        model = FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=self.blocks[0],
            num_single_layers=self.blocks[1],
            attention_head_dim=128,
            num_attention_heads=self.heads,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        )
        start_still(model)
        return model

    def noised(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.randn(latents.shape, generator=generator)
        time = torch.rand(len(latents), generator=generator)
        time = SHIFT * time / (1 + (SHIFT - 1) * time)
        return torch.lerp(latents, noise, time[:, None, None, None]), time, noise - latents

    def predicted(self, model: nn.Module, noisy: Tensor, time: Tensor, text: Any) -> Tensor:
        tokens = model(
            hidden_states=F.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2),
            encoder_hidden_states=text.last_hidden_state.float(),
            pooled_projections=text.pooler_output.float(),
            timestep=time,
            img_ids=self.places,
            txt_ids=self.text_places,
            guidance=torch.full_like(time, GUIDANCE),
        ).sample
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE)), 2)

    def pipeline(self, model: nn.Module, **parts: Any) -> Any:
        return FluxPipeline(
            transformer=model,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            text_encoder_2=parts["text_encoder"],  # the pooled vector and the tokens are of one encoder
            tokenizer_2=parts["tokenizer"],
            **parts,
        )


@torch.no_grad()
def start_still(model: nn.Module) -> None:
    """Let blocks begin as the identity and the output as zero (adaLN-Zero, https://arxiv.org/abs/2212.09748): all learn sooner."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (name.endswith(".linear") or name == "proj_out"):
            layer.weight.zero_()
            layer.bias.zero_()
