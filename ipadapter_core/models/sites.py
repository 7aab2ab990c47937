"""Base models and the places in them where an image prompt can act, as plain values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from .grids import Patches, TokenRule
from .layers import LayerNames, Shapes
from .naming import Naming
from .streams import Streams


@dataclass(frozen=True, slots=True)
class Site:
    """One attention of a base model where an image can act.

    ``path`` is the attention's module path in its model. ``group`` is the model's own word for the kind of block:
    ``input``, ``middle`` or ``output`` in a UNet. ``number`` is the block's number in its group as ComfyUI counts,
    ``depth`` the place inside that block. ``order`` is the index that weight presets and layer weights use (``t_idx``);
    it rises in execution order, and the sites of one block share it.
    """

    path: str
    group: str
    number: int
    depth: int
    order: int
    channels: int
    heads: int


@dataclass(frozen=True, slots=True)
class Roles:
    """Which sites of a model carry what, by ``order``: composition with its factor, and style."""

    composition: Mapping[int, float] = field(hash=False)
    style: frozenset[int]

    def of(self, site: Site) -> str:
        """``composition``, ``style`` or nothing."""
        return "composition" if site.order in self.composition else "style" if site.order in self.style else ""


Clock = Literal["steps", "sigma", "signal"]
"""What diffusers' pipelines call a model with to say how noisy the latents are."""
Negative = Literal["batched", "apart"]
"""How diffusers' pipelines run the negative prompt: in one batch, before the positive one, or in a call of its own after it."""
Walk = Callable[[nn.Module], "ModelLayout | None"]
"""Finds a model's sites and names the base model; None for a model of another kind."""


@dataclass(frozen=True, slots=True)
class Training:
    """What the trainer must know of a family, in diffusers' form of it.

    ``condition`` is what the model reads: ``text``, the first encoder's last layer; ``text and sizes``, the last layer but
    one of two encoders, the second's pooled embedding, and original, crop and target size of the picture (SDXL).
    ``side_multiple`` tells of a model what the sides of its latents must be multiples of. Both tuples are class names of
    blocks: those whose activations gradient checkpointing computes again, and those that are gathered and let go as one
    when a model is split over processes.
    """

    condition: Literal["text", "text and sizes"]
    side_multiple: Callable[[nn.Module], int]
    checkpointed: tuple[str, ...]
    units: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """A family as others know it: the repository with its configs, and its names in kohya's and modelspec's metadata.

    ``velocity`` are the two names of its models that predict velocity, where these have others.
    """

    repository: str
    kohya: str
    modelspec: str
    velocity: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A family of base models. A new one is a file in this room with such a value and a line in ``BASE_MODELS``.

    For image prompts: ``walk`` finds the sites in every host's form of the model; related families share one walk, which
    names the family. Without it image prompts cannot act yet. ``groups`` are the words of its sites' groups, in execution order. ``roles`` is None where nobody knows which sites carry style
    or composition. ``tokens`` lays out a site's image tokens. ``reference_width`` is the width of the widest attention, by
    which the channel penalty divides. ``clock`` is what diffusers' pipelines call the model with:
    the noise ``steps`` of training, 0..999, ``sigma``, times 1000 or not, or the ``signal``, 1 - sigma; ``negative`` how they run the negative prompt.

    For LoRAs: ``naming`` is the table of a transformer's layers. Where no table says it all, ``layers`` names the layers of a
    model, given the shapes of their weights, and gives None for a model of another kind, and ``marks`` is found in underscored
    names of layers that no other family has. ``streams`` says which tokens the layers of a model see, for LoRAs in regions, and
    gives None for a model of another kind.

    ``steps`` and ``guidance`` are what people sample with who ask for nothing else.

    ``training`` is None where nothing can be trained yet, ``published`` where nothing is needed of it.
    """

    name: str
    walk: Walk | None = None
    groups: tuple[str, ...] = ()
    roles: Roles | None = None
    tokens: TokenRule = field(default_factory=Patches)
    reference_width: int = 0
    clock: Clock = "sigma"
    negative: Negative = "batched"
    naming: Naming | None = None
    layers: Callable[[nn.Module, Shapes], LayerNames | None] | None = None
    marks: re.Pattern[str] | None = None
    streams: Callable[[nn.Module], Streams | None] | None = None
    steps: int = 25
    guidance: float = 7.5
    training: Training | None = None
    published: Published | None = None


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """A base model as its sites in execution order; ``token_dim`` is the width of its text tokens."""

    model: BaseModel
    token_dim: int
    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """Name of the base model, such as ``SDXL``."""
        return self.model.name

    @property
    def orders(self) -> int:
        """Number of different ``order`` values: 16 for SD1.5, 11 for SDXL."""
        return len({site.order for site in self.sites})

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that have sites, in execution order."""
        return tuple(dict.fromkeys(site.group for site in self.sites))

    def label(self, site: Site) -> str:
        """Short name of a site for tables: ``input 4.1``, or ``input 4`` where it is the only one of its block."""
        return f"{site.group} {site.number}" if self.alone(site) else f"{site.group} {site.number}.{site.depth}"

    def alone(self, site: Site) -> bool:
        """Whether a site is the only one of its block."""
        return sum(other.order == site.order for other in self.sites) == 1
