"""Looking at a run: validation at fixed timesteps and noise, and sample sheets through the inference path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints import AdapterWeights
from ..errors import AdapterError
from ..generate import generate, grid_of, to_pillow
from ..layouts import layout_of
from ..patch import bake
from ..prompt import ImagePrompt
from ..schedule import WeightSchedule
from .batches import Batch, Item, assemble
from .collection import Sample
from .config import Prediction, WatchConfig
from .encode import Encoders
from .frozen import FrozenBase
from .objectives import Objective
from .order import Draws, seeded
from .pictures import cut_target, decode
from .step import AdapterStep


class Validation:
    """Loss on held-out pictures: with their own reference, without one, and with another's."""

    def __init__(self, items: Sequence[Item], encoders: Encoders | None, config: WatchConfig, batch: int) -> None:
        self._set([assemble([item], encoders) for item in items], config, batch)

    @classmethod
    def of(cls, batches: Sequence[Batch], config: WatchConfig, batch: int) -> Validation:
        """Over pictures that are encoded already: batches of one."""
        made = cls([], None, config, batch)
        made._set(batches, config, batch)
        return made

    def _set(self, batches: Sequence[Batch], config: WatchConfig, batch: int) -> None:
        self.timesteps, self.size = config.timesteps, batch
        self.batches, self.count = list(batches), len(batches)

    @torch.no_grad()
    def measure(self, module: AdapterStep, objective: Objective, device: torch.device) -> dict[str, float]:
        """`validation`, and what is added to it without the image (`image_gain`) and with a wrong one
        (`reference_gain`): both near 0 mean that the adapter ignores its image."""
        own = self._mean(module, objective, device, [b.features for b in self.batches], no_image=False)
        values = {"validation": own}
        none = self._mean(module, objective, device, [b.features for b in self.batches], no_image=True)
        values["image_gain"] = none - own
        if self.count > 1:
            rolled = [self.batches[(i + 1) % self.count].features for i in range(self.count)]
            values["reference_gain"] = self._mean(module, objective, device, rolled, no_image=False) - own
        return {key: round(value, 8) for key, value in values.items()}

    def _mean(
        self,
        module: AdapterStep,
        objective: Objective,
        device: torch.device,
        features: Sequence[Tensor],
        *,
        no_image: bool,
    ) -> float:
        cases = [
            (Batch(b.latents, f, b.tokens, b.sizes, b.places), i, t)
            for t in self.timesteps
            for i, (b, f) in enumerate(zip(self.batches, features, strict=True))
        ]
        groups: dict[tuple[int, ...], list[tuple[Batch, int, int]]] = {}
        for case in cases:
            groups.setdefault(tuple(case[0].latents.shape), []).append(case)
        total = 0.0
        for group in groups.values():
            for start in range(0, len(group), self.size):
                part = group[start : start + self.size]
                batch, draws = _stack([b for b, _, _ in part]), _fixed(part, objective, no_image)
                total += float(module.losses(batch.to(device), draws.to(device)).sum())
        return total / len(cases)


def _stack(batches: Sequence[Batch]) -> Batch:
    return Batch(
        torch.cat([b.latents for b in batches]),
        torch.cat([b.features for b in batches]),
        tuple(torch.cat(ids) for ids in zip(*(b.tokens for b in batches), strict=True)),
        torch.cat([b.sizes for b in batches]),
        [(0, 0)] * len(batches),
    )


def _fixed(cases: Sequence[tuple[Batch, int, int]], objective: Objective, no_image: bool) -> Draws:
    """The same noise for a picture and timestep at every validation of every run."""
    noise = torch.cat(
        [torch.randn(b.latents[:, 0].shape, generator=seeded("validation", i, t)) for b, i, t in cases]
    )  # fmt: skip
    kind = torch.float32 if objective.prediction == "flow" else torch.long
    return Draws(
        noise,
        torch.zeros_like(noise),
        torch.tensor([t for _, _, t in cases], dtype=kind),
        torch.full((len(cases),), no_image),
        torch.zeros(len(cases), dtype=torch.bool),
    )


class Sheets:
    """Sample sheets: references on top, then one row per prompt, drawn by the same code that users draw with."""

    def __init__(
        self,
        base: FrozenBase,
        features: Tensor,
        neutral: Tensor,
        references: Sequence[Image.Image],
        config: WatchConfig,
        resolution: int,
        prediction: Prediction,
    ) -> None:
        self.base, self.features, self.neutral = base, features, neutral
        self.references, self.config, self.resolution, self.prediction = references, config, resolution, prediction

    @torch.no_grad()
    def draw(self, weights: AdapterWeights, install: Callable[[], None]) -> Image.Image:
        """One sheet with these weights; `install` puts the training's processors back afterwards."""
        from diffusers.models.attention_processor import AttnProcessor2_0

        unet = self.base.unet
        weights.module.to(unet.device)
        unet.set_attn_processor(AttnProcessor2_0())
        try:
            pipeline = self._pipeline()
            layout = layout_of(unet)
            prompt = self._prompt(weights)
            patch = bake(weights, prompt, layout, WeightSchedule())
            count = len(self.features)
            rows = list(self.references)
            for text in self.config.sample_prompts:
                pictures = generate(
                    pipeline,
                    [patch],
                    [text] * count,
                    steps=self.config.sample_steps,
                    guidance=self.config.guidance,
                    seeds=list(range(count)),
                    height=self.resolution,
                    width=self.resolution,
                )
                rows += [to_pillow(picture) for picture in pictures]
        finally:
            install()
        return grid_of(rows, columns=count)

    def _prompt(self, weights: AdapterWeights) -> ImagePrompt:
        features = self.features.to(weights.dtype)
        neutral = self.neutral.to(weights.dtype).expand_as(features)
        return ImagePrompt(
            weights.tokens(features),
            weights.tokens(neutral),
            features[:, None],
            neutral[:, None],
            weights.name,
            weights.spec.encoder,
            weights.spec.token_dim,
        )

    def _pipeline(self) -> Any:
        """The model folder's pipeline around the models in memory; the VAE comes from disk and goes again."""
        base = self.base
        parts: dict[str, Any] = {"unet": base.unet, "text_encoder": base.text_encoders[0]}
        if len(base.text_encoders) > 1:
            parts["text_encoder_2"] = base.text_encoders[1]
        pipeline: Any = base.pipeline(**parts)
        if self.prediction in ("epsilon", "v_prediction"):
            pipeline.scheduler = type(pipeline.scheduler).from_config(
                pipeline.scheduler.config, prediction_type=self.prediction
            )
        if hasattr(pipeline, "safety_checker"):
            pipeline.safety_checker = None
        pipeline.vae.to(base.unet.device, base.unet.dtype)
        pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
        return pipeline


class Readable(Protocol):
    """Bytes of pictures by name."""

    def read(self, name: str) -> bytes: ...


def reference_tiles(source: Readable, samples: Sequence[Sample], side: int) -> list[Image.Image]:
    """The references of some samples as squares; white where a stream cannot show them again."""
    tiles: list[Image.Image] = []
    for sample in samples:
        name = sample.reference or sample.name
        try:
            pixels, _ = cut_target(decode(source.read(name), name), (side, side))
            tiles.append(to_pillow(pixels.permute(1, 2, 0) / 2 + 0.5))
        except (OSError, AdapterError):
            tiles.append(Image.new("RGB", (side, side), "white"))
    return tiles
