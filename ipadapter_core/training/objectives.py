"""What a denoiser is asked to predict: one class per kind of prediction. Noise and latents are ``b c y x``.

A new objective is a subclass of ``Diffusion`` where noise comes by a table of 1000 rows, else of ``Objective``, and its entry in
``OBJECTIVES``; the config's choices follow from there.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidInputError

STEPS = 1000
"""Timesteps of every scheduler that Stable Diffusion's models are trained with."""

SHIFT_TOKENS = (256, 4096)
"""Sequence lengths at which the shift is ``base_shift`` and ``max_shift``: squares of 256 and 1024 pixels."""


def tokens_of(latent: tuple[int, int]) -> int:
    """Tokens of latents of this height and width: two by two latents each, in SD3 and FLUX."""
    height, width = latent
    return (height // 2) * (width // 2)


@dataclass(frozen=True, slots=True)
class LossConfig:
    """What a step draws and how its loss counts. Drops exclude one another: a sample loses its image, its text, both, or
    nothing."""

    drop_image: float = 0.05
    drop_text: float = 0.05
    drop_both: float = 0.05
    min_snr: float = 0.0
    """Gamma of min-SNR weighting (5 is usual); 0: off."""
    noise_offset: float = 0.0
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """How timesteps are distributed; logit_normal draws more of the middle (SD3, section 3.1)."""
    logit_mean: float = 0.0
    """logit_normal: above 0 towards noise, below 0 towards the picture."""
    logit_std: float = 1.0
    shift: Literal["none", "resolution"] = "none"
    """resolution: large pictures are drawn noisier (SD3, section 5.3.2), by their number of tokens as FLUX counts them."""
    base_shift: float = 0.5
    """Logarithm of the shift at 256 tokens (a picture of 256 x 256 pixels)."""
    max_shift: float = 1.15
    """The same at 4096 tokens (1024 x 1024); linear between and beyond. Both at 1.0986 (ln 3) are SD3's fixed shift of 3."""

    def quantile(self, u: float, tokens: int) -> float:
        """The noise level 0..1 below which a share ``u`` of all draws lies, for pictures of so many tokens."""
        place = torch.tensor(u, dtype=torch.float64)
        if self.timesteps == "logit_normal":
            logit = self.logit_mean + self.logit_std * torch.special.ndtri(place)
        else:
            logit = torch.logit(place)
        if self.shift == "resolution":  # a factor of the odds, that is of noise to signal
            logit = logit + resolution_shift(tokens, self.base_shift, self.max_shift)
        return float(torch.sigmoid(logit))

    @property
    def uniform(self) -> bool:
        return self.timesteps == "uniform" and self.shift == "none"


def resolution_shift(tokens: int, base_shift: float, max_shift: float) -> float:
    """Logarithm of the shift for a sequence length, on the line through both ends of SHIFT_TOKENS (FLUX's sampler)."""
    fewest, most = SHIFT_TOKENS
    return base_shift + (max_shift - base_shift) * (tokens - fewest) / (most - fewest)


class Scheduler(Protocol):
    """A diffusers scheduler, of which only the settings are read."""

    @property
    def config(self) -> Mapping[str, object]: ...

    @classmethod
    def from_config(cls, config: Mapping[str, object], **changes: object) -> Scheduler: ...


class Objective(ABC):
    """One kind of prediction with its noise schedule. Timesteps ``t`` are ``b``, 0 for a picture, 1000 for noise."""

    prediction: ClassVar[str]
    """What ``model.prediction`` and files call it."""
    prediction_type: ClassVar[str]
    """What diffusers' schedulers call it, by which "auto" knows a model that was trained so."""
    modelspec: ClassVar[str]
    """What it is called in the metadata of files."""
    dtype: ClassVar[torch.dtype] = torch.long
    """Of timesteps: integers are rows of a table."""

    def __init__(self, scheduler: Scheduler, loss: LossConfig) -> None:
        self.loss = loss

    def draw_timestep(self, generator: torch.Generator, latent: tuple[int, int]) -> float:
        """One timestep for latents of this height and width, by ``loss.timesteps`` and ``loss.shift``.

        An integer below 1000 where timesteps are rows of a table, else any number of 0..1000.
        """
        if self.loss.uniform and not self.dtype.is_floating_point:
            return int(torch.randint(STEPS, (), generator=generator))
        u = torch.rand((), generator=generator)
        if self.loss.uniform:
            return float(u * STEPS)
        level = self.loss.quantile(float(u), tokens_of(latent))
        return level * STEPS if self.dtype.is_floating_point else min(int(level * STEPS), STEPS - 1)

    @abstractmethod
    def sampler(self, scheduler: Scheduler, latent: tuple[int, int]) -> Scheduler:
        """The scheduler that draws latents of this height and width from what was learned so; ``scheduler`` is the model's."""

    @abstractmethod
    def noisy(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The latents with as much noise as belongs to each timestep."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should predict."""

    @abstractmethod
    def picture(self, noisy: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        """The latents that follow from noisy ones and a prediction."""

    def weights(self, t: Tensor) -> Tensor | None:
        """How much each sample's loss counts, ``b``; None: all alike."""
        return None

    def losses(self, predicted: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of each sample, weighted by its timestep, ``b``."""
        errors = F.mse_loss(predicted, self.target(latents, noise, t), reduction="none").flatten(1).mean(1)
        weights = self.weights(t)
        return errors if weights is None else errors * weights.to(errors)


class Diffusion(Objective):
    """Variance-preserving noise by a table of 1000 rows; ``alphas_cumprod`` is the signal's share of the variance."""

    def __init__(self, scheduler: Scheduler, loss: LossConfig) -> None:
        super().__init__(scheduler, loss)
        from diffusers import DDPMScheduler

        # Samplers bend the schedule for inference (trailing spacing, karras sigmas); training uses the plain one.
        keys = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
        config: dict[str, Any] = dict(scheduler.config)
        known = {key: config[key] for key in keys if config.get(key) is not None}
        plain = DDPMScheduler(num_train_timesteps=config.get("num_train_timesteps", STEPS), **known)
        self.alphas_cumprod: Tensor = plain.alphas_cumprod.clone()
        if len(self.alphas_cumprod) != STEPS:
            raise InvalidInputError(
                f"the model's scheduler has {len(self.alphas_cumprod)} timesteps; {STEPS} were expected"
            )

    def sampler(self, scheduler: Scheduler, latent: tuple[int, int]) -> Scheduler:
        if _prediction_type(scheduler) == self.prediction_type:
            return scheduler
        return scheduler.from_config(scheduler.config, prediction_type=self.prediction_type)

    def noisy(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self._mix(latents, t)
        return signal * latents + sigma * noise

    def weights(self, t: Tensor) -> Tensor | None:
        """Min-SNR weights (https://arxiv.org/abs/2303.09556, section 3.4)."""
        if not self.loss.min_snr:
            return None
        alphas = self.alphas_cumprod.to(t.device)[t.long()].double()
        return self.min_snr(alphas / (1 - alphas), self.loss.min_snr)

    @abstractmethod
    def min_snr(self, snr: Tensor, gamma: float) -> Tensor:
        """The weights of that paper for this prediction, ``b``, from the signal-to-noise ratios ``b``."""

    def _mix(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod.to(latents)[t.long()][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()


class Epsilon(Diffusion):
    """The noise is predicted."""

    prediction = prediction_type = "epsilon"
    modelspec = "epsilon"

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def picture(self, noisy: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self._mix(noisy, t)
        return (noisy - sigma * predicted) / signal

    def min_snr(self, snr: Tensor, gamma: float) -> Tensor:
        # Of an SNR of zero (rescaled schedules) the limit is meant: no clamping, weight one.
        return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))


class Velocity(Diffusion):
    """The velocity between noise and picture is predicted (https://arxiv.org/abs/2202.00512)."""

    prediction = prediction_type = "v_prediction"
    modelspec = "v"

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self._mix(latents, t)
        return signal * noise - sigma * latents

    def picture(self, noisy: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self._mix(noisy, t)
        return signal * noisy - sigma * predicted

    def min_snr(self, snr: Tensor, gamma: float) -> Tensor:
        return snr.clamp(max=gamma) / (snr + 1)


class FlowMatching(Objective):
    """The straight way from picture to noise is predicted (rectified flow, https://arxiv.org/abs/2209.03003)."""

    prediction = "flow"
    prediction_type = "flow_prediction"
    modelspec = "flow"
    dtype = torch.float32

    def __init__(self, scheduler: Scheduler, loss: LossConfig) -> None:
        super().__init__(scheduler, loss)
        if loss.min_snr:
            raise InvalidInputError("loss.min_snr is not defined for flow prediction; set it to 0")

    def sampler(self, scheduler: Scheduler, latent: tuple[int, int]) -> Scheduler:
        """Euler steps along the straight way, shifted as the timesteps were drawn, or as a flow model's own scheduler says."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        class FlowSampler(FlowMatchEulerDiscreteScheduler):
            """With what pipelines of UNets ask of a scheduler besides: noise and inputs are taken as they are."""

            init_noise_sigma = 1.0

            def scale_model_input(self, sample: Tensor, timestep: object) -> Tensor:
                return sample

        made: Any = FlowSampler
        if "Flow" in type(scheduler).__name__:
            return made.from_config(dict(scheduler.config))
        loss = self.loss
        shifted = loss.shift == "resolution"
        mu = resolution_shift(tokens_of(latent), loss.base_shift, loss.max_shift) if shifted else 0.0
        return made(shift=math.exp(mu))

    def noisy(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = self._sigma(latents, t)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - latents

    def picture(self, noisy: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        return noisy - self._sigma(noisy, t) * predicted

    def _sigma(self, latents: Tensor, t: Tensor) -> Tensor:
        return (t.to(latents) / STEPS)[:, None, None, None]


OBJECTIVES: tuple[type[Objective], ...] = (Epsilon, Velocity, FlowMatching)


def predictions() -> tuple[str, ...]:
    """The names of all objectives."""
    return tuple(one.prediction for one in OBJECTIVES)


def objective_for(scheduler: Scheduler, prediction: str, loss: LossConfig) -> Objective:
    """The objective of that name; "auto": the one that a model was trained with, read from its scheduler."""
    told = _prediction_type(scheduler)
    for kind in OBJECTIVES:
        if prediction == kind.prediction or (prediction == "auto" and told == kind.prediction_type):
            return kind(scheduler, loss)
    *some, last = predictions()
    raise InvalidInputError(
        f"the model's scheduler predicts {told!r}, which is not supported; set model.prediction to {', '.join(some)} "
        f"or {last} if you know better"
    )


def _prediction_type(scheduler: Scheduler) -> str:
    """What a model was trained to predict, in diffusers' word; schedulers for flow have no setting for it."""
    flow = "Flow" in type(scheduler).__name__
    return FlowMatching.prediction_type if flow else str(scheduler.config.get("prediction_type", "epsilon"))
