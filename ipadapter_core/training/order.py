"""Which sample comes when, and every random draw: functions of the seed and the place in the run, and of nothing else.

So a resumed run draws what an uninterrupted one would, a cache changes no draw, and two processes of batch b draw what
one of batch 2b does. No random state has to be saved.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .collection import Collection
from .config import DataConfig
from .objectives import LossConfig, Objective


def seeded(*place: object) -> torch.Generator:
    """A generator for one place in the run; other places have other numbers."""
    digest = hashlib.blake2b("/".join(map(str, place)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True, slots=True)
class SampleIndex:
    """A target, its reference, and which version of that reference; ``place`` is (micro-step, position in it)."""

    target: int
    reference: int
    variant: int
    place: tuple[int, int]


class Order:
    """The batches of a run. An epoch is a shuffle of every bucket; its last batches are filled up from its start."""

    def __init__(self, collection: Collection, batch: int, seed: int, data: DataConfig) -> None:
        self.collection, self.batch, self.seed, self.data = collection, batch, seed, data
        self.buckets = [list(collection.buckets[size]) for size in sorted(collection.buckets)]
        self.epoch_length = sum(-(-len(bucket) // batch) for bucket in self.buckets)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def indices(self, micro: int, rank: int = 0, world: int = 1) -> list[SampleIndex]:
        """This rank's share of a micro-step's samples."""
        chosen = self._epoch(micro // self.epoch_length)[micro % self.epoch_length]
        share = self.batch // world
        return [self._index(chosen[i], (micro, i)) for i in range(rank * share, (rank + 1) * share)]

    def from_step(self, micro: int, end: int, rank: int = 0, world: int = 1) -> Iterator[list[SampleIndex]]:
        return (self.indices(m, rank, world) for m in range(micro, end))

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        batches: list[list[int]] = []
        for number, bucket in enumerate(self.buckets):
            order = torch.randperm(len(bucket), generator=seeded(self.seed, "shuffle", epoch, number)).tolist()
            filled = [bucket[order[i % len(order)]] for i in range(-(-len(bucket) // self.batch) * self.batch)]
            batches += [filled[i : i + self.batch] for i in range(0, len(filled), self.batch)]
        order = torch.randperm(len(batches), generator=seeded(self.seed, "batches", epoch)).tolist()
        return [batches[i] for i in order]

    def _index(self, target: int, place: tuple[int, int]) -> SampleIndex:
        generator = seeded(self.seed, "pick", *place)
        chance, which, variant = torch.rand(3, generator=generator).tolist()
        sample = self.collection.samples[target]
        reference = target
        if not sample.reference and chance < self.data.pairs:
            others = [i for i in self.collection.subjects.get(sample.subject, ()) if i != target]
            if others:
                reference = others[int(which * len(others))]
        return SampleIndex(target, reference, int(variant * self.data.variants), place)


@dataclass(slots=True)
class NoiseDraws:
    """The randomness of one batch: noise and ``latent_noise`` ``b c y x``, timesteps, drops ``b``."""

    noise: Tensor
    latent_noise: Tensor
    timesteps: Tensor
    no_image: Tensor
    no_text: Tensor

    def to(self, device: torch.device) -> NoiseDraws:
        return NoiseDraws(*(getattr(self, name).to(device) for name in self.__slots__))


def draw(
    seed: int, places: Sequence[tuple[int, int]], shape: Sequence[int], objective: Objective, loss: LossConfig
) -> NoiseDraws:
    """NoiseDraws for samples at these places with latents ``c y x``; float32 on the CPU, the same on every device."""
    noises: list[Tensor] = []
    latent_noises: list[Tensor] = []
    timesteps: list[float] = []
    chances: list[float] = []
    for place in places:
        generator = seeded(seed, "draw", *place)
        chances.append(float(torch.rand((), generator=generator, dtype=torch.float64)))
        timesteps.append(objective.draw_timestep(generator, (shape[-2], shape[-1])))
        noise = torch.randn(*shape, generator=generator)
        if loss.noise_offset:
            noise = noise + loss.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
        noises.append(noise)
        latent_noises.append(torch.randn(*shape, generator=generator))
    no_image, no_text = drops(torch.tensor(chances, dtype=torch.float64), loss)
    times = torch.tensor(timesteps, dtype=objective.dtype)
    return NoiseDraws(torch.stack(noises), torch.stack(latent_noises), times, no_image, no_text)


def drops(chances: Tensor, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """One uniform number per sample decides: image gone, text gone, both gone, or neither (they exclude one another)."""
    image, text = loss.drop_image, loss.drop_image + loss.drop_text
    both = text + loss.drop_both
    no_image = (chances < image) | ((chances >= text) & (chances < both))
    no_text = (chances >= image) & (chances < both)
    return no_image, no_text
