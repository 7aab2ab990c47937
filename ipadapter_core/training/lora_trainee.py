"""A LoRA as the thing that learns: beside layers of the UNet and, if asked for, of the text encoders."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn

from ..backends.diffusers.lora import apply, place
from ..errors import InvalidInputError
from ..generate import generate, grid_of, to_pillow
from ..lora import Component, Layer
from .batches import Batch, Nothing
from .collection import Sample
from .config import RunConfig
from .frozen import FrozenBase
from .lora_adapter import Attached, TrainedLoRA, build_lora, describe_lora
from .lora_metadata import describe_training
from .objectives import Objective
from .optimizers import Group
from .order import NoiseDraws, seeded
from .step import DenoisingStep
from .trainee import Parts, Shown, State, Trainee
from .watch import pipeline_around


class LoRAStep(DenoisingStep):
    """The loss of a LoRA on a batch. ``text_rate``: the text encoders' learning rate, 0 for the run's."""

    adapter: TrainedLoRA

    def __init__(
        self,
        adapter: TrainedLoRA,
        base: FrozenBase,
        objective: Objective,
        nothing: Nothing,
        seed: int,
        text_rate: float = 0.0,
    ) -> None:
        super().__init__(adapter, base, objective, nothing)
        self.seed, self.text_rate = seed, text_rate

    def groups(self, lr: float) -> list[Group]:
        """UNet and text encoders apart, where the latter have a rate of their own."""
        if not self.text_rate:
            return super().groups(lr)
        parts = ((self.adapter.parameters_of(text=False), lr), (self.adapter.parameters_of(text=True), self.text_rate))
        return [{"params": parameters, "lr": rate} for parameters, rate in parts if parameters]

    def forward(self, batch: Batch, draws: NoiseDraws) -> Tensor:
        if self.adapter.dropout:
            # like all other draws a function of the place in the run, so that resuming needs no random state
            torch.manual_seed(seeded(self.seed, "dropout", *batch.places[0]).initial_seed())
        return super().forward(batch, draws)


class LoRATrainee(Trainee):
    """The tensors of a LoRA of any algorithm."""

    gain = "lora_gain"

    def __init__(self, config: RunConfig, base: FrozenBase, lora: TrainedLoRA) -> None:
        super().__init__(config, base, lora)
        self.lora, self.keeps_text = lora, not config.lora.text_encoders
        self.attached = Attached()

    @staticmethod
    def wanted(config: RunConfig) -> bool:
        return config.lora.wanted

    @classmethod
    def build(cls, config: RunConfig, base: FrozenBase) -> LoRATrainee:
        made = cls(config, base, build_lora(_parts(config, base), config.lora))
        if config.lora.text_learning_rate and not made.lora.parameters_of(text=True):
            raise InvalidInputError(
                "lora.text_learning_rate is given, and lora.targets chooses no layer of a text encoder; add one, such as "
                "'te attn: 1', or leave the rate out"
            )
        return made

    @staticmethod
    def skips_parameters(config: RunConfig) -> bool:
        # SDXL reads the last layer but one of its text encoders: a LoRA on the last one of the first gets no gradient
        return config.lora.text_encoders

    @property
    def parts(self) -> Parts:
        return _parts(self.config, self.base)

    def attach(self, learned: nn.Module, parts: Parts) -> None:
        layer = _LayerWithoutNumbers if parts["denoiser"].device.type == "meta" else Layer
        self.attached = cast(TrainedLoRA, learned).attach(parts, layer)

    def off(self) -> AbstractContextManager[None]:
        return self.attached.off()

    def save(self, path: Path, state: State, metadata: Mapping[str, str]) -> Path:
        return self.lora.save(path, state, metadata, self.config.output)

    def describe(self) -> str:
        return describe_lora(self.lora, self.config.train.lr, self.config.lora.text_learning_rate)

    def step(self, objective: Objective, nothing: Nothing) -> LoRAStep:
        seed, rate = self.config.train.seed, self.config.lora.text_learning_rate
        return LoRAStep(self.lora, self.base, objective, nothing, seed, rate)

    def sheet(self, step: DenoisingStep, state: State, shown: Shown) -> Image.Image:
        """Pictures on top; for every prompt a row without the LoRA and one with it, from the same noise.

        An empty prompt stands for the pictures' own captions.
        """
        watch, side = self.config.watch, self.config.data.resolution
        weights = self.lora.weights(self.base.unet.dtype, state)
        rows = list(shown.tiles)
        with self.off():
            pipeline = pipeline_around(self.base, step.objective, side)
            patch = place(pipeline, weights)
            for text in watch.sample_prompts:
                prompts = [text or caption for caption in shown.captions]
                for lora in (None, patch):
                    applied = None if lora is None else apply(pipeline, lora, branches=("uncond", "cond"))
                    try:
                        pictures = generate(
                            pipeline,
                            [],
                            prompts,
                            steps=watch.sample_steps,
                            guidance=watch.guidance,
                            seeds=list(range(len(prompts))),
                            height=side,
                            width=side,
                        )
                        rows += [to_pillow(picture) for picture in pictures]
                    finally:
                        if applied is not None:
                            applied.remove()
        return grid_of(rows, columns=len(shown.tiles))

    def metadata(self, objective: Objective, samples: Sequence[Sample] | None) -> dict[str, str]:
        return describe_training(self.config, self.base, objective, samples or ())


class _LayerWithoutNumbers(Layer):
    """A layer on ``meta``, whose weight may be read all the same: only shapes are counted."""

    def weight(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return self.module.get_parameter("weight").detach().to(dtype=dtype)


def _parts(config: RunConfig, base: FrozenBase) -> Parts:
    found: dict[Component, nn.Module] = {"denoiser": base.unet}
    if config.lora.text_encoders:
        found |= dict(zip(("te1", "te2"), base.text_encoders, strict=False))
    return found
