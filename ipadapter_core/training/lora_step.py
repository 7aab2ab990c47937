"""One training step of a LoRA: captions and latents to a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batches import Batch
from .frozen import FrozenBase
from .lora_adapter import TrainedLoRA
from .objectives import Objective
from .order import Draws, seeded
from .step import Step, denoising_losses


class LoRAStep(Step):
    """The loss of a LoRA on a batch. Only the LoRA is a submodule: it alone is learned, wrapped and saved.

    `empty` is an empty caption in the form that batches have: token ids `1 l` where the text encoders learn, else their
    output, the context `1 l d` and SDXL's pooled embedding `1 d`. `text_rate`: the text encoders' learning rate, 0 for the
    run's.
    """

    def __init__(
        self,
        adapter: TrainedLoRA,
        base: FrozenBase,
        objective: Objective,
        empty: tuple[Tensor, ...],
        seed: int,
        text_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.seed, self.text_rate = seed, text_rate
        self._frozen = (base, objective, empty)  # inside a tuple, so that nn.Module does not register it

    @property
    def learned(self) -> TrainedLoRA:
        return self.adapter

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """UNet and text encoders apart, where the latter have a rate of their own."""
        if not self.text_rate:
            return super().groups(lr)
        parts = ((self.adapter.parameters_of(text=False), lr), (self.adapter.parameters_of(text=True), self.text_rate))
        return [{"params": parameters, "lr": rate} for parameters, rate in parts if parameters]

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """Mean loss of the batch."""
        if self.adapter.dropout:
            # like all other draws a function of the place in the run, so that resuming needs no random state
            torch.manual_seed(seeded(self.seed, "dropout", *batch.places[0]).initial_seed())
        return self.losses(batch, draws).mean()

    def losses(self, batch: Batch, draws: Draws) -> Tensor:
        """Loss of each sample, `b`."""
        base, objective, empty = self._frozen
        text = tuple(
            torch.where(draws.no_text.view(-1, *[1] * (one.ndim - 1)), none.to(one), one)
            for one, none in zip(batch.text or batch.tokens, empty, strict=True)
        )
        if batch.text:
            context, pooled = text[0], text[1] if len(text) > 1 else None
        else:
            context, pooled = base.encode_text(text)
        weight = base.unet.dtype
        added = base.added(None if pooled is None else pooled.to(weight), batch.sizes)
        learned = next(self.adapter.parameters()).dtype
        dtype = torch.promote_types(learned, torch.float32)
        return denoising_losses(base.unet, objective, batch, draws, context.to(weight), added, dtype)
