"""Looking at a run: validation at fixed timesteps and noise, and sample sheets through the inference path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..attention.schedule import WeightSchedule
from ..bake import bake
from ..checkpoints import AdapterWeights
from ..errors import AdapterError
from ..generate import generate, grid_of, to_pillow
from ..images.files import decode_picture
from ..models import layout_of
from ..prompt.image_prompt import ImagePrompt
from .batches import Batch, Item, assemble
from .collection import Sample
from .config import WatchConfig
from .encode import TargetEncoders
from .frozen import FrozenBase
from .objectives import Objective
from .order import Draws, seeded
from .pictures import cut_target
from .step import AdapterStep


class Validation:
    """Loss on held-out pictures: with their own reference, without one, and with another's."""

    def __init__(self, items: Sequence[Item], encoders: TargetEncoders | None, config: WatchConfig, batch: int) -> None:
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

        def mean(batches: Sequence[Batch], *, no_image: bool = False) -> float:
            return mean_loss(module, objective, device, batches, self.timesteps, self.size, no_image=no_image)

        own = mean(self.batches)
        values = {"validation": own, "image_gain": mean(self.batches, no_image=True) - own}
        if self.count > 1:
            others = [self.batches[(i + 1) % self.count].features for i in range(self.count)]
            rolled = [replace(b, features=features) for b, features in zip(self.batches, others, strict=True)]
            values["reference_gain"] = mean(rolled) - own
        return {key: round(value, 8) for key, value in values.items()}


def mean_loss(
    module: Any,
    objective: Objective,
    device: torch.device,
    batches: Sequence[Batch],
    timesteps: Sequence[int],
    size: int,
    *,
    no_image: bool = False,
) -> float:
    """Mean of a step's `losses` over batches of one picture, each at every timestep, `size` at a time."""
    cases = [(batch, i, t) for t in timesteps for i, batch in enumerate(batches)]
    groups: dict[tuple[int, ...], list[tuple[Batch, int, int]]] = {}
    for case in cases:
        groups.setdefault(tuple(case[0].latents.shape), []).append(case)
    total = 0.0
    for group in groups.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
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
        tuple(torch.cat(one) for one in zip(*(b.text for b in batches), strict=True)),
    )


def _fixed(cases: Sequence[tuple[Batch, int, int]], objective: Objective, no_image: bool) -> Draws:
    """The same noise for a picture and timestep at every validation of every run."""
    noise = torch.cat(
        [torch.randn(b.latents[:, 0].shape, generator=seeded("validation", i, t)) for b, i, t in cases]
    )  # fmt: skip
    return Draws(
        noise,
        torch.zeros_like(noise),
        torch.tensor([t for _, _, t in cases], dtype=objective.dtype),
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
        objective: Objective,
    ) -> None:
        self.base, self.features, self.neutral = base, features, neutral
        self.references, self.config, self.resolution = references, config, resolution
        self.objective = objective

    @torch.no_grad()
    def draw(self, weights: AdapterWeights, install: Callable[[], None]) -> Image.Image:
        """One sheet with these weights; `install` puts the training's processors back afterwards."""
        from diffusers.models.attention_processor import AttnProcessor2_0

        unet = self.base.unet
        weights.module.to(unet.device)
        unet.set_attn_processor(AttnProcessor2_0())
        try:
            pipeline = pipeline_around(self.base, self.objective)
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


def pipeline_around(base: FrozenBase, objective: Objective) -> Any:
    """The model folder's pipeline around the models in memory; what is not there comes from disk and goes again."""
    parts: dict[str, Any] = {"unet": base.unet}
    parts |= dict(zip(("text_encoder", "text_encoder_2"), base.text_encoders, strict=False))
    pipeline: Any = base.pipeline(**parts)
    if hasattr(pipeline, "safety_checker"):
        pipeline.safety_checker = None
    for name in ("vae", "text_encoder", "text_encoder_2"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).to(base.unet.device, base.unet.dtype)
    pipeline.scheduler = copy.deepcopy(objective.sampler(pipeline.scheduler))
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
            pixels, _ = cut_target(decode_picture(source.read(name), name), (side, side))
            tiles.append(to_pillow(pixels.permute(1, 2, 0) / 2 + 0.5))
        except (OSError, AdapterError):
            tiles.append(Image.new("RGB", (side, side), "white"))
    return tiles
