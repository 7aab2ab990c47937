"""An image adapter as the thing that learns: pictures are references, whose features become tokens beside the text's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn

from ..bake import bake
from ..checkpoints import AdapterWeights, load_adapter
from ..generate import generate, grid_of, to_pillow
from ..models import layout_of
from ..prompt.image_prompt import ImagePrompt
from .adapter import TrainedAdapter, check_family, continued_adapter, describe_trainable, fresh_adapter
from .batches import Batch, Nothing
from .collection import Sample
from .config import AdapterConfig, RunConfig
from .encode import CacheSettings, Encoders, cache_settings, check_widths
from .frozen import EncoderSizes, FrozenBase, encoder_sizes, load_encoder
from .objectives import Objective
from .order import NoiseDraws
from .step import DenoisingStep
from .trainee import MeanLoss, Parts, Shown, State, Trainee
from .watch import pipeline_around


class AdapterStep(DenoisingStep):
    """The loss of an image adapter on a batch."""

    adapter: TrainedAdapter

    def context(self, text: Tensor, batch: Batch, draws: NoiseDraws) -> Tensor:
        """The text and behind it the image tokens, those of no image where it is dropped."""
        dropped = draws.no_image.view(-1, *[1] * (batch.features.ndim - 1))
        features = torch.where(dropped, self.nothing.features.to(batch.features), batch.features)
        return torch.cat([text, self.adapter.image_proj(features.to(self._dtype())).to(text)], 1)


class AdapterTrainee(Trainee):
    """The image projector and, in every cross-attention, ``to_k_ip`` and ``to_v_ip``."""

    keeps_text = False

    def __init__(self, config: RunConfig, base: FrozenBase, adapter: TrainedAdapter, sizes: EncoderSizes) -> None:
        super().__init__(config, base, adapter)
        self.adapter, self.sizes = adapter, sizes
        self.spec, self.image_tokens = adapter.spec(), adapter.num_tokens

    @staticmethod
    def wanted(config: RunConfig) -> bool:
        return config.adapter != AdapterConfig()  # what a config without a word about what learns gets all the same

    @classmethod
    def build(cls, config: RunConfig, base: FrozenBase) -> AdapterTrainee:
        sizes = encoder_sizes(base.home, config.model.image_encoder)
        if not config.adapter.start_from:
            return cls(config, base, fresh_adapter(base.unet, sizes, config.adapter), sizes)
        weights = load_adapter(config.adapter.start_from, dtype=torch.float32)
        check_family(config.adapter, weights.spec)
        return cls(config, base, continued_adapter(base.unet, weights, sizes), sizes)

    @staticmethod
    def settled(config: RunConfig) -> RunConfig:
        return config

    def attach(self, learned: nn.Module, parts: Parts) -> None:
        cast(TrainedAdapter, learned).install(parts["denoiser"])

    def off(self) -> AbstractContextManager[None]:
        return nullcontext()  # the encoders of pictures know nothing of it

    def save(self, path: Path, state: State, metadata: Mapping[str, str]) -> Path:
        return self.adapter.save(path, state, metadata, self.config.output)

    def describe(self) -> str:
        return describe_trainable(self.adapter)

    def encoders(self, device: torch.device) -> Encoders:
        encoder = load_encoder(self.base.home, self.config.model.image_encoder)
        return Encoders(self.base, encoder, self.spec, self.config.data, device)

    def cache_settings(self) -> CacheSettings:
        return cache_settings(self.config.model, self.config.data, self.base, self.spec)

    def step(self, objective: Objective, nothing: Nothing) -> AdapterStep:
        check_widths(self.spec, nothing.features)
        return AdapterStep(self.adapter, self.base, objective, nothing)

    def compared(self, loss: MeanLoss, batches: Sequence[Batch]) -> dict[str, float]:
        """``image_gain`` without the image, ``reference_gain`` with a wrong one; near 0 the adapter ignores its image."""
        found = {"image_gain": loss(batches, no_image=True)}
        if len(batches) > 1:
            others = [*batches[1:], batches[0]]
            found["reference_gain"] = loss(
                [replace(own, features=other.features) for own, other in zip(batches, others, strict=True)]
            )
        return found

    def sheet(self, step: DenoisingStep, state: State, shown: Shown) -> Image.Image:
        """References on top, then one row per prompt, drawn by the same code that users draw with."""
        from diffusers.models.attention_processor import AttnProcessor2_0

        unet, watch, side = self.base.unet, self.config.watch, self.config.data.resolution
        weights = self.adapter.weights(unet.dtype, state)
        weights.module.to(unet.device)
        unet.set_attn_processor(AttnProcessor2_0())
        try:
            pipeline = pipeline_around(self.base, step.objective, side)
            patch = bake(weights, _prompt(weights, shown.features, step.nothing.features), layout_of(unet))
            count = len(shown.tiles)
            rows = list(shown.tiles)
            for text in watch.sample_prompts:
                pictures = generate(
                    pipeline,
                    [patch],
                    [text] * count,
                    steps=watch.sample_steps,
                    guidance=watch.guidance,
                    seeds=list(range(count)),
                    height=side,
                    width=side,
                )
                rows += [to_pillow(picture) for picture in pictures]
        finally:
            self.attach(self.adapter, self.parts)
        return grid_of(rows, columns=count)

    def metadata(self, objective: Objective, samples: Sequence[Sample] | None) -> dict[str, str]:
        told = {"encoder_tokens": str(self.sizes.tokens), "encoder_size": str(self.sizes.image_size)}
        return super().metadata(objective, samples) | told


def _prompt(weights: AdapterWeights, features: Tensor, neutral: Tensor) -> ImagePrompt:
    features = features.to("cpu", weights.dtype)
    neutral = neutral.to(features).expand_as(features)
    return ImagePrompt(
        weights.tokens(features),
        weights.tokens(neutral),
        features[:, None],
        neutral[:, None],
        weights.name,
        weights.spec.encoder,
        weights.spec.token_dim,
    )
