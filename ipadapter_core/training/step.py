"""One training step: a batch and its draws to a loss. Everything the loop does around it is bookkeeping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapter import TrainedAdapter
from .batches import Batch
from .frozen import FrozenBase
from .objectives import Objective
from .order import Draws


class Step(nn.Module):
    """What the loop trains: `forward` of what a feed gives is the mean loss. Its parameters are all that is wrapped."""

    @property
    def learned(self) -> nn.Module:
        """The part that is averaged and saved."""
        return self

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """The parameters that learn, in torch's groups with a rate each; `lr` is the run's."""
        return [{"params": [p for p in self.learned.parameters() if p.requires_grad], "lr": lr}]


class AdapterStep(Step):
    """The loss of the adapter on a batch. Only the adapter is a submodule: it alone is learned, wrapped and saved.

    `neutral` are the features `1 …` that stand for no image; `empty` the token ids `1 l` of an empty caption.
    """

    neutral: Tensor

    def __init__(
        self,
        adapter: TrainedAdapter,
        base: FrozenBase,
        objective: Objective,
        neutral: Tensor,
        empty: tuple[Tensor, ...],
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self._frozen = (base, objective, empty)  # inside a tuple, so that nn.Module does not register it
        self.register_buffer("neutral", neutral, persistent=False)

    @property
    def learned(self) -> TrainedAdapter:
        return self.adapter

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """Mean loss of the batch."""
        return self.losses(batch, draws).mean()

    def losses(self, batch: Batch, draws: Draws) -> Tensor:
        """Loss of each sample, `b`."""
        base, objective, empty = self._frozen
        weight = self._weight_dtype()
        ids = tuple(
            torch.where(draws.no_text[:, None], none.to(one.device), one)
            for one, none in zip(batch.tokens, empty, strict=True)
        )
        text, pooled = base.encode_text(ids)
        image = self.adapter.image_proj(self._features(batch, draws).to(self._adapter_dtype()))
        context = torch.cat([text.to(weight), image.to(weight)], 1)
        added = base.added(None if pooled is None else pooled.to(weight), batch.sizes)
        return denoising_losses(base.unet, objective, batch, draws, context, added, self._loss_dtype())

    def _features(self, batch: Batch, draws: Draws) -> Tensor:
        dropped = draws.no_image.view(-1, *[1] * (batch.features.ndim - 1))
        return torch.where(dropped, self.neutral.to(batch.features), batch.features)

    def _weight_dtype(self) -> torch.dtype:
        return self._frozen[0].unet.dtype

    def _adapter_dtype(self) -> torch.dtype:
        return next(self.adapter.parameters()).dtype

    def _loss_dtype(self) -> torch.dtype:
        """Loss and noise are computed in float32 at least, whatever the UNet computes in."""
        return torch.promote_types(self._adapter_dtype(), torch.float32)


def denoising_losses(
    unet: Any,
    objective: Objective,
    batch: Batch,
    draws: Draws,
    context: Tensor,
    added: dict[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Loss of each sample, `b`: noisy latents through the UNet, in its dtype; noise and loss in `dtype`."""
    moments = batch.latents.to(dtype)
    latents = moments[:, 0]
    if moments.shape[1] == 2:
        latents = latents + moments[:, 1] * draws.latent_noise.to(latents)
    noise = draws.noise.to(latents)
    noisy = objective.noisy(latents, noise, draws.timesteps).to(unet.dtype)
    predicted = unet(noisy, draws.timesteps, context, added_cond_kwargs=added, return_dict=False)[0]
    return objective.losses(predicted.to(latents), latents, noise, draws.timesteps)
