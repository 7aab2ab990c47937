"""From a config to a run that is ready to start: models, pictures, cache, what learns, and its step."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ..errors import InvalidInputError
from .accelerator import Accelerator
from .adapter_trainee import AdapterTrainee
from .batches import Batch, CachedItems, Items, LiveItems, Nothing, assemble, cached_nothing, loader
from .cache import Cache, fill
from .collection import Collection, Sample, ScannedSample, collect, hold_out, look
from .config import RunConfig
from .encode import TargetEncoders
from .frozen import FrozenBase, checkpoint_blocks, load_base
from .locks import locked
from .log import Log
from .loop import BatchStream
from .lora_trainee import LoRATrainee
from .memory import predict
from .objectives import Objective, objective_for
from .order import NoiseDraws, Order, draw
from .shard import shard
from .sources import Source, open_source
from .step import DenoisingStep
from .stream import ShardBatches, Stream
from .trainee import Shown, Trainee
from .watch import Readable, Validator, reference_tiles

TRAINEES: tuple[type[Trainee], ...] = (AdapterTrainee, LoRATrainee)
"""Everything that can learn, in any order: a config means one of them, or none and gets a new image adapter."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Prepared:
    """A run, ready to start. ``samples`` are those trained on, None for a stream."""

    trainee: Trainee
    step: DenoisingStep
    stream: BatchStream
    validator: Validator
    samples: Sequence[Sample] | None
    metadata: dict[str, str]


@dataclass
class Pictures:
    """The pictures of a run, looked at and, with a cache, encoded. ``samples`` are those trained on, None for a stream."""

    source: Readable
    items: Items | Stream
    training: Collection
    held_out: Sequence[Sample]
    encoders: TargetEncoders | None
    nothing: Nothing

    @property
    def samples(self) -> Sequence[Sample] | None:
        return None if isinstance(self.items, Stream) else self.training.samples


def prepare(config: RunConfig, log: Log, accelerator: Accelerator, *, use_cache: bool = True) -> Prepared:
    """Load, lint, cache and check everything; nothing is trained yet."""
    device, dtype = accelerator.device, DTYPES[config.train.precision]
    source = open_source(config.data)
    base = load_base(config.model.base, config.model.config)
    factor = base.latent_factor
    check_sides(config, base)
    objective = objective_for(base.scheduler, config.model.prediction, config.loss)
    torch.manual_seed(config.train.seed)
    trainee = trainee_of(config).build(config, base)
    log.say(trainee.describe())
    pictures = gather(trainee, source, log, accelerator, cached=use_cache and bool(config.data.cache))
    if not config.train.ignore_memory:
        memory = predict(trainee, factor, device, accelerator.num_processes if config.train.shard else 1)
        log.say(memory.describe())
        memory.check(config)
    put_on(trainee, device, dtype)
    step = trainee.step(objective, pictures.nothing.to(device)).to(device)
    stream = batches_of(trainee, pictures, objective, log, accelerator)
    validator = validator_of(trainee, pictures)
    return Prepared(trainee, step, stream, validator, pictures.samples, trainee.metadata(objective, pictures.samples))


def trainee_of(config: RunConfig) -> type[Trainee]:
    """What a config means to train. Raises InvalidInputError where it means two things."""
    meant = [kind for kind in TRAINEES if kind.wanted(config)]
    if len(meant) > 1:
        names = " and ".join(kind.__name__ for kind in meant)
        raise InvalidInputError(
            f"a run trains one thing, and this config means {names}; leave out what asks for the others"
        )
    return meant[0] if meant else AdapterTrainee


def check_sides(config: RunConfig, base: FrozenBase) -> None:
    """Raise InvalidInputError for sizes of pictures whose latents the base model cannot take."""
    unit = base.latent_factor * base.training.side_multiple(base.unet)
    name, side = (
        ("bucket_step", config.data.bucket_step) if config.data.buckets else ("resolution", config.data.resolution)
    )
    if side % unit:
        raise InvalidInputError(f"data.{name} is {side}; for this model it must be a multiple of {unit}")


def put_on(trainee: Trainee, device: torch.device, dtype: torch.dtype) -> None:
    """Models to the compute device and dtype, what learns to the device in its own dtype, and the two together."""
    base, train = trainee.base, trainee.config.train
    trainee.learned.to(device)
    if train.shard:
        trainee.attach(trainee.learned, trainee.parts)
        shard(base, trainee.learned, device, dtype)
        if base.vae is not None:
            base.vae.to(device)
    else:
        base.to(device, dtype)
        trainee.attach(trainee.learned, trainee.parts)
    if train.checkpointing:
        checkpoint_blocks(base.unet)


# --- pictures ------------------------------------------------------------------------------------------------------------


