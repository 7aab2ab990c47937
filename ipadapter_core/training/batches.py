"""Samples to tensors: from the cache, or from the pictures through the encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..errors import AdapterError, CorruptFileError
from ..features import PixelSpec
from ..images.files import decode_picture
from .cache import NEUTRAL, Cache, tokens_key
from .collection import Collection, Sample
from .config import DataConfig
from .encode import TargetEncoders
from .order import SampleIndex
from .pictures import bucket_for, bucket_sizes, cut_target, reference_pixels
from .sources import Source
from .stopping import leave_signals_to_parent

NO_REFERENCE = torch.empty(0)
Tokenize = Callable[[list[str]], tuple[Tensor, ...]]
"""Captions to token ids ``b l``, one tensor per text encoder."""


@dataclass(slots=True)
class Item:
    """One sample, as far as it can be prepared without a model: ``ready`` ones have latents and features, others pixels.

    ``reference`` is empty where nothing is trained on references; ``text`` where text is encoded at every step.
    """

    target: Tensor
    reference: Tensor
    tokens: tuple[Tensor, ...]
    sizes: Tensor
    place: tuple[int, int]
    ready: bool
    skipped: str = ""
    text: tuple[Tensor, ...] = ()


@dataclass(slots=True)
class Batch:
    """What one forward pass sees: latents ``b m c y x`` (m: mean, or mean and deviation), features, token ids, sizes.

    ``text`` is the captions' context ``b l d`` and, for SDXL, pooled embedding ``b d``, where they are not encoded at every step.
    """

    latents: Tensor
    features: Tensor
    tokens: tuple[Tensor, ...]
    sizes: Tensor
    places: list[tuple[int, int]]
    text: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> Batch:
        tokens, text = (tuple(one.to(device) for one in several) for several in (self.tokens, self.text))
        latents, features, sizes = self.latents.to(device), self.features.to(device), self.sizes.to(device)
        return Batch(latents, features, tokens, sizes, self.places, text)


@dataclass(frozen=True, slots=True)
class Nothing:
    """What stands for no image and for no caption, one row each, in the form that batches have.

    ``features`` ``1 …``, token ids ``1 l``; ``text`` is the empty caption's context ``1 l d`` and SDXL's pooled embedding ``1 d``, where
    captions are not encoded at every step.
    """

    features: Tensor
    tokens: tuple[Tensor, ...]
    text: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> Nothing:
        tokens, text = (tuple(one.to(device) for one in several) for several in (self.tokens, self.text))
        return Nothing(self.features.to(device), tokens, text)


class Items(Protocol):
    """Samples by index; what a torch DataLoader calls a dataset."""

    def __getitem__(self, index: SampleIndex) -> Item: ...

    def validation(self, sample: Sample) -> Item: ...


class CachedItems:
    """Samples from the cache. The encoders need not be in memory."""

    def __init__(self, collection: Collection, cache: Cache) -> None:
        self.collection, self.cache = collection, cache

    def __getitem__(self, index: SampleIndex) -> Item:
        target, reference = self.collection.samples[index.target], self.collection.samples[index.reference]
        return self._item(target, _reference_key(target, reference), index.variant, index.place)

    def validation(self, sample: Sample) -> Item:
        return self._item(sample, _reference_key(sample, sample), 0, (0, 0))

    def _item(self, target: Sample, reference_key: str, variant: int, place: tuple[int, int]) -> Item:
        ids = self.cache.read(tokens_key(target.caption)).long()
        return Item(
            self.cache.read(f"{target.key}.latents"),
            self.cache.read(f"{reference_key}.features")[variant] if self.cache.keeps_features else NO_REFERENCE,
            tuple(ids.unbind(0)),
            self.cache.read(f"{target.key}.sizes"),
            place,
            ready=True,
            text=self.cache.text(target.caption),
        )


def cached_nothing(cache: Cache, tokens: tuple[Tensor, ...]) -> Nothing:
    """The same from a cache; ``tokens`` are those of an empty caption. Raises CorruptFileError."""
    text = tuple(one[None] for one in cache.text(""))
    if cache.keeps_text and not text:
        raise CorruptFileError(f"{cache.folder} lacks the empty caption; delete this cache, it is made again")
    return Nothing(cache.read(NEUTRAL), tokens, text)


class LiveItems:
    """Samples opened when they are needed. One that cannot be opened any more is named and its neighbour taken."""

    def __init__(
        self, collection: Collection, source: Source, config: DataConfig, pixels: PixelSpec | None, tokenize: Tokenize
    ) -> None:
        self.collection, self.source, self.config = collection, source, config
        self.pixels, self.tokenize = pixels, tokenize
        self._sizes = bucket_sizes(config)
        self._neighbour: dict[int, int] = {}
        for bucket in collection.buckets.values():
            self._neighbour.update(zip(bucket, [*bucket[1:], bucket[0]], strict=True))

    def __getitem__(self, index: SampleIndex) -> Item:
        skipped: list[str] = []
        target, reference = index.target, index.reference
        for _ in range(len(self._neighbour)):
            try:
                samples = self.collection.samples
                item = self._item(samples[target], samples[reference], index.variant, index.place)
                item.skipped = "; ".join(skipped)
                return item
            except (OSError, AdapterError) as error:
                skipped.append(str(error))
                # the reference may be the broken one: the neighbour is its own reference
                target = reference = self._neighbour[target]
        raise CorruptFileError(f"no picture can be read any more; the last error: {skipped[-1]}")

    def validation(self, sample: Sample) -> Item:
        return self._item(sample, sample, 0, (0, 0))

    def _item(self, target: Sample, reference: Sample, variant: int, place: tuple[int, int]) -> Item:
        image = decode_picture(self.source.read(target.name), target.name)
        seen = NO_REFERENCE
        if self.pixels is not None:
            own = bool(target.reference)
            name, key = (target.reference, target.reference_key) if own else (reference.name, reference.key)
            picture = image if name == target.name else decode_picture(self.source.read(name), name)
            seen = reference_pixels(picture, self.pixels, self.config.augment, f"{key} {variant}")
        pixels, cut = cut_target(image, bucket_for(target.size, self._sizes))
        return Item(
            pixels,
            seen,
            tuple(ids[0] for ids in self.tokenize([target.caption])),
            torch.tensor(cut.time_ids(), dtype=torch.float32),
            place,
            ready=False,
        )


def _reference_key(target: Sample, reference: Sample) -> str:
    return target.reference_key or reference.key


def assemble(items: Sequence[Item], encoders: TargetEncoders | None) -> Batch:
    """Stack items into a batch, through the encoders where they are still pixels."""
    targets = [item.target for item in items]
    references = torch.stack([item.reference for item in items])
    tokens = tuple(torch.stack(ids) for ids in zip(*(item.tokens for item in items), strict=True))
    text = tuple(torch.stack(one) for one in zip(*(item.text for item in items), strict=True))
    if not items[0].ready:
        assert encoders is not None
        targets, references, text = encoders.latents(targets), encoders.features(references), encoders.text(tokens)
    sizes, places = torch.stack([item.sizes for item in items]), [item.place for item in items]
    return Batch(torch.stack(targets), references, tokens, sizes, places, text)


def loader(items: Items, indices: Iterator[list[SampleIndex]], workers: int) -> Iterator[list[Item]]:
    """Batches of items in the order of the indices, prepared by ``workers`` processes ahead of time."""
    from torch.utils.data import DataLoader

    made: Any = DataLoader(
        cast(Any, items), batch_sampler=indices, num_workers=workers, collate_fn=_as_list,
        worker_init_fn=leave_signals_to_parent,
    )  # fmt: skip
    return iter(made)


def _as_list(items: list[Item]) -> list[Item]:
    return items
