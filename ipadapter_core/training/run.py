"""What the command runs: a whole training, its cache alone, or a look at what it would be."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch

from ..errors import InvalidInputError
from .accelerator import build_accelerator
from .adapter import trainable
from .collection import Collection
from .config import RunConfig
from .frozen import load_base
from .log import Log
from .loop import Outcome, fit
from .optimizers import build_optimizer
from .prepare import check_sides, fill_cache, prepare, trainee_of
from .samples import digests
from .shard import from_launcher
from .sources import open_source
from .state import ResultFiles, RunFolder
from .stopping import interruptible


def train(config: RunConfig, *, as_json: bool = False) -> Outcome:
    """Run a training to its end, or go on with it. Returns where the result lies."""
    config = from_launcher(config)
    folder = RunFolder(config.output)
    accelerator = build_accelerator(config, find_unused=trainee_of(config).skips_parameters(config))
    main = accelerator.is_main_process
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
            tensorboard=config.watch.tensorboard,
            plots=config.watch.plot,
        ) as log:
            run = prepare(config, log, accelerator)
            files = ResultFiles(folder, run.trainee, run.metadata, averaged=config.train.ema > 0)
            pictures = None if run.samples is None else digests(run.samples)
            return fit(config, accelerator, run.step, run.stream, folder, log, run.validator, files, pictures)


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
        check_sides(config, base)
        source = open_source(config.data)
        collection, cache = fill_cache(trainee_of(config).build(config, base), source, log, accelerator)
        size = sum(path.stat().st_size for path in cache.folder.glob("*"))
        log.say(f"{collection.findings.describe()}\n{cache.folder}: {size / 1e6:.1f} MB")
    return collection


class _Notes(Log):
    """A log that keeps what is said, and writes nothing."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(RunFolder(config.output).path, steps=0, active=False, tensorboard=False)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def dry_run(config: RunConfig, *, steps: int = 3) -> str:
    """Everything but the training: lint, trained parameters, memory, and the speed of a few steps. Writes nothing."""
    log, accelerator = _Notes(config), build_accelerator(config)
    run = prepare(config, log, accelerator, use_cache=False)
    log.lines += [f"  {name} {count:,}" for name, count in trainable(run.trainee.learned).items()]
    optimizer = build_optimizer(config.train, run.step.groups(config.train.lr))
    device = accelerator.device
    times: list[float] = []
    last = time.perf_counter()
    for batch, draws in run.stream.batches(0, steps):
        with accelerator.autocast():
            loss = run.step(batch.to(device), draws.to(device))
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
    log.say(f"speed without a cache: {each:.3f} s per sample; {config.train.steps} steps would take {hours:.1f} hours")
    return "\n".join(log.lines)
