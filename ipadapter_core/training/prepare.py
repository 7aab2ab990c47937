"""What trainings of every kind share before their first step: data looked at, cached and fed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InvalidInputError
from .batches import Batch, CachedItems, Items, LiveItems, assemble, loader
from .cache import Cache, fill
from .collection import Collection, Seen, collect, look
from .config import RunConfig
from .encode import TargetEncoders
from .frozen import FrozenBase
from .locks import locked
from .log import Log
from .loop import Feed
from .order import Draws, Order, draw
from .sources import Source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PictureFeed:
    """Batches of a collection in its order, read ahead by worker processes and encoded here where no cache did it."""

    def __init__(
        self, config: RunConfig, order: Order, items: Items, encoders: TargetEncoders | None, module_objective: Any, log: Log,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.config, self.order, self.items, self.encoders = config, order, items, encoders
        self.objective, self.log, self.rank, self.world = module_objective, log, rank, world
        self.skipped: set[str] = set()

    def batches(self, micro: int, end: int) -> Iterator[tuple[Batch, Draws]]:
        picks = self.order.from_step(micro, end, self.rank, self.world)
        for items in loader(self.items, picks, self.config.data.workers):
            for item in items:
                if item.skipped and item.skipped not in self.skipped:
                    self.skipped.add(item.skipped)
                    self.log.say(f"skipped: {item.skipped} ({len(self.skipped)} so far)")
            batch = assemble(items, self.encoders)
            shape = batch.latents.shape[2:]
            yield batch, draw(self.config.train.seed, batch.places, shape, self.objective, self.config.loss)


@dataclass
class Prepared:
    """A run, ready to start: `module` and `looking` are those of adapters or of LoRAs."""

    config: RunConfig
    accelerator: Any
    base: FrozenBase
    module: Any
    feed: Feed
    looking: Any
    collection: Collection
    metadata: dict[str, str]


def survey(config: RunConfig, source: Source) -> Collection:
    """The lint pass alone; pictures are let go as soon as they were looked at."""
    seen = (one.let_go() for one in look(source, config.data))
    return collect(seen, config.data, config.data.path, source.notes)


def cached(
    config: RunConfig,
    settings: dict[str, Any],
    base: FrozenBase,
    source: Source,
    load_encoders: Callable[[], TargetEncoders],
    log: Log,
    accelerator: Any,
) -> tuple[Collection, Cache]:
    """Encode what a cache of these settings lacks, all processes together; the VAE leaves memory afterwards."""
    cache = Cache(config.data.cache, settings)
    loads: list[TargetEncoders] = []

    def load_once() -> TargetEncoders:
        loads.append(load_encoders())
        return loads[0]

    started, shown = time.perf_counter(), time.perf_counter()

    def progress(done: int, name: str) -> None:
        nonlocal shown
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            log.say(f"cache: {done} pictures, {done / (shown - started):.1f} per second")

    def wait() -> None:
        log.say(f"another run fills {cache.folder}; this one waits and then takes what it needs from there")

    # two runs that fill one cache would write to the same shards
    with locked(cache.folder, wait) if accelerator.is_main_process else nullcontext():
        try:
            if accelerator.is_main_process:
                note = cache.prepare()
                if note:
                    log.say(note)
            accelerator.wait_for_everyone()
            cache.refresh()
            rank, world = accelerator.process_index, accelerator.num_processes
            mine = fill(cache, source, config.data, load_once, rank=rank, world=world, progress=progress)
        except OSError as error:
            raise InvalidInputError(
                f"the cache in {config.data.cache} cannot be written ({error}); what was finished is kept, the next run goes on"
            ) from error
        if loads:
            loads.clear()
            base.vae = None
            _let_go()
        accelerator.wait_for_everyone()
    cache.refresh()
    everything = _in_order(mine, accelerator)
    return collect(everything, config.data, config.data.path, source.notes), cache


def _in_order(mine: Sequence[Seen], accelerator: Any) -> list[Seen]:
    """What all processes saw, in the source's order: they took turns."""
    if accelerator.num_processes == 1:
        return list(mine)
    shares: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(shares, list(mine))
    longest = max(map(len, shares))
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


def items_of(
    collection: Collection,
    cache: Cache | None,
    source: Source,
    config: RunConfig,
    encoders: TargetEncoders | None,
    base: FrozenBase,
) -> Items:
    if cache is not None:
        return CachedItems(collection, cache)
    assert encoders is not None
    return LiveItems(collection, source, config.data, encoders.looks, base.tokenize)


def check_sides(config: RunConfig, base: FrozenBase, factor: int) -> None:
    """Latents must halve as often as the UNet halves them."""
    widths: list[int] = list(base.unet.config.block_out_channels)
    unit = factor * 2 ** (len(widths) - 1)
    name, side = (
        ("bucket_step", config.data.bucket_step) if config.data.buckets else ("resolution", config.data.resolution)
    )
    if side % unit:
        raise InvalidInputError(f"data.{name} is {side}; for this model it must be a multiple of {unit}")


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
