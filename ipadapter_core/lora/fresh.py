"""What a training that begins from nothing is told, and what an algorithm says of itself for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn


class Settings(Protocol):
    """The trainer's ``[lora]`` section, as far as algorithms read it."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def rslora(self) -> bool: ...
    @property
    def factor(self) -> int: ...
    @property
    def dora_axis(self) -> Literal["out", "in"]: ...


@dataclass(frozen=True, slots=True)
class TrainedAs:
    """A name under which an algorithm is trained: ``lora.algorithm`` of the config and the node's choice.

    ``summary`` is for the node's tooltip, "" where the name says enough. ``targets`` are the layers that are trained where
    none are chosen, in the selector's words. ``network`` is what kohya calls its module (``ss_network_module``).
    ``no_dropout`` says why inputs cannot be dropped, "" if they can.
    """

    name: str
    summary: str = ""
    targets: str = "all: 0, attn: 1"
    network: str = "lycoris.kohya"
    no_dropout: str = ""


def scale_for(settings: Settings, rank: int) -> float:
    """alpha / rank, or alpha / √rank where the settings ask for it; an alpha of 0 is the rank."""
    alpha = settings.alpha or rank
    return alpha / (math.sqrt(rank) if settings.rslora else rank)


def normal(*shape: int, std: float = 1.0) -> Tensor:
    """Normally distributed numbers."""
    return torch.randn(*shape) * std


def uniform(*shape: int) -> Tensor:
    """As torch's linear layers start."""
    made = torch.empty(*shape)
    nn.init.kaiming_uniform_(made, a=math.sqrt(5))
    return made
