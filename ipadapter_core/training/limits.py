"""What a graph may ask of a training: which settings, and how much of disk, memory and time each may take.

The command line is the owner's and knows neither list nor limit.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import math

from ..errors import InvalidInputError
from ..files.text import check_length
from .config import RunConfig, parse_overrides

SETTINGS = 20_000
"""Characters of a node's settings."""

FROM_GRAPHS: dict[str, frozenset[str]] = {
    section: frozenset(keys.split())
    for section, keys in {
        "model": "prediction",
        "adapter": "num_tokens init depth hidden_dim",
        "lora": "rank alpha rslora algorithm targets text_encoders text_learning_rate dropout factor dora_axis",
        "data": "caption_key caption_encoding resolution buckets bucket_step min_side pairs augment variants cache_dtype latents encode_batch",
        "loss": "drop_image drop_text drop_both min_snr noise_offset timesteps logit_mean logit_std shift base_shift max_shift",
        "train": "steps batch accumulate precision optimizer lr weight_decay beta2 schedule warmup clip ema checkpointing seed "
        "bad_steps device ignore_memory",
        "watch": "log_every validate_every validation timesteps sample_every sample_prompts sample_count sample_steps guidance "
        "tensorboard plot",
        "output": "save_every keep state_every keep_states dtype nested key_format trigger",
    }.items()
}
"""Settings that say how a run learns. Names of files and folders, kinds of sources and numbers of processes are not among
them."""

AT_MOST: dict[str, float] = {
    "adapter.num_tokens": 1024, "adapter.depth": 32, "adapter.hidden_dim": 8192, "lora.rank": 1024, "lora.alpha": 65536,
    "lora.factor": 1024, "data.resolution": 2048, "data.bucket_step": 1024, "data.min_side": 16384, "data.variants": 16,
    "data.encode_batch": 64, "data.workers": 0, "loss.min_snr": 1000, "train.steps": 1_000_000, "train.batch": 256,
    "train.accumulate": 1024, "train.lr": 100, "train.warmup": 1_000_000, "train.clip": 1e6, "train.bad_steps": 1000,
    "train.seed": 2**63 - 1, "watch.log_every": 1_000_000, "watch.validate_every": 1_000_000, "watch.validation": 1024,
    "watch.sample_every": 1_000_000, "watch.sample_count": 32, "watch.sample_steps": 200, "watch.guidance": 100,
    "output.save_every": 1_000_000, "output.keep": 20, "output.state_every": 1_000_000, "output.keep_states": 3,
}  # fmt: skip
"""The largest numbers. What a run needs of the memory is besides predicted before it starts."""

MOST_ENTRIES = {"watch.timesteps": 64, "watch.sample_prompts": 16}
MOST_CHARACTERS = 10_000
"""Of a text; a selector's and a trigger's."""


def graph_settings(text: str, config: RunConfig) -> RunConfig:
    """Put a node's settings, one ``section.key=value`` per line, over a config and check it.

    Raises InvalidInputError for what graphs may not set, and as ``check_limits`` does.
    """
    check_length(text, "settings", SETTINGS)
    changes = [line.strip() for line in text.splitlines() if line.strip()]
    config = parse_overrides(changes, config, FROM_GRAPHS)
    check_limits(config)
    return config


def check_limits(config: RunConfig) -> None:
    """Raise InvalidInputError where a graph's run asks for more than a graph may."""
    for section, entries in config.as_dict().items():
        for key, value in entries.items():
            _check(f"{section}.{key}", value)


def _check(name: str, value: object) -> None:
    if isinstance(value, (tuple, list)):
        if len(value) > MOST_ENTRIES.get(name, 1000):
            raise InvalidInputError(f"{name} has {len(value)} entries; a graph may give {MOST_ENTRIES.get(name, 1000)}")
        for item in value:
            _check(name, item)
    elif isinstance(value, str):
        check_length(value, name, MOST_CHARACTERS)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInputError(f"{name} is {value}; a finite number was expected")
        if value > AT_MOST.get(name, math.inf):
            raise InvalidInputError(
                f"{name} is {str(value)[:40]}; from a graph it may be {AT_MOST[name]:,} at most (the command ipadapter train has no limit)"
            )
        if abs(value) > 2**63:
            raise InvalidInputError(f"{name} is far below anything of use")
