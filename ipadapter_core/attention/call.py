"""What a hook knows when it runs: the model call, described once when it starts, and one attention of it.

Both hosts describe their calls so, and image prompts and LoRAs read the same description.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .batch import Frames
from .maths import query_rows

Area = tuple[int, int, int, int]
"""Part of the latent that a model call sees: height, width, top, left, in latents (ComfyUI's order)."""

UNCOND, COND = 0, 1
"""Branches of classifier-free guidance; baked tensors hold them in this order, the order in which hosts batch them."""


AddImage = Callable[[Tensor, "SiteCall", Tensor], Tensor]
"""``(base, site's call, query_rows)`` to the base with one image's attention added."""


class Hearing(Protocol):
    """Hears in one model call what image prompts add; ``recording`` has the one that there is."""

    def heard(self, patch: object, site: int, add: AddImage, references: Sequence[AddImage], count: int) -> AddImage:
        """``add`` that also tells; ``references`` give the attention to each of ``count`` pictures in columns of every head."""
        ...


@dataclass(slots=True, eq=False)
class Ready:
    """What one image prompt does at one site, resolved for queries of this device and dtype: ``factor`` is the step's, ``groups`` and
    ``width`` those of ``query_rows``, ``tokens`` how many queries there must be, None where a mask does not ask."""

    add: AddImage
    factor: float
    groups: int
    width: int
    tokens: int | None
    device: torch.device
    dtype: torch.dtype


@dataclass(slots=True, eq=False)
class Acting:
    """One image prompt in one model call: the step's factor, and what is ready at each site for calls of this kind."""

    factor: float
    branches: tuple[int, ...]
    sites: list[Ready | None]


@dataclass(frozen=True, slots=True, eq=False)
class ModelCall:
    """One call of a model in host-neutral terms, the same for all that acts in it.

    ``branches`` names the chunks of the batch in order (COND or UNCOND); each holds ``b / len(branches)`` latents.
    ``percent`` is the sampling progress, 0 (pure noise) .. 1 (done); it may read the device, so it is asked only for
    windows and curves. ``timestep`` is that of training, 0..1000, read as rarely. ``latent`` is the whole latent's size, ``areas`` the part of it that each chunk sees (None: all);
    these two matter only for masks. ``times`` is how many moments each latent of a video has, ``batch`` how many latents
    there are in all chunks, None where that is not known. ``frames`` are the latents' numbers in an animation that is sampled in windows.
    ``order`` and ``size`` are the host's own index of each chunk and the latent's size in this very call, for Rules that
    go by them. Of a transformer, ``text`` is how many tokens of text stand in front where a block has text and picture in
    one sequence, and ``picture`` how many tokens are the picture's where reference pictures follow (None: all the others).
    ``hearing`` is there in calls that are recorded.
    """

    branches: tuple[int, ...] = (COND,)
    percent: Callable[[], float] = float
    timestep: Callable[[], float] = float
    latent: tuple[int, int] | None = None
    areas: tuple[Area | None, ...] | None = None
    frames: Frames | None = None
    order: tuple[int, ...] | None = None
    size: tuple[int, int] | None = None
    text: int = 0
    picture: int | None = None
    hearing: Hearing | None = None
    times: int = 1
    batch: int | None = None
    acting: dict[object, Acting] = field(default_factory=dict[object, "Acting"], repr=False)
    """By image prompt: what all its sites have in common in this call, put here by the first."""

    @property
    def seen(self) -> tuple[int, int] | None:
        """Size of what every chunk sees of the latent."""
        area = self.areas[0] if self.areas else None
        return self.latent if area is None else area[:2]


@dataclass(slots=True, eq=False)
class SiteCall:
    """One attention of a model call, the same for every image prompt on the site.

    ``q`` are the latent tokens' queries ``b l c`` of ``heads`` heads, behind those of ``text`` tokens of the prompt where
    these ask too (``Reach.span``); ``shape`` ends in the rows and columns of the tokens where the host tells them.

    Transformers norm their queries: ``q`` is the normed one, before any rotation. For adapters with a norm of their own
    (``Reach.query`` is ``raw``) ``query_norm`` is the weight ``d`` of the model's RMS norm, so that it can be undone; None
    says that ``q`` is as its layer projects it. For ``Reach.own_keys`` ``k`` and ``v`` are the keys, after the model's norm of
    weight ``key_norm`` (None: before one), and the values of the same tokens, ``b l c``. For ``Reach.gated`` ``emb`` is the
    conditioning of the block, ``b 1 e``, or ``b t e`` where tokens are of t frames one after the other.
    """

    call: ModelCall
    q: Tensor
    heads: int
    shape: Sequence[int] | None = None
    text: int = 0
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    emb: Tensor | None = None
    _rows: Tensor | None = None
    _groups: int = 0

    def rows(self, groups: int, width: int) -> Tensor:
        """``query_rows`` for so many groups, kept for the next image prompt on the site."""
        if self._rows is None or self._groups != groups:
            self._rows, self._groups = query_rows(self.q, self.heads, groups, width), groups
        return self._rows
