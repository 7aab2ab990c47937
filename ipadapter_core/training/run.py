"""From a config to a running training: models, pictures, cache, adapter, loop."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints import load_adapter
from ..errors import InvalidInputError
from .adapter import TrainedAdapter, check_family, continued_adapter, describe_trainable, fresh_adapter, trainable
from .batches import Items, assemble
from .cache import NEUTRAL
from .collection import Collection, Sample, hold_out
from .config import RunConfig
from .encode import Encoders, cache_settings, check_widths
from .frozen import FrozenBase, checkpoint_blocks, encoder_sizes, image_size, load_base, load_encoder, model_home
from .log import Log
from .loop import Feed, Outcome, fit
from .memory import predict
from .objectives import objective_for
from .optimizers import build_optimizer
from .order import Order
from .prepare import DTYPES, PictureFeed, Prepared, cached, check_sides, items_of, survey
from .rendezvous import init_method
from .samples import digests
from .shard import from_launcher, shard
from .sources import Source, open_source
from .state import AdapterFiles, RunFolder
from .step import AdapterStep
from .stopping import interruptible
from .stream import Stream, StreamFeed
from .watch import Sheets, Validation, reference_tiles

PATIENCE = timedelta(hours=2)
"""How long processes wait for one another: one may have much more to encode, or draw a sheet. torch's 10 minutes of NCCL are too few."""


