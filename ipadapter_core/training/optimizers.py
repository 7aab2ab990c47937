"""Optimisers by name, learning-rate schedules, and averaged weights: all of them other people's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from .config import TrainConfig

STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "adafactor": 0}
"""Bytes of optimiser state per parameter; Adafactor keeps rows and columns only."""


def build_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of that name. Raises InvalidInputError with the package to install if it is not there."""
    values: Any = list(parameters)
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(values, lr=lr, weight_decay=decay)
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        made: Any = Adafactor(values, lr=lr, weight_decay=decay, scale_parameter=False, relative_step=False)
        return cast(torch.optim.Optimizer, made)
    package, name = {"adamw8bit": ("bitsandbytes", "AdamW8bit"), "prodigy": ("prodigyopt", "Prodigy")}[config.optimizer]
    try:
        module: Any = __import__(f"{package}.optim" if package == "bitsandbytes" else package, fromlist=[name])
    except ImportError as error:
        raise InvalidInputError(
            f"train.optimizer {config.optimizer} needs the package {package} ({error}); run: pip install {package}"
        ) from error
    return cast(torch.optim.Optimizer, getattr(module, name)(values, lr=lr, weight_decay=decay))


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """diffusers' schedule of that name; warm-up and length count optimiser steps."""
    from diffusers.optimization import get_scheduler

    made: Any = get_scheduler(
        config.schedule, optimizer, num_warmup_steps=min(config.warmup, config.steps), num_training_steps=config.steps
    )
    return cast(torch.optim.lr_scheduler.LRScheduler, made)


def build_average(config: TrainConfig, module: nn.Module) -> torch.optim.swa_utils.AveragedModel | None:
    """Exponentially averaged weights; None when `train.ema` is 0.

    The decay rises from 0.1 to its value over the first steps: a short run would never forget its first weights.
    """
    if config.ema == 0:
        return None

    def average(averaged: Any, current: Any, count: Tensor | int) -> None:
        n = int(count)
        decay = min(config.ema, (1 + n) / (10 + n))
        torch._foreach_lerp_(averaged, current, 1 - decay)  # pyright: ignore[reportPrivateUsage]

    return torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=cast(Any, average), use_buffers=False)
