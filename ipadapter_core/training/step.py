"""One training step: a batch and its draws to a loss. Everything the loop does around it is bookkeeping."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batches import Batch, Nothing
from .frozen import FrozenBase
from .objectives import Objective
from .optimizers import Group
from .order import NoiseDraws


class Step(nn.Module):
    """What the loop trains: ``forward`` of what a stream gives is the mean loss. Its parameters are all that is wrapped."""

    @property
    def learned(self) -> nn.Module:
        """The part that is averaged and saved."""
        return self

    def groups(self, lr: float) -> list[Group]:
        """The parameters that learn, in torch's groups with a rate each; ``lr`` is the run's."""
        return [{"params": [p for p in self.learned.parameters() if p.requires_grad], "lr": lr}]


class DenoisingStep(Step):
    """The loss of a denoiser on a batch. Only what is learned is a submodule: it alone is wrapped, averaged and saved."""

    def __init__(self, learned: nn.Module, base: FrozenBase, objective: Objective, nothing: Nothing) -> None:
        super().__init__()
        self.adapter = learned  # states have this name
        self._frozen = (base, objective, nothing)  # inside a tuple, so that nn.Module does not register it

    @property
    def learned(self) -> nn.Module:
        return self.adapter

    @property
    def base(self) -> FrozenBase:
        return self._frozen[0]

    @property
    def objective(self) -> Objective:
        return self._frozen[1]

    @property
    def nothing(self) -> Nothing:
        return self._frozen[2]

    def forward(self, batch: Batch, draws: NoiseDraws) -> Tensor:
        """Mean loss of the batch."""
        return self.losses(batch, draws).mean()

    def losses(self, batch: Batch, draws: NoiseDraws) -> Tensor:
        """Loss of each sample, ``b``: noisy latents through the denoiser, in its dtype; noise and loss in float32 at least."""
        denoiser, weight = self.base.unet, self.base.unet.dtype
        text, pooled = self._text(batch, draws)
        context = self.context(text.to(weight), batch, draws)
        added = self.base.added(None if pooled is None else pooled.to(weight), batch.sizes)
        moments = batch.latents.to(torch.promote_types(self._dtype(), torch.float32))
        latents = moments[:, 0]
        if moments.shape[1] == 2:
            latents = latents + moments[:, 1] * draws.latent_noise.to(latents)
        noise = draws.noise.to(latents)
        noisy = self.objective.noisy(latents, noise, draws.timesteps).to(weight)
        predicted = denoiser(noisy, draws.timesteps, context, added_cond_kwargs=added, return_dict=False)[0]
        return self.objective.losses(predicted.to(latents), latents, noise, draws.timesteps)

    def context(self, text: Tensor, batch: Batch, draws: NoiseDraws) -> Tensor:
        """What the cross-attentions read, ``b l d``: the text, and what is learned may add to it."""
        return text

    def _text(self, batch: Batch, draws: NoiseDraws) -> tuple[Tensor, Tensor | None]:
        """Context ``b l d`` and SDXL's pooled embedding, those of the empty caption where the text is dropped."""
        nothing = self.nothing.text if batch.text else self.nothing.tokens
        text = tuple(
            torch.where(draws.no_text.view(-1, *[1] * (one.ndim - 1)), none.to(one), one)
            for one, none in zip(batch.text or batch.tokens, nothing, strict=True)
        )
        if not batch.text:
            return self.base.encode_text(text)
        return text[0], text[1] if len(text) > 1 else None

    def _dtype(self) -> torch.dtype:
        return next(self.adapter.parameters()).dtype
