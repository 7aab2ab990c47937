"""From a config to a LoRA's training: as `run.prepare` does for adapters, without references and image encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from ..lora import Component
from .batches import assemble
from .cache import Cache, tokens_key
from .collection import Collection, hold_out
from .config import RunConfig
from .encode import TargetEncoders, target_settings
from .frozen import FrozenBase, checkpoint_blocks, load_base
from .log import Log
from .lora_adapter import Parts, build_lora, describe_lora
from .lora_memory import predict_lora
from .lora_metadata import describe_training
from .lora_step import LoRAStep
from .lora_watch import LoRALooking
from .objectives import objective_for
from .order import Order
from .prepare import DTYPES, PictureFeed, Prepared, cached, check_sides, items_of, survey
from .sources import Source, open_source
from .watch import reference_tiles


def prepare_lora(config: RunConfig, log: Log, accelerator: Any, *, use_cache: bool = True) -> Prepared:
    """Load, lint, cache and check everything; nothing is trained yet."""
    device: torch.device = accelerator.device
    rank, world = accelerator.process_index, accelerator.num_processes
    # a caption is dropped or not; images have no part in it
    config = replace(config, loss=replace(config.loss, drop_image=0.0, drop_both=0.0))
    source = open_source(config.data)
    base = load_base(config.model.base, config.model.config)
    factor = base.latent_factor
    check_sides(config, base, factor)
    objective = objective_for(base.scheduler, config.model.prediction, config.loss)
    torch.manual_seed(config.train.seed)
    parts = parts_of(config, base)
    lora = build_lora(parts, config.lora)
    if config.lora.text_learning_rate and not lora.parameters_of(text=True):
        raise InvalidInputError(
            "lora.text_learning_rate is given, and lora.targets chooses no layer of a text encoder; add one, such as "
            "'te attn: 1', or leave the rate out"
        )
    log.say(describe_lora(lora, config.train.lr, config.lora.text_learning_rate))
    keep_text = not config.lora.text_encoders
    if config.data.cache and use_cache:
        collection, cache = fill_cache(config, base, source, log, accelerator)
        encoders = None
        empty = tuple(one[None] for one in cache.text("")) if keep_text else base.tokenize([""])
    else:
        if not source.random_access:
            raise InvalidInputError(f"{config.data.path} is a stream, read once from start to end: set data.cache")
        collection, cache = survey(config, source), None
        encoders = TargetEncoders(base, config.data, device, keep_text=keep_text)
        empty = encoders.text(base.tokenize([""])) if keep_text else base.tokenize([""])
    log.say(collection.findings.describe())
    training, chosen, unseen = hold_out(collection, config.watch.validation, config.data)
    if chosen and not unseen:
        log.say(
            f"validation on pictures that are trained on too ({len(chosen)}): there are too few different ones to hold any out"
        )
    if cache is not None and keep_text:
        base.text_encoders = ()  # every caption is encoded
    if not config.train.ignore_memory:
        memory = predict_lora(config, base, lora, parts, device, factor)
        log.say(memory.describe())
        memory.check(config)
    items = items_of(training, cache, source, config, encoders, base)
    dtype = DTYPES[config.train.precision]
    base.to(device, dtype)
    lora.to(device)
    if config.train.checkpointing:
        checkpoint_blocks(base.unet)
    attached = lora.attach(parts)
    module = LoRAStep(
        lora, base, objective, to_device(empty, device), config.train.seed, config.lora.text_learning_rate
    )
    order = Order(training, config.train.batch * world, config.train.seed, config.data)
    feed = PictureFeed(config, order, items, encoders, objective, log, rank, world)
    prepared = [items.validation(sample) for sample in chosen]
    with attached.off():
        batches = [assemble([item], encoders) for item in prepared]
    shown = chosen[: config.watch.sample_count] if config.watch.sample_every else ()
    tiles = reference_tiles(source, shown, config.data.resolution)
    looking = LoRALooking(
        batches,
        [(tile, sample.caption) for tile, sample in zip(tiles, shown, strict=True)],
        base,
        attached,
        objective,
        config.watch,
        config.train.batch,
        config.data.resolution,
        device,
        dtype,
    )
    metadata = describe_training(config, base, objective, training.samples)
    return Prepared(config, accelerator, base, module, feed, looking, collection, metadata)


def fill_cache(
    config: RunConfig, base: FrozenBase, source: Source, log: Log, accelerator: Any
) -> tuple[Collection, Cache]:
    """Encode what the cache lacks: latents and, unless the text encoders learn, captions."""
    keep_text = not config.lora.text_encoders
    settings = target_settings(config.model, config.data, base, keep_text=keep_text)

    def load_encoders() -> TargetEncoders:
        return TargetEncoders(base, config.data, accelerator.device, keep_text=keep_text)

    collection, cache = cached(config, settings, base, source, load_encoders, log, accelerator)
    if tokens_key("") not in cache and keep_text:
        raise InvalidInputError(f"{cache.folder} lacks the empty caption; delete this cache, it is made again")
    base.vae = None
    return collection, cache


def parts_of(config: RunConfig, base: FrozenBase) -> Parts:
    """The frozen models that the LoRA may change."""
    found: dict[Component, nn.Module] = {"unet": base.unet}
    if config.lora.text_encoders:
        found |= dict(zip(("te1", "te2"), base.text_encoders, strict=False))
    return found


def to_device(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)
