"""Frozen models that one device cannot hold, split over the processes of a run by torch's FSDP.

Only what never learns is split: the adapter stays whole on every process, wrapped by DDP as ever, so that checkpoints,
states and the averaged weights are the same with and without.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Any

import torch
from torch import nn

from ..errors import InvalidInputError
from .config import RunConfig
from .frozen import FrozenBase

TEXT_UNITS = ("CLIPEncoderLayer",)
"""What is gathered, used and let go as one in text encoders; a base model says what it is in it."""


def from_launcher(config: RunConfig) -> RunConfig:
    """The config, with ``train.shard`` if ``accelerate launch`` was told to use FSDP.

    accelerate's own wrapping would split the adapter and leave the frozen models whole on every device, so its
    switch is read and taken back. Raises InvalidInputError for DeepSpeed.
    """
    if _told("ACCELERATE_USE_DEEPSPEED"):
        raise InvalidInputError(
            "DeepSpeed would split gradients and optimiser state of the adapter (tens to hundreds of MB) and leave the frozen "
            "models whole on every GPU; set train.shard = true, which splits those, and launch with --multi_gpu"
        )
    if not _told("ACCELERATE_USE_FSDP"):
        return config
    os.environ.pop("ACCELERATE_USE_FSDP")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, shard=True))


def shard(base: FrozenBase, adapter: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Cast UNet and text encoders and split their weights over all processes, block by block.

    ``adapter`` may be installed in the UNet; it is left as it is. From now on every forward pass is one of all processes.
    Raises InvalidInputError where there is one process only, or torch is too old.
    """
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        raise InvalidInputError(
            "train.shard splits the frozen models over several processes and there is one; start it with "
            "accelerate launch --multi_gpu --num_processes N, or set train.shard = false"
        )
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise InvalidInputError(f"train.shard needs torch 2.7 or newer, this is {torch.__version__}") from error
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise InvalidInputError(f"train.shard needs torch 2.7 or newer, this is {torch.__version__}")
    split: Any = fully_shard
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    kept, units = set(adapter.parameters()), (*base.training.units, *TEXT_UNITS)
    for model in (base.unet, *base.text_encoders):
        model.to(dtype)  # still on the CPU: a block goes to the device when it is split
        for part in model.modules():
            if type(part).__name__ in units:
                split(part, mesh=mesh, ignored_params=kept)
        split(model, mesh=mesh, ignored_params=kept)


def _told(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")