def build_accelerator(config: RunConfig) -> Any:
    """accelerate's Accelerator for this run; also inside accelerate launch and torchrun."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

    _quiet_libraries()
    state: Any = AcceleratorState
    if state._shared_state:  # a run before this one in the same process may have computed in another precision
        state._reset_state(reset_partial_state=False)
    method = init_method()
    parallel = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        # SDXL reads the last layer but one of its text encoders: a LoRA on the last one of the first gets no gradient
        find_unused_parameters=config.lora.text_encoders,
    )
    meeting: dict[str, Any] = {"timeout": PATIENCE} | ({} if method is None else {"init_method": method})
    return Accelerator(
        mixed_precision={"fp32": "no"}.get(config.train.precision, config.train.precision),
        # by the plugin: the plain argument gives way to ACCELERATE_GRADIENT_ACCUMULATION_STEPS of the launcher
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.train.accumulate),
        cpu=config.train.device == "cpu",
        kwargs_handlers=[parallel, InitProcessGroupKwargs(**meeting)],
    )


@dataclass
class Looking:
    """Validation and sheets of a run over pictures."""

    validation: Validation | None
    sheets: Sheets | None
    base: FrozenBase
    objective: Any
    device: torch.device
    dtype: torch.dtype

    def validate(self, module: AdapterStep) -> dict[str, float] | None:
        if self.validation is None or not self.validation.count:
            return None
        return self.validation.measure(module, self.objective, self.device)

    def sheet(self, module: AdapterStep, state: dict[str, Tensor]) -> Image.Image | None:
        if self.sheets is None:
            return None
        weights = module.adapter.weights(self.dtype, state)
        return self.sheets.draw(weights, lambda: module.adapter.install(self.base.unet))


def prepare(config: RunConfig, log: Log, *, accelerator: Any = None, use_cache: bool = True) -> Prepared:
    """Load, lint, cache and check everything; nothing is trained yet."""
    accelerator = accelerator or build_accelerator(config)
    if config.lora.wanted:
        from .lora_run import prepare_lora

        return prepare_lora(config, log, accelerator, use_cache=use_cache)
    device: torch.device = accelerator.device
    rank, world = accelerator.process_index, accelerator.num_processes
    source = open_source(config.data)
    stream: Stream | None = None
    base = load_base(config.model.base, config.model.config)
    factor = base.latent_factor
    check_sides(config, base, factor)
    objective = objective_for(base.scheduler, config.model.prediction, config.loss)
    torch.manual_seed(config.train.seed)
    adapter = build_adapter(config, base)
    spec = adapter.spec()
    log.say(describe_trainable(adapter))

    def load_encoders() -> Encoders:
        encoder = load_encoder(home_of(config), config.model.image_encoder)
        return Encoders(base, encoder, spec, config.data, device)

    if config.data.cache and use_cache:
        settings = cache_settings(config.model, config.data, base, spec)
        collection, cache = cached(config, settings, base, source, load_encoders, log, accelerator)
        encoders, base.vae = None, None
        neutral = cache.read(NEUTRAL)
        check_widths(spec, neutral)
    else:
        cache = None
        encoders = load_encoders()
        neutral = encoders.neutral()
        if source.random_access:
            collection = survey(config, source)
        else:
            stream = Stream(config, encoders, base.tokenize, rank, world)
            collection = stream.held_out
    if stream is None:
        log.say(collection.findings.describe())
        training, chosen, unseen = hold_out(collection, config.watch.validation, config.data)
        if chosen and not unseen:
            log.say(
                f"validation on pictures that are trained on too ({len(chosen)}): there are too few different ones to hold any out"
            )
    else:
        training, chosen = collection, collection.samples
        log.say(f"streaming {len(stream.shards)} shards, unseen; {len(chosen)} pictures are held out for validation")
    if not config.train.ignore_memory:
        memory = predict(config, base, adapter, device, factor, world if config.train.shard else 1)
        log.say(memory.describe())
        memory.check(config)
    items = stream or items_of(training, cache, source, config, encoders, base)
    dtype = DTYPES[config.train.precision]
    adapter.to(device)
    if config.train.shard:
        adapter.install(base.unet)
        shard(base, adapter, device, dtype)
        if base.vae is not None:
            base.vae.to(device)
    else:
        base.to(device, dtype)
        adapter.install(base.unet)
    if config.train.checkpointing:
        checkpoint_blocks(base.unet)
    empty = base.tokenize([""])
    module = AdapterStep(adapter, base, objective, neutral, empty).to(device)
    if isinstance(items, Stream):
        feed: Feed = StreamFeed(items, objective, log)
    else:
        order = Order(training, config.train.batch * world, config.train.seed, config.data)
        feed = PictureFeed(config, order, items, encoders, objective, log, rank, world)
    looking = _looking(config, base, items, chosen, encoders, stream or source, neutral, objective, device, dtype)
    count = "a stream" if stream is not None else str(len(training.samples))
    metadata = _metadata(config, base, objective.prediction, count)
    return Prepared(config, accelerator, base, module, feed, looking, collection, metadata)


def train(config: RunConfig, *, as_json: bool = False) -> Outcome:
    """Run a training to its end, or go on with it. Returns where the adapter lies."""
    config = from_launcher(config)
    folder = RunFolder(config.output)
    accelerator = build_accelerator(config)
    main: bool = accelerator.is_main_process
    seen = config.watch
    kept = "what is saved and cached is kept, and the same command goes on from there"
    with interruptible(kept), folder.alone() if main else nullcontext():
        if main:
            folder.prepare()
            folder.stop_file.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        with Log(
            folder.path,
            steps=config.train.steps,
            active=main,
            as_json=as_json,
            tensorboard=seen.tensorboard,
            plots=seen.plot,
        ) as log:
            run = prepare(config, log, accelerator=accelerator)
            files = AdapterFiles(folder, run.module.adapter, run.metadata, averaged=config.train.ema > 0)
            seen_before = None if isinstance(run.feed, StreamFeed) else digests(run.collection.samples)
            return fit(config, accelerator, run.module, run.feed, folder, log, run.looking, files, seen_before)


def build_cache(config: RunConfig, *, as_json: bool = False) -> Collection:
    """Only encode what a training would; also what several machines do before they train."""
    if not config.data.cache:
        raise InvalidInputError("data.cache is empty; give the folder that the cache should go to")
    config = from_launcher(config)
    accelerator = build_accelerator(config)
    root = RunFolder(config.output).path
    kept = "the finished shards of the cache are kept, and the same command goes on after them"
    with (
        interruptible(kept),
        Log(root, steps=0, active=accelerator.is_main_process, as_json=as_json, tensorboard=False) as log,
    ):
        base = load_base(config.model.base, config.model.config)
        check_sides(config, base, base.latent_factor)
        source = open_source(config.data)
        if config.lora.wanted:
            from .lora_run import fill_cache

            collection, cache = fill_cache(config, base, source, log, accelerator)
        else:
            spec = build_adapter(config, base).spec()

            def load_encoders() -> Encoders:
                encoder = load_encoder(home_of(config), config.model.image_encoder)
                return Encoders(base, encoder, spec, config.data, accelerator.device)

            settings = cache_settings(config.model, config.data, base, spec)
            collection, cache = cached(config, settings, base, source, load_encoders, log, accelerator)
        size = sum(path.stat().st_size for path in cache.folder.glob("*"))
        log.say(f"{collection.findings.describe()}\n{cache.folder}: {size / 1e6:.1f} MB")
    return collection


def dry_run(config: RunConfig, *, steps: int = 3) -> str:
    """Everything but the training: lint, trained parameters, memory, and the speed of a few steps. Writes nothing."""
    lines: list[str] = []

    class Notes(Log):
        def say(self, text: str) -> None:
            lines.append(text)

    folder = RunFolder(config.output)
    log = Notes(folder.path, steps=0, active=False, tensorboard=False)
    run = prepare(config, log, use_cache=False)
    adapter = run.module.adapter
    lines += [f"  {name} {count:,}" for name, count in trainable(adapter).items()]
    optimizer = build_optimizer(config.train, run.module.groups(config.train.lr))
    device: torch.device = run.accelerator.device
    times: list[float] = []
    last = time.perf_counter()
    for batch, draws in run.feed.batches(0, steps):
        with run.accelerator.autocast():
            loss = run.module(batch.to(device), draws.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - last)
        last = time.perf_counter()
    # the first step warms up
    each = sum(times[1:]) / len(times[1:]) / config.train.batch if len(times) > 1 else times[0] / config.train.batch
    hours = each * config.train.batch * config.train.accumulate * config.train.steps / 3600
    lines.append(
        f"speed without a cache: {each:.3f} s per sample; {config.train.steps} steps would take {hours:.1f} hours"
    )
    return "\n".join(lines)


def build_adapter(config: RunConfig, base: FrozenBase) -> TrainedAdapter:
    """The configured adapter, fresh or from a file."""
    sizes = encoder_sizes(home_of(config), config.model.image_encoder)
    if not config.adapter.start_from:
        return fresh_adapter(base.unet, sizes, config.adapter)
    weights = load_adapter(config.adapter.start_from, dtype=torch.float32)
    check_family(config.adapter, weights.spec)
    return continued_adapter(base.unet, weights, sizes)


def home_of(config: RunConfig) -> str:
    """The folder of the base model's configs, which may also hold an image encoder."""
    return model_home(config.model.base, config.model.config)


