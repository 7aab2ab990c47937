"""Looking at a run: validation at fixed timesteps and noise, and sample sheets through the inference path."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from ..errors import AdapterError
from ..generate import to_pillow
from ..images.files import decode_picture
from .batches import Batch
from .collection import Sample
from .frozen import FrozenBase, latent_factor
from .objectives import Objective
from .order import NoiseDraws, seeded
from .pictures import cut_target
from .step import DenoisingStep
from .trainee import Shown, State, Trainee


class Validator:
    """The loss on held-out pictures, compared as the trainee asks, and its sample sheets.

    ``batches`` are held-out pictures, one each; ``shown`` is what sheets show, None for no sheets.
    """

    def __init__(self, trainee: Trainee, batches: Sequence[Batch], shown: Shown | None) -> None:
        self.trainee, self.batches, self.shown = trainee, list(batches), shown

    @torch.no_grad()
    def validate(self, step: DenoisingStep) -> dict[str, float] | None:
        """``validation``, and what the trainee's other losses are above it."""
        config = self.trainee.config
        if not self.batches or not config.watch.validate_every:
            return None

        def loss(batches: Sequence[Batch], *, no_image: bool = False) -> float:
            return mean_loss(step, batches, config.watch.timesteps, config.train.batch, no_image=no_image)

        learning = step.training
        step.eval()  # no dropout
        try:
            own = loss(self.batches)
            others = self.trainee.compared(loss, self.batches)
        finally:
            step.train(learning)
        return {"validation": round(own, 8)} | {name: round(other - own, 8) for name, other in others.items()}

    @torch.no_grad()
    def sheet(self, step: DenoisingStep, state: State) -> Image.Image | None:
        """A sample sheet drawn with these weights."""
        return None if self.shown is None else self.trainee.sheet(step, state, self.shown)


def mean_loss(
    step: DenoisingStep, batches: Sequence[Batch], timesteps: Sequence[int], size: int, *, no_image: bool = False
) -> float:
    """Mean of a step's ``losses`` over batches of one picture, each at every timestep, ``size`` at a time."""
    device = step.base.unet.device
    cases = [(batch, i, t) for t in timesteps for i, batch in enumerate(batches)]
    groups: dict[tuple[int, ...], list[tuple[Batch, int, int]]] = {}
    for case in cases:
        groups.setdefault(tuple(case[0].latents.shape), []).append(case)
    total = 0.0
    for group in groups.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            batch, draws = _stack([b for b, _, _ in part]), _fixed(part, step.objective, no_image)
            total += float(step.losses(batch.to(device), draws.to(device)).sum())
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


def _fixed(cases: Sequence[tuple[Batch, int, int]], objective: Objective, no_image: bool) -> NoiseDraws:
    """The same noise for a picture and timestep at every validation of every run."""
    noise = torch.cat(
        [torch.randn(b.latents[:, 0].shape, generator=seeded("validation", i, t)) for b, i, t in cases]
    )  # fmt: skip
    return NoiseDraws(
        noise,
        torch.zeros_like(noise),
        torch.tensor([t for _, _, t in cases], dtype=objective.dtype),
        torch.full((len(cases),), no_image),
        torch.zeros(len(cases), dtype=torch.bool),
    )


def pipeline_around(base: FrozenBase, objective: Objective, side: int) -> Any:
    """The model folder's pipeline around the models in memory, for squares of so many pixels.

    What is not in memory comes from disk and goes again.
    """
    parts: dict[str, Any] = {"unet": base.unet}
    parts |= dict(zip(("text_encoder", "text_encoder_2"), base.text_encoders, strict=False))
    pipeline: Any = base.pipeline(**parts)
    if hasattr(pipeline, "safety_checker"):
        pipeline.safety_checker = None
    for name in ("vae", "text_encoder", "text_encoder_2"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).to(base.unet.device, base.unet.dtype)
    latent = side // latent_factor(pipeline.vae.config)
    pipeline.scheduler = copy.deepcopy(objective.sampler(pipeline.scheduler, (latent, latent)))
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
