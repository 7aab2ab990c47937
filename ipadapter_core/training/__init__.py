"""Training IP-Adapters: `ipadapter train CONFIG.toml`, or `train(load_config("config.toml"))`."""

from .adapter import TrainedAdapter, describe_trainable, trainable
from .config import RunConfig, load_config, parse_config, write_config
from .loop import Outcome, TrainingFailed
from .run import build_cache, dry_run, train

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
