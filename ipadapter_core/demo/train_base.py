"""What the stages of the demo world's training ask of a base model, whatever it is; ``train_unet`` and ``train_flux`` answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checkpoints import AdapterSpec, Format
from ..features import Encoded
from ..models.sites import ModelLayout
from .train_parts import EMBED_DIM, VISION_DIM

WIDTHS: dict[Encoded, int] = {"image_embeds": EMBED_DIM, "penultimate": VISION_DIM}
"""Of the features that the world's image encoder gives."""
RESAMPLER = {"queries": 16, "depth": 2, "hidden_dim": VISION_DIM, "inner_dim": VISION_DIM, "ff_dim": 4 * VISION_DIM}
"""The world's resamplers: each of 16 queries reads its own sixteenth of the picture (``train_adapters.start_on_grid``)."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that the world gets: its family, how many tokens, and the sizes of its projector."""

    format: Format
    num_tokens: int
    options: Mapping[str, int] = field(default_factory=dict[str, int])

    def spec(self, layout: ModelLayout) -> AdapterSpec:
        """What a file of it says for a model of these sites."""
        read = self.format
        assert read.feature.encoded is not None
        width, token_dim = WIDTHS[read.feature.encoded], layout.token_dim
        channels = tuple(layout.sites[i].channels for i in read.reach.sites(layout))
        name = read.base_model(token_dim, channels)
        return AdapterSpec(
            read, name, self.num_tokens, token_dim, width, read.unconditional, "custom", channels, self.options
        )


class Base(ABC):
    """A base model that the world can have, on one device. A new one is a file with such a class and a line in ``train_all.BASES``."""

    name: ClassVar[str]
    """For people to choose by."""
    part: ClassVar[str]
    """What diffusers' pipelines call it: its part of the work and its stage."""
    adapters: ClassVar[Mapping[str, Adapter]]
    """By the names of their files: the first learns together with the base model, the others one by one on the finished one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def build(self) -> nn.Module:
        """The model with random weights, on the default device."""

    @abstractmethod
    def noised(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents ``b c y x`` with noise of a drawn time, that time ``b`` as the model reads it, and what it shall predict."""

    @abstractmethod
    def predicted(self, model: nn.Module, noisy: Tensor, time: Tensor, text: Any) -> Tensor:
        """What the model predicts; ``text`` is what the text encoder gave of the captions."""

    @abstractmethod
    def pipeline(self, model: nn.Module, **parts: Any) -> Any:
        """diffusers' pipeline of the model with ``vae``, ``text_encoder``, ``tokenizer`` and ``image_encoder``."""