def gather(trainee: Trainee, source: Source, log: Log, accelerator: Accelerator, *, cached: bool) -> Pictures:
    """Look at all pictures and hold some out. Encoders whose work a cache keeps leave memory."""
    config, base = trainee.config, trainee.base
    if cached:
        collection, cache = fill_cache(trainee, source, log, accelerator)
        base.vae = None
        if trainee.keeps_text:
            base.text_encoders = ()
        encoders, nothing = None, cached_nothing(cache, base.tokenize([""]))
    else:
        encoders, cache = trainee.encoders(accelerator.device), None
        tokens = base.tokenize([""])
        nothing = Nothing(encoders.neutral(), tokens, encoders.text(tokens))
        if not source.random_access:
            stream = Stream(config, encoders, base.tokenize, accelerator.process_index, accelerator.num_processes)
            held_out = stream.held_out
            log.say(
                f"streaming {len(stream.shards)} shards, unseen; {len(held_out.samples)} pictures are held out for validation"
            )
            return Pictures(stream, stream, held_out, held_out.samples, encoders, nothing)
        # pictures are let go as soon as they were looked at
        collection = collect(
            (one.let_go() for one in look(source, config.data)), config.data, config.data.path, source.notes
        )
    log.say(collection.findings.describe())
    training, chosen, unseen = hold_out(collection, config.watch.validation, config.data)
    if chosen and not unseen:
        log.say(
            f"validation on pictures that are trained on too ({len(chosen)}): there are too few different ones to hold any out"
        )
    if cache is not None:
        items: Items = CachedItems(training, cache)
    else:
        assert encoders is not None
        items = LiveItems(training, source, config.data, encoders.pixels, base.tokenize)
    return Pictures(source, items, training, chosen, encoders, nothing)


def fill_cache(trainee: Trainee, source: Source, log: Log, accelerator: Accelerator) -> tuple[Collection, Cache]:
    """Encode what the trainee's cache lacks, all processes together."""
    config = trainee.config
    cache = Cache(config.data.cache, trainee.cache_settings())
    loads: list[TargetEncoders] = []

    def load_once() -> TargetEncoders:
        loads.append(trainee.encoders(accelerator.device))
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
            trainee.base.vae = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        accelerator.wait_for_everyone()
    cache.refresh()
    return collect(_in_order(mine, accelerator), config.data, config.data.path, source.notes), cache


def _in_order(mine: Sequence[ScannedSample], accelerator: Accelerator) -> list[ScannedSample]:
    """What all processes saw, in the source's order: they took turns."""
    if accelerator.num_processes == 1:
        return list(mine)
    shares: list[list[ScannedSample]] = [[] for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather_object(shares, list(mine))
    longest = max(map(len, shares))
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


# --- batches -------------------------------------------------------------------------------------------------------------


def batches_of(
    trainee: Trainee, pictures: Pictures, objective: Objective, log: Log, accelerator: Accelerator
) -> BatchStream:
    config = trainee.config
    if isinstance(pictures.items, Stream):
        return ShardBatches(pictures.items, objective, log)
    rank, world = accelerator.process_index, accelerator.num_processes
    order = Order(pictures.training, config.train.batch * world, config.train.seed, config.data)
    return PictureBatches(config, order, pictures.items, pictures.encoders, objective, log, rank, world)


class PictureBatches:
    """Batches of a collection in its order, read ahead by worker processes and encoded here where no cache did it."""

    def __init__(
        self, config: RunConfig, order: Order, items: Items, encoders: TargetEncoders | None, objective: Objective, log: Log,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.config, self.order, self.items, self.encoders = config, order, items, encoders
        self.objective, self.log, self.rank, self.world = objective, log, rank, world
        self.skipped: set[str] = set()

    def batches(self, micro: int, end: int) -> Iterator[tuple[Batch, NoiseDraws]]:
        indices = self.order.from_step(micro, end, self.rank, self.world)
        for items in loader(self.items, indices, self.config.data.workers):
            for item in items:
                if item.skipped and item.skipped not in self.skipped:
                    self.skipped.add(item.skipped)
                    self.log.say(f"skipped: {item.skipped} ({len(self.skipped)} so far)")
            batch = assemble(items, self.encoders)
            shape = batch.latents.shape[2:]
            yield batch, draw(self.config.train.seed, batch.places, shape, self.objective, self.config.loss)


def validator_of(trainee: Trainee, pictures: Pictures) -> Validator:
    """Validation and sheets on the pictures held out, encoded once."""
    config, chosen = trainee.config, pictures.held_out
    items = [pictures.items.validation(sample) for sample in chosen]
    with torch.no_grad(), trainee.off():
        batches = [assemble([item], pictures.encoders) for item in items]
    shown = None
    if chosen and config.watch.sample_every:
        few = chosen[: config.watch.sample_count]
        tiles = reference_tiles(pictures.source, few, config.data.resolution)
        features = torch.cat([batch.features for batch in batches[: len(few)]])
        shown = Shown(tiles, [sample.caption for sample in few], features)
    return Validator(trainee, batches, shown)
