"""Training IP-Adapters: ``ipadapter train CONFIG.toml``, or ``train(load_config("config.toml"))``.

Names are imported when they are asked for: the trainable attention processors here are part of the core's own names, and
importing the core must not load the trainer and what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import TrainedAdapter, describe_trainable, trainable
    from .config import RunConfig, load_config, parse_config, write_config
    from .loop import Outcome, TrainingFailed
    from .run import build_cache, dry_run, train

_PLACES = {
    "TrainedAdapter": "adapter",
    "describe_trainable": "adapter",
    "trainable": "adapter",
    "RunConfig": "config",
    "load_config": "config",
    "parse_config": "config",
    "write_config": "config",
    "Outcome": "loop",
    "TrainingFailed": "loop",
    "build_cache": "run",
    "dry_run": "run",
    "train": "run",
}

__all__ = [
    "Outcome",
    "RunConfig",
    "TrainedAdapter",
    "TrainingFailed",
    "build_cache",
    "describe_trainable",
    "dry_run",
    "load_config",
    "parse_config",
    "train",
    "trainable",
    "write_config",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