def _looking(
    config: RunConfig,
    base: FrozenBase,
    items: Items | Stream,
    chosen: Sequence[Sample],
    encoders: Encoders | None,
    source: Source | Stream,
    neutral: Tensor,
    objective: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> Looking:
    validation = sheets = None
    if chosen:
        prepared = [items.validation(sample) for sample in chosen]
        if config.watch.validate_every:
            validation = Validation(prepared, encoders, config.watch, config.train.batch)
        if config.watch.sample_every:
            shown = list(chosen[: config.watch.sample_count])
            batch = [assemble([item], encoders).features for item in prepared[: len(shown)]]
            side = config.data.resolution
            tiles = reference_tiles(source, shown, side)
            sheets = Sheets(base, torch.cat(batch), neutral, tiles, config.watch, side, objective)
    return Looking(validation, sheets, base, objective, device, dtype)


def _metadata(config: RunConfig, base: FrozenBase, prediction: str, pictures: str) -> dict[str, str]:
    """What a finished file says of its making, besides what it is."""
    settings = config.as_dict()
    settings.pop("output")
    settings.pop("watch")
    return {
        "trained_by": "ipadapter train",
        "prediction": prediction,
        "base_files": str(base.folder),
        "encoder_tokens": str(encoder_sizes(home_of(config), config.model.image_encoder).tokens),
        "encoder_size": str(image_size(home_of(config), config.model.image_encoder)),
        "pictures": pictures,
        "settings": json.dumps(settings),
    }


def _quiet_libraries() -> None:
    """Their progress bars of loading weights would tear ours apart."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
