"""The demo world's UNet: v-prediction with zero terminal SNR, with a plus and a base adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ..checkpoints import base, plus
from .pictures import SIZE
from .train_base import RESAMPLER, Adapter, Base
from .train_parts import LATENT_CHANNELS, TEXT_DIM

NOISE: dict[str, Any] = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    "steps_offset": 1,  # without effect in trailing spacing; diffusers' pipeline insists on it
}  # fmt: skip
"""How noise comes, in the words of diffusers' schedulers."""


def build_scheduler() -> DDIMScheduler:
    """What the UNet learns with."""
    return DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=True)


def build_sampler() -> EulerAncestralDiscreteScheduler:
    """What the world samples with: fresh noise at every step mends what a small UNet gets wrong in the step before.

    The deterministic DDIM carries such errors on as confetti-coloured patches, at 100 steps as at 20.
    """
    return EulerAncestralDiscreteScheduler(**NOISE)


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps of which half lie above 750, where these small latents settle what is shown and where.

    Below, colours and edges are settled; with a quarter of the samples there, they stayed confetti.
    """
    early = torch.where(torch.arange(count) % 4 == 0, 0.25, 1.0)
    power = torch.where(torch.arange(count) % 4 == 1, 2.0, 1.0)
    return (999 * (1 - early * torch.rand(count, generator=generator).pow(power))).round().long()


class UNet(Base):
    """A UNet2DConditionModel of 16.7 million parameters."""

    name = "unet"
    part = "unet"
    adapters: ClassVar[Mapping[str, Adapter]] = {
        "plus": Adapter(plus.FORMAT, 16, RESAMPLER),
        "base": Adapter(base.FORMAT, 4),
    }

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        alphas: Tensor = build_scheduler().alphas_cumprod
        self.alphas = alphas.to(device, torch.float32)

    def build(self) -> nn.Module:
        unet = UNet2DConditionModel(
            sample_size=SIZE // 4,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            layers_per_block=1,
            block_out_channels=(64, 128, 256),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_DIM,
            attention_head_dim=4,
            norm_num_groups=32,
        )
        # torch's CPU flash attention is several times slower than plain matmuls in bfloat16 backward
        unet.set_attn_processor(AttnProcessor())
        return unet.to(memory_format=torch.channels_last)

    def noised(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.randn(latents.shape, generator=generator)
        time = draw_timesteps(len(latents), generator)
        alpha = self.alphas[time][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        return noisy, time, alpha.sqrt() * noise - (1 - alpha).sqrt() * latents

    def predicted(self, model: nn.Module, noisy: Tensor, time: Tensor, text: Any) -> Tensor:
        return model(noisy.contiguous(memory_format=torch.channels_last), time, text.last_hidden_state.float()).sample

    def pipeline(self, model: nn.Module, **parts: Any) -> Any:
        return StableDiffusionPipeline(
            unet=model,
            scheduler=build_sampler(),
            safety_checker=None,
            feature_extractor=None,  # its class has another name in every major version of transformers
            requires_safety_checker=False,
            **parts,
        )
