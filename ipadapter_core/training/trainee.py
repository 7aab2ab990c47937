"""What learns: one class for each kind of thing. It says what is its own; the trainer does the rest alike for all.

A new one is a subclass of ``Trainee`` and its entry in ``prepare.TRAINEES``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ..lora import Component
from .batches import Batch, Nothing
from .collection import Sample
from .config import RunConfig, without_places
from .encode import CacheSettings, TargetEncoders, target_settings
from .frozen import FrozenBase
from .objectives import Objective
from .step import DenoisingStep

Parts = Mapping[Component, nn.Module]
"""Frozen models by name."""
State = dict[str, Tensor]


class MeanLoss(Protocol):
    """The validation's loss on batches of one picture each; ``no_image``: as if their images had been dropped."""

    def __call__(self, batches: Sequence[Batch], *, no_image: bool = False) -> float: ...


@dataclass(frozen=True, slots=True)
class Shown:
    """Held-out pictures of a sample sheet: as squares, with their captions and features ``b …``."""

    tiles: Sequence[Image.Image]
    captions: Sequence[str]
    features: Tensor


class Trainee(ABC):
    """A thing that learns beside frozen models. ``learned`` holds all its parameters and no frozen one.

    The defaults are those of a thing without reference pictures: captions are encoded once, and the text encoders leave memory.
    """

    keeps_text: ClassVar[bool] | bool = True
    """Whether captions are encoded once and for all: no text encoder learns."""
    image_tokens: int = 0
    """How many tokens are added to the text's."""
    gain: ClassVar[str] = "own_gain"
    """How progress.jsonl and loss.png call what the validation loss rises by without it; it ends in _gain."""

    def __init__(self, config: RunConfig, base: FrozenBase, learned: nn.Module) -> None:
        self.base, self.learned = base, learned
        self.config = self.settled(config)

    # --- what every trainee says for itself ------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def wanted(config: RunConfig) -> bool:
        """Whether a config means this kind, by settings that no other kind asks for."""

    @classmethod
    @abstractmethod
    def build(cls, config: RunConfig, base: FrozenBase) -> Trainee:
        """The configured thing, fresh or from a file; torch's random numbers are seeded."""

    @abstractmethod
    def attach(self, learned: nn.Module, parts: Parts) -> None:
        """Let ``learned``, this one or a copy of it, act in these models."""

    @abstractmethod
    def off(self) -> AbstractContextManager[None]:
        """The frozen models alone, for the time of a block."""

    @abstractmethod
    def save(self, path: Path, state: State, metadata: Mapping[str, str]) -> Path:
        """Write weights to one file, in ``output.dtype``."""

    # --- what most have in common ------------------------------------------------------------------------------------------

    @staticmethod
    def settled(config: RunConfig) -> RunConfig:
        """The config without what has no meaning here: a caption is dropped or not, images have no part in it."""
        return replace(config, loss=replace(config.loss, drop_image=0.0, drop_both=0.0))

    @staticmethod
    def skips_parameters(config: RunConfig) -> bool:
        """Whether some parameters may get no gradient in a step, which several processes must know."""
        return False

    @property
    def parts(self) -> Parts:
        """The frozen models that it acts in."""
        return {"denoiser": self.base.unet}

    def count(self) -> int:
        """Numbers that learn."""
        return sum(p.numel() for p in self.learned.parameters() if p.requires_grad)

    def describe(self) -> str:
        """What learns, in some lines."""
        return f"trained: {self.count():,} parameters"

    def encoders(self, device: torch.device) -> TargetEncoders:
        """What pictures and captions go through before they are cached or trained on."""
        return TargetEncoders(self.base, self.config.data, device, keep_text=self.keeps_text)

    def cache_settings(self) -> CacheSettings:
        """Everything that the numbers of its encoders depend on, besides the pictures."""
        return target_settings(self.config.model, self.config.data, self.base, keep_text=self.keeps_text)

    def step(self, objective: Objective, nothing: Nothing) -> DenoisingStep:
        return DenoisingStep(self.learned, self.base, objective, nothing)

    def compared(self, loss: MeanLoss, batches: Sequence[Batch]) -> dict[str, float]:
        """Validation losses to compare with the plain one, by the name of the difference."""
        with self.off():
            return {self.gain: loss(batches)}

    def sheet(self, step: DenoisingStep, state: State, shown: Shown) -> Image.Image | None:
        """A sample sheet drawn with these weights; None: there is nothing to draw."""
        return None

    def metadata(self, objective: Objective, samples: Sequence[Sample] | None) -> dict[str, str]:
        """What a finished file says of its making; ``samples`` are those trained on, None for a stream."""
        settings = self.config.as_dict()
        settings = {section: settings[section] for section in settings if section not in ("output", "watch")}
        return {
            "trained_by": "ipadapter train",
            "prediction": objective.prediction,
            "base_files": Path(self.base.folder).name,
            "pictures": "a stream" if samples is None else str(len(samples)),
            "settings": json.dumps(without_places(settings)),
        }
