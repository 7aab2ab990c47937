"""What the UNet is asked to predict, and how much each timestep counts. Noise and latents are `b c y x`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidInputError
from .config import LossConfig, Prediction

STEPS = 1000
"""Timesteps of every scheduler that Stable Diffusion's models are trained with."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A prediction type with its noise schedule; `alphas_cumprod` is empty for flow."""

    prediction: Literal["epsilon", "v_prediction", "flow"]
    alphas_cumprod: Tensor
    min_snr: float = 0.0

    def timestep(self, generator: torch.Generator) -> float:
        """A uniform draw: an integer below 1000, or any number of 0..1000 for flow."""
        if self.prediction == "flow":
            return float(torch.rand((), generator=generator) * STEPS)
        return int(torch.randint(STEPS, (), generator=generator))

    def noisy(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self._mix(latents, t)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - latents
        signal, sigma = self._mix(latents, t)
        return signal * noise - sigma * latents

    def losses(self, predicted: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of each sample, weighted by its timestep, `b`."""
        errors = F.mse_loss(predicted, self.target(latents, noise, t), reduction="none").flatten(1).mean(1)
        return errors * self.weights(t).to(errors) if self.min_snr else errors

    def weights(self, t: Tensor) -> Tensor:
        """Min-SNR weights (https://arxiv.org/abs/2303.09556, section 3.4); v-prediction divides by SNR + 1."""
        alphas = self.alphas_cumprod.to(t.device)[t.long()].double()
        snr = alphas / (1 - alphas)
        if self.prediction == "v_prediction":
            return snr.clamp(max=self.min_snr) / (snr + 1)
        # Of an SNR of zero (rescaled schedules) the limit is meant: no clamping, weight one.
        return torch.where(snr > self.min_snr, self.min_snr / snr, torch.ones_like(snr))

    def _mix(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.prediction == "flow":
            sigma = (t.to(latents) / STEPS)[:, None, None, None]
            return 1 - sigma, sigma
        alphas = self.alphas_cumprod.to(latents)[t.long()][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()


def objective_for(scheduler: Any, prediction: Prediction, loss: LossConfig) -> Objective:
    """The objective a model was trained with, read from its scheduler, or the one asked for."""
    config = dict(scheduler.config)
    if prediction == "auto":
        prediction = "flow" if "Flow" in type(scheduler).__name__ else config.get("prediction_type", "epsilon")
    if prediction == "flow":
        if loss.min_snr:
            raise InvalidInputError("loss.min_snr is not defined for flow prediction; set it to 0")
        return Objective("flow", torch.empty(0))
    if prediction not in ("epsilon", "v_prediction"):
        raise InvalidInputError(
            f"the model's scheduler predicts {prediction!r}, which is not supported; set model.prediction to epsilon, "
            "v_prediction or flow if you know better"
        )
    from diffusers import DDPMScheduler

    # Samplers bend the schedule for inference (trailing spacing, karras sigmas); training uses the plain one.
    keys = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    known = {key: config[key] for key in keys if config.get(key) is not None}
    noise: Any = DDPMScheduler(num_train_timesteps=config.get("num_train_timesteps", STEPS), **known)
    if len(noise.alphas_cumprod) != STEPS:
        raise InvalidInputError(
            f"the model's scheduler has {len(noise.alphas_cumprod)} timesteps; {STEPS} were expected"
        )
    return Objective(prediction, noise.alphas_cumprod.clone(), loss.min_snr)
