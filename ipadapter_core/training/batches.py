"""Picks to tensors: from the cache, or from the pictures through the encoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..errors import CorruptFileError
from .cache import Cache, tokens_key
from .collection import Collection, Sample
from .config import DataConfig
from .encode import Encoders
from .frozen import EncoderLooks
from .order import Pick
from .pictures import bucket_for, bucket_sizes, cut_target, decode, see_reference
from .sources import Source


@dataclass(slots=True)
class Item:
    """One sample, as far as it can be prepared without a model: `ready` ones have latents and features, others pixels."""

    target: Tensor
    reference: Tensor
    tokens: tuple[Tensor, ...]
    sizes: Tensor
    place: tuple[int, int]
    ready: bool
    skipped: str = ""


@dataclass(slots=True)
class Batch:
    """What one forward pass sees: latents `b m c y x` (m: mean, or mean and deviation), features, token ids, sizes."""

    latents: Tensor
    features: Tensor
    tokens: tuple[Tensor, ...]
    sizes: Tensor
    places: list[tuple[int, int]]

    def to(self, device: torch.device) -> Batch:
        tokens = tuple(ids.to(device) for ids in self.tokens)
        return Batch(self.latents.to(device), self.features.to(device), tokens, self.sizes.to(device), self.places)


class Items(Protocol):
    """Samples by pick; what a torch DataLoader calls a dataset."""

    def __getitem__(self, pick: Pick) -> Item: ...

    def validation(self, sample: Sample) -> Item: ...


class CachedItems:
    """Samples from the cache. The encoders need not be in memory."""

    def __init__(self, collection: Collection, cache: Cache) -> None:
        self.collection, self.cache = collection, cache

    def __getitem__(self, pick: Pick) -> Item:
        target, reference = self.collection.samples[pick.target], self.collection.samples[pick.reference]
        return self._item(target, _reference_key(target, reference), pick.variant, pick.place)

    def validation(self, sample: Sample) -> Item:
        return self._item(sample, _reference_key(sample, sample), 0, (0, 0))

    def _item(self, target: Sample, reference_key: str, variant: int, place: tuple[int, int]) -> Item:
        ids = self.cache.read(tokens_key(target.caption)).long()
        return Item(
            self.cache.read(f"{target.key}.latents"),
            self.cache.read(f"{reference_key}.features")[variant],
            tuple(ids.unbind(0)),
            self.cache.read(f"{target.key}.sizes"),
            place,
            ready=True,
        )


class LiveItems:
    """Samples opened when they are needed. One that cannot be opened any more is named and its neighbour taken."""

    def __init__(
        self, collection: Collection, source: Source, config: DataConfig, looks: EncoderLooks, tokenize: Any
    ) -> None:
        self.collection, self.source, self.config = collection, source, config
        self.looks, self.tokenize = looks, tokenize
        self._sizes = bucket_sizes(config)
        self._neighbour: dict[int, int] = {}
        for bucket in collection.buckets.values():
            self._neighbour.update(zip(bucket, [*bucket[1:], bucket[0]], strict=True))

    def __getitem__(self, pick: Pick) -> Item:
        skipped: list[str] = []
        target, reference = pick.target, pick.reference
        for _ in range(len(self._neighbour)):
            try:
                samples = self.collection.samples
                item = self._item(samples[target], samples[reference], pick.variant, pick.place)
                item.skipped = "; ".join(skipped)
                return item
            except (OSError, CorruptFileError) as error:
                skipped.append(str(error))
                # the reference may be the broken one: the neighbour is its own reference
                target = reference = self._neighbour[target]
        raise CorruptFileError(f"no picture can be read any more; the last error: {skipped[-1]}")

    def validation(self, sample: Sample) -> Item:
        return self._item(sample, sample, 0, (0, 0))

    def _item(self, target: Sample, reference: Sample, variant: int, place: tuple[int, int]) -> Item:
        image = decode(self.source.read(target.name), target.name)
        name, key = (target.reference, target.reference_key) if target.reference else (reference.name, reference.key)
        seen = image if name == target.name else decode(self.source.read(name), name)
        pixels, cut = cut_target(image, bucket_for(target.size, self._sizes))
        return Item(
            pixels,
            see_reference(seen, self.looks, self.config.augment, f"{key} {variant}"),
            tuple(ids[0] for ids in self.tokenize([target.caption])),
            torch.tensor(cut.time_ids(), dtype=torch.float32),
            place,
            ready=False,
        )


def _reference_key(target: Sample, reference: Sample) -> str:
    return target.reference_key or reference.key


def assemble(items: Sequence[Item], encoders: Encoders | None) -> Batch:
    """Stack items into a batch, through the encoders where they are still pixels."""
    targets = [item.target for item in items]
    references = torch.stack([item.reference for item in items])
    if not items[0].ready:
        assert encoders is not None
        targets, references = encoders.latents(targets), encoders.features(references)
    return Batch(
        torch.stack(targets),
        references,
        tuple(torch.stack(ids) for ids in zip(*(item.tokens for item in items), strict=True)),
        torch.stack([item.sizes for item in items]),
        [item.place for item in items],
    )


def loader(items: Items, picks: Iterator[list[Pick]], workers: int) -> Iterator[list[Item]]:
    """Batches of items in the order of the picks, prepared by `workers` processes ahead of time."""
    from torch.utils.data import DataLoader

    made: Any = DataLoader(
        cast(Any, items), batch_sampler=cast(Any, picks), num_workers=workers, collate_fn=_as_list
    )  # fmt: skip
    return iter(made)


def _as_list(items: list[Item]) -> list[Item]:
    return items
