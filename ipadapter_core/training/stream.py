"""Training straight from shards that are read from start to end: no cache, no list of pictures, no look at all of them first.

Every process reads its own shards (or, with fewer shards than processes, its own share of every shard), shuffled, without
end: however uneven the shards, all processes take the same number of steps. Step m takes the records m·batch to
(m+1)·batch of its process, readable or not, so that a resumed run comes to the same pictures by counting.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import CorruptFileError, InvalidInputError
from ..images.files import decode_picture, shown
from .batches import Batch, Item, Tokenize, assemble
from .collection import Collection, Findings, Sample, group
from .config import RunConfig
from .encode import TargetEncoders
from .log import Log
from .objectives import Objective
from .order import NoiseDraws, draw, seeded
from .pictures import cut_target, digest, reference_pixels
from .sources import Record, StreamSource, expand_urls


class Stream:
    """Records of remote shards for one process of ``world``; also the source and the items of its validation pictures."""

    random_access = False

    def __init__(self, config: RunConfig, encoders: TargetEncoders, tokenize: Tokenize, rank: int, world: int) -> None:
        data = config.data
        if encoders.pixels is None:
            raise InvalidInputError(f"{data.path} is a stream, read once from start to end: set data.cache")
        if data.buckets or data.pairs:
            name = "buckets" if data.buckets else "pairs"
            raise InvalidInputError(
                f"data.{name} needs to know all pictures before the start, and {data.path} is streamed; set data.cache, or "
                f"switch data.{name} off"
            )
        self.config, self.encoders, self.tokenize, self.rank, self.world = config, encoders, tokenize, rank, world
        self.shards = expand_urls(data.path)
        self._held_out: dict[str, tuple[Record, Sample]] = {}
        for record in StreamSource(self.shards, data.caption_key, data.caption_encoding):
            if len(self._held_out) == config.watch.validation:
                break
            try:
                self._held_out[record.name] = (record, self._sample(record))
            except CorruptFileError:
                continue  # named when training comes to it

    @property
    def held_out(self) -> Collection:
        """The stream's first readable pictures: they are validated on, and never trained on."""
        samples = [sample for _, sample in self._held_out.values()]
        return group(samples, Findings(usable=len(samples)), self.config.data)

    def read(self, name: str) -> bytes:
        """The bytes of a validation picture."""
        content = self._held_out[name][0].content
        assert content is not None
        return content

    def validation(self, sample: Sample) -> Item:
        return self.item(self._held_out[sample.name][0], (0, 0), 0)

    def records(self) -> Iterator[Record]:
        """This process's records, shuffled, without end. Raises InvalidInputError if there is nothing to train on."""
        shuffle: Any = importlib.import_module("webdataset").filters.shuffle
        for epoch in itertools.count():
            order = torch.randperm(len(self.shards), generator=seeded(self.config.train.seed, "shards", epoch)).tolist()
            by_shard = len(self.shards) >= self.world
            mine = order[self.rank :: self.world] if by_shard else order
            read: Any = StreamSource(
                [self.shards[i] for i in mine], self.config.data.caption_key, self.config.data.caption_encoding
            )
            if not by_shard:
                read = itertools.islice(read, self.rank, None, self.world)
            read = (record for record in read if record.name not in self._held_out)
            rng = random.Random(f"{self.config.train.seed} {epoch} {self.rank}")
            found = False
            for record in shuffle(self.config.data.shuffle, rng=rng)(read):
                found = True
                yield record
            if not found:
                raise InvalidInputError(
                    f"process {self.rank} of {self.world} finds nothing to train on in {self.config.data.path} besides "
                    f"{len(self._held_out)} validation pictures; use more pictures, fewer processes or a lower watch.validation"
                )

    def item(self, record: Record, place: tuple[int, int], variant: int) -> Item:
        """One record prepared for the encoders; its picture is its own reference. Raises CorruptFileError."""
        config = self.config.data
        assert record.content is not None
        if record.problem:
            raise CorruptFileError(record.problem)
        image = decode_picture(record.content, record.name)
        if min(image.size) < config.min_side:
            raise CorruptFileError(
                f"{shown(record.name)} ({image.width}x{image.height}; data.min_side is {config.min_side}) is tiny"
            )
        spec = self.encoders.pixels
        assert spec is not None
        pixels, cut = cut_target(image, (config.resolution, config.resolution))
        seed = f"{digest(record.content)} {variant}"
        return Item(
            pixels,
            reference_pixels(image, spec, config.augment, seed),
            tuple(ids[0] for ids in self.tokenize([record.caption or ""])),
            torch.tensor(cut.time_ids(), dtype=torch.float32),
            place,
            ready=False,
        )

    def _sample(self, record: Record) -> Sample:
        assert record.content is not None
        if record.problem:
            raise CorruptFileError(record.problem)
        image = decode_picture(record.content, record.name)
        return Sample(record.name, digest(record.content), record.caption or "", (image.height, image.width))


class ShardBatches:
    """Batches of a stream. An unreadable picture is named, counted, and replaced by a readable one of its batch."""

    def __init__(self, stream: Stream, objective: Objective, log: Log) -> None:
        self.stream, self.objective, self.log = stream, objective, log
        self.skipped: set[str] = set()

    def batches(self, micro: int, end: int) -> Iterator[tuple[Batch, NoiseDraws]]:
        stream, config = self.stream, self.stream.config
        size, seed = config.train.batch, config.train.seed
        records = itertools.islice(stream.records(), micro * size, None)
        for step in range(micro, end):
            items: list[Item | None] = []
            for number, record in enumerate(itertools.islice(records, size)):
                place = (step, stream.rank * size + number)
                chance = torch.rand((), generator=seeded(seed, "pick", *place))
                try:
                    items.append(stream.item(record, place, int(chance * config.data.variants)))
                except CorruptFileError as error:
                    items.append(None)
                    self._name(str(error))
            readable = [item for item in items if item is not None]
            if not readable:
                raise CorruptFileError(
                    f"none of the {size} pictures of step {step} can be read; the last: {self._last}"
                )
            batch = assemble([item or readable[i % len(readable)] for i, item in enumerate(items)], stream.encoders)
            # a stand-in gets draws of its own
            batch.places = [(step, stream.rank * size + i) for i in range(size)]
            yield batch, draw(seed, batch.places, batch.latents.shape[2:], self.objective, config.loss)

    _last = ""

    def _name(self, problem: str) -> None:
        self._last = problem
        if problem not in self.skipped:
            self.skipped.add(problem)
            self.log.say(f"skipped: {problem} ({len(self.skipped)} so far)")
