"""Looking at a LoRA's run: the loss with and without it, and sample sheets through the inference path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..backends.diffusers.lora import apply, place
from ..generate import generate, grid_of, to_pillow
from .batches import Batch
from .config import WatchConfig
from .frozen import FrozenBase
from .lora_adapter import Attached, TrainedLoRA
from .lora_step import LoRAStep
from .objectives import Objective
from .watch import mean_loss, pipeline_around


class LoRALooking:
    """Validation and sheets of a LoRA's run. `shown` are pictures and captions for the sheets, none for no sheets."""

    def __init__(
        self,
        batches: Sequence[Batch],
        shown: Sequence[tuple[Image.Image, str]],
        base: FrozenBase,
        attached: Attached,
        objective: Objective,
        config: WatchConfig,
        batch: int,
        side: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.batches, self.shown, self.base, self.attached = batches, shown, base, attached
        self.objective, self.config, self.batch, self.side = objective, config, batch, side
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def validate(self, module: LoRAStep) -> dict[str, float] | None:
        """`validation`, and `lora_gain`: how much more it is without the LoRA (below 0: it learned nothing general)."""
        if not self.batches or not self.config.validate_every:
            return None
        learning = module.training
        module.eval()  # no dropout
        timesteps = self.config.timesteps
        try:
            own = mean_loss(module, self.objective, self.device, self.batches, timesteps, self.batch)
            with self.attached.off():
                none = mean_loss(module, self.objective, self.device, self.batches, timesteps, self.batch)
        finally:
            module.train(learning)
        return {"validation": round(own, 8), "lora_gain": round(none - own, 8)}

    @torch.no_grad()
    def sheet(self, module: LoRAStep, state: dict[str, Tensor]) -> Image.Image | None:
        """Pictures on top; for every prompt a row without the LoRA and one with it, from the same noise.

        An empty prompt stands for the pictures' own captions.
        """
        if not self.shown or not self.config.sample_every:
            return None
        weights = module.adapter.weights(self.dtype, state)
        count = len(self.shown)
        rows = [picture for picture, _ in self.shown]
        with self.attached.off():
            pipeline = pipeline_around(self.base, self.objective)
            patch = place(pipeline, weights)
            for text in self.config.sample_prompts:
                prompts = [text or caption for _, caption in self.shown]
                for lora in (None, patch):
                    applied = None if lora is None else apply(pipeline, lora, branches=("uncond", "cond"))
                    try:
                        rows += [to_pillow(picture) for picture in self._draw(pipeline, prompts)]
                    finally:
                        if applied is not None:
                            applied.remove()
        return grid_of(rows, columns=count)

    def _draw(self, pipeline: object, prompts: Sequence[str]) -> Tensor:
        return generate(
            pipeline,
            [],
            prompts,
            steps=self.config.sample_steps,
            guidance=self.config.guidance,
            seeds=list(range(len(prompts))),
            height=self.side,
            width=self.side,
        )


def lora_text(lora: TrainedLoRA) -> bool:
    """Whether text encoders learn, so that captions have to be encoded at every step."""
    return any(target.component != "unet" for target in lora.targets)
