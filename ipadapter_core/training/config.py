"""A training run as values: read from TOML, changed from the command line, checked before anything is loaded."""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from ..checkpoints import trainable_families
from ..errors import InvalidInputError, quoted, reason
from ..files.text import NotUnicodeError, check_length, decode_text, read_bytes
from ..lora.algorithms import trainings
from ..lora.convert import KeyFormat
from ..lora.selector import parse_selector
from .objectives import LossConfig, predictions
from .processors import Init


@dataclass(frozen=True, slots=True)
class OneOf:
    """The choices of a setting that a table elsewhere has; asked for when they are needed."""

    names: Callable[[], tuple[str, ...]]


Prediction = Annotated[str, OneOf(lambda: ("auto", *predictions()))]
Family = Annotated[str, OneOf(trainable_families)]
Kind = Literal["auto", "folder", "json", "webdataset", "huggingface"]
Precision = Literal["fp32", "bf16", "fp16"]
OptimizerName = Literal["adamw", "adamw8bit", "prodigy", "adafactor", "muon"]
ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Dtype = Literal["float32", "float16", "bfloat16"]
Algorithm = Annotated[str, OneOf(lambda: tuple(trainings()))]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The frozen models. ``image_encoder`` is a folder or a tower's .safetensors; "" is the folder of that name inside ``base``."""

    base: str = ""
    """A diffusers folder, or one .safetensors file of SD1.5, SD2 or SDXL."""
    config: str = ""
    """Of a single file: a diffusers folder of its architecture, for configs and tokenizers (its weights are not read).
    Empty: the folder beside the file that is named as it is."""
    image_encoder: str = ""
    prediction: Prediction = "auto"
    """What the UNet predicts; auto: what the scheduler in the model folder says."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The adapter that is trained. With ``start_from`` its sizes are those of that file, and the family must be the file's."""

    family: Family = "base"
    start_from: str = ""
    num_tokens: int = 0
    """0: as the family's released files have it."""
    init: Init = "copy"
    depth: int = 4
    hidden_dim: int = 0
    """Width of a plus adapter's latents; 0: as released, 1280 for SDXL, else the width of the text tokens."""


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """A LoRA, which is trained instead of an adapter as soon as there is a ``rank`` or a file to start from.

    With ``start_from`` the file says layers, algorithms, ranks and alphas.
    """

    rank: int = 0
    alpha: float = 0.0
    """0: the rank, which makes the scale 1."""
    rslora: bool = False
    """Divide alpha by the root of the rank instead of the rank; files hold the alpha that plain readers need."""
    algorithm: Algorithm = "lora"
    """locon: lora with convolutions and feed-forward layers among its targets; dora: lora with learned magnitudes."""
    targets: str = ""
    """Which layers, in the selector's words, such as "all: 0, attn2: 1"; empty: attentions, for locon more."""
    text_encoders: bool = False
    """Whether the layers of the text encoders can be targets too; they then stay in memory."""
    text_learning_rate: float = 0.0
    """The learning rate of text encoders' layers, by train.schedule too; 0: train.lr."""
    dropout: float = 0.0
    """Share of a layer's inputs that the LoRA does not see in a step."""
    factor: int = 8
    """lokr: rows and columns of the small matrix, or the next smaller divisors of the layer's."""
    dora_axis: Literal["out", "in"] = "out"
    """dora: a magnitude per output row, as PEFT has it, or per input column, as first files had it."""
    start_from: str = ""

    @property
    def wanted(self) -> bool:
        return self.rank > 0 or bool(self.start_from)

    def check(self, run: RunConfig) -> None:
        """Raise InvalidInputError where it is half given, or another section asks for what a LoRA has not."""
        if not self.wanted:
            if self != LoRAConfig():
                raise InvalidInputError(
                    "[lora] is given without lora.rank; set it (4 to 64 are usual) to train a LoRA, or leave [lora] out"
                )
            return
        if run.adapter != AdapterConfig():
            raise InvalidInputError("a run trains an adapter or a LoRA: leave out [adapter], or lora.rank")
        values, defaults = run.as_dict(), RunConfig().as_dict()
        for name in _OF_ADAPTERS:
            section, key = name.split(".")
            if values[section][key] != defaults[section][key]:
                raise InvalidInputError(f"{name} is about reference pictures, which a LoRA has none of; leave it out")
        if run.train.shard:
            raise InvalidInputError("train.shard splits frozen layers, and a LoRA lies inside them; leave it out")
        if self.dropout == 1:
            raise InvalidInputError("lora.dropout is 1, which leaves nothing to learn from; 0 to 0.3 are usual")
        if self.dropout and (no_dropout := trainings()[self.algorithm][1].no_dropout):
            raise InvalidInputError(f"lora.dropout is not defined for {self.algorithm}, {no_dropout}; set it to 0")
        if self.text_learning_rate and not self.text_encoders:
            raise InvalidInputError(
                "lora.text_learning_rate is for layers of text encoders; set lora.text_encoders = true"
            )
        if self.text_learning_rate and run.train.optimizer == "prodigy":
            raise InvalidInputError("prodigy finds one learning rate for all; leave lora.text_learning_rate out")
        parse_selector(self.targets)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """The pictures and how they are cut."""

    path: str = ""
    kind: Kind = "auto"
    caption_key: str = "text"
    caption_encoding: str = ""
    """Code page of captions and lists that are not UTF-8 (cp1252, shift_jis, gb18030); without it they are left out."""
    resolution: int = 512
    buckets: bool = False
    bucket_step: int = 64
    min_side: int = 64
    """Pictures with a shorter short side are left out."""
    pairs: float = 0.0
    """Probability that the reference is another picture of the same subject."""
    augment: float = 0.0
    """Strength of the reference's augmentation, 0 to 1: crop, mirror, colours."""
    variants: int = 1
    """How many augmented versions of a reference there are; the cache keeps them all."""
    cache: str = ""
    """Folder for latents, features and token ids; empty: encode again at every step."""
    cache_dtype: Dtype = "float16"
    latents: Literal["mode", "sample"] = "mode"
    """Use the autoencoder's mean, or draw from its distribution at every step as the original does (twice the cache)."""
    shuffle: int = 1000
    """Remote shards without a cache: so many pictures are held in memory and drawn from at random."""
    encode_batch: int = 8
    workers: int = 0
    roots: tuple[str, ...] = ()
    """Folders that every picture, caption, list and shard must lie in, links followed; empty: anywhere, and remote shards too.
    ComfyUI's nodes set it, for graphs come from strangers."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The loop. ``batch`` is per process and micro-step."""

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    precision: Precision = "fp32"
    optimizer: OptimizerName = "adamw"
    lr: float = 1e-4
    """muon: of what AdamW updates; matrices and convolutions learn at twice that."""
    weight_decay: float = 0.01
    beta2: float = 0.999
    """How long AdamW remembers squared gradients; 0.99 suits runs of a few thousand steps."""
    schedule: ScheduleName = "constant_with_warmup"
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.999
    checkpointing: bool = False
    shard: bool = False
    """Split the frozen models' weights over the processes (FSDP), where one device cannot hold them."""
    seed: int = 0
    bad_steps: int = 5
    """So many steps in a row with a loss or gradient that is no number end the run."""
    device: Literal["auto", "cpu"] = "auto"
    ignore_memory: bool = False
    """Neither predict the memory that the run needs, nor refuse what cannot fit."""


@dataclass(frozen=True, slots=True)
class WatchConfig:
    """What is looked at while training; an interval of 0 switches its part off."""

    log_every: int = 10
    validate_every: int = 250
    validation: int = 8
    """Pictures held out for validation (a set too small for that validates on what it trains on, and says so)."""
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    sample_every: int = 500
    sample_prompts: tuple[str, ...] = ("",)
    sample_count: int = 4
    sample_steps: int = 25
    guidance: float = 5.0
    tensorboard: bool = True
    plot: bool = True
    """Draw loss.png at every validation and at the end."""


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """Where the run lies. It resumes by itself from the newest state in ``folder``."""

    folder: str = ""
    name: str = "ip-adapter"
    save_every: int = 500
    keep: int = 3
    state_every: int = 500
    keep_states: int = 2
    """States kept; with two, one that turns out damaged costs the steps since the one before it and not the run. Each
    takes four times the bytes of the weights in float32 (SD1.5: 0.4 GB, SDXL: 5.6 GB)."""
    dtype: Dtype = "float16"
    nested: bool = False
    """Also write the final adapter as nested .bin."""
    key_format: KeyFormat = "kohya"
    """How a LoRA's keys are written."""
    trigger: str = ""
    """Words that a LoRA's file names as its trigger phrase; they belong into the captions too."""


Sections = dict[str, dict[str, Any]]
"""Plain values by section and key."""


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A whole training run, one attribute per TOML section. A section with a ``check`` looks at the whole of it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def as_dict(self) -> Sections:
        return dataclasses.asdict(self)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file; each override is ``section.key=value``, the value as TOML or plain text.

    Relative paths in the file are relative to the file; ``~`` is the home folder. Raises InvalidInputError naming the key and
    the nearest valid one, CorruptFileError for what is no text, FileNotFoundError.
    """
    path = Path(path).expanduser()
    values = _parse_toml(_text_of(path), str(path))
    config = parse_config(values, str(path))
    for name in PATHS:
        section, key = name.split(".")
        value: str = getattr(getattr(config, section), key)
        if _ESCAPED.match(value):
            raise InvalidInputError(f"{path}: {name} is {quoted(value)}, which no folder is called; {WINDOWS}")
        if value and not is_remote(value):
            config = _with(config, section, {key: str(path.parent / os.path.expanduser(value))})
    return parse_overrides(overrides, config)


def absolute(config: RunConfig) -> RunConfig:
    """The config with whole paths instead of relative ones, which mean the working directory; addresses stay."""
    for name in PATHS:
        section, key = name.split(".")
        value: str = getattr(getattr(config, section), key)
        if value and not is_remote(value):
            config = _with(config, section, {key: os.path.abspath(value)})
    return config


def parse_overrides(
    overrides: Sequence[str], config: RunConfig, allowed: Mapping[str, frozenset[str]] | None = None
) -> RunConfig:
    """Put ``section.key=value`` texts over a config; keys that are not ``allowed`` (by section) are refused.

    Raises InvalidInputError as ``load_config`` does.
    """
    changes: Sections = {}
    for override in overrides:
        name, equals, text = check_length(override, "an override", MAX_TEXT).partition("=")
        section, dot, key = (part.strip() for part in name.partition("."))
        if not equals or not dot:
            raise InvalidInputError(
                f"override {quoted(override)} should be section.key=value, such as train.steps=2000"
            )
        if allowed is not None and key in KEYS.get(section, ()) and key not in allowed.get(section, ()):
            raise InvalidInputError(
                f"{section}.{key} cannot be set from a graph, which sets how a run learns and not where it reads and writes; "
                "the command ipadapter train takes it"
            )
        try:
            value = _parse_toml(f"x = {text}", "an override")["x"]
        except InvalidInputError:
            value = text
        if KEYS.get(section, {}).get(key) is str and not isinstance(value, str):
            value = text  # a folder that is called 2024-01-01, a name that is a number
        if f"{section}.{key}" in PATHS and isinstance(value, str) and not is_remote(value):
            value = os.path.expanduser(value)
        changes.setdefault(section, {})[key] = value
    return parse_config(changes, "the command line", config)


def is_remote(path: str) -> bool:
    """Whether a path names something to fetch, not a file: an address, or a command to run."""
    return "://" in path or path.startswith("pipe:")


def parse_config(values: Mapping[str, object], where: str, start: RunConfig | None = None) -> RunConfig:
    """Put sections of plain values over ``start`` (the defaults), checking every name, type and range."""
    start = start or RunConfig()
    sections: dict[str, Any] = {}
    for section, entries in values.items():
        if section not in KEYS:
            if section in _OWNERS and not isinstance(entries, Mapping):
                raise InvalidInputError(f"{where}: {section!r} belongs below [{_OWNERS[section]}]")
            raise InvalidInputError(f"{where}: there is no section [{_name(section)}]{_nearest(section, KEYS)}")
        if not isinstance(entries, Mapping):
            raise InvalidInputError(f"{where}: {section} should be a section [{section}], got {_shown(entries)}")
        current: Any = getattr(start, section)
        checked: dict[str, object] = {}
        for key, value in cast("Mapping[str, object]", entries).items():
            key = RENAMED.get(f"{section}.{key}", key)
            if key not in KEYS[section]:
                elsewhere = f"; it belongs below [{_OWNERS[key]}]" if key in _OWNERS else _nearest(key, _names(section))
                raise InvalidInputError(f"{where}: [{section}] has no key {quoted(key)}{elsewhere}")
            checked[key] = _typed(f"{where}: {section}.{key}", KEYS[section][key], value)
        sections[section] = dataclasses.replace(current, **checked)
    config = dataclasses.replace(start, **sections)
    _check(config)
    return config


def write_config(config: RunConfig, path: Path) -> None:
    """Write a config as TOML that ``load_config`` reads back. Raises InvalidInputError for values that no config may have."""
    _check(config)
    lines: list[str] = []
    for section, entries in config.as_dict().items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_spelled(value)}" for key, value in entries.items()]
        lines.append("")
    # file names that are no UTF-8 have lone surrogates in Python
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")


def _spelled(value: object) -> str:
    """JSON's spelling of strings, numbers, booleans and lists is also TOML's, but for pairs of surrogates and DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _text_of(path: Path) -> str:
    content = read_bytes(path, MAX_TEXT)
    try:
        return decode_text(content, path)
    except NotUnicodeError:
        try:
            return content.decode("utf-8", "surrogatepass")  # what write_config wrote
        except UnicodeDecodeError:
            pass
        raise


def _parse_toml(text: str, where: str) -> dict[str, object]:
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    # its reader takes time that grows with the square of a key's parts
    if any(line.partition("=")[0].count(".") > MAX_DOTS for line in text.split("\n")):
        raise InvalidInputError(
            f"{where} is not valid TOML for a training: a line has over {MAX_DOTS} dots before its ="
        )
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InvalidInputError(f"{where} is not valid TOML: its brackets are nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, and int() for numbers of thousands of digits
        escaped = re.search("hex|escape", str(error), re.IGNORECASE) and _BACKSLASHES.search(text)
        hint = f"; {WINDOWS}" if escaped else ""
        raise InvalidInputError(f"{where} is not valid TOML ({reason(error)}){hint}") from None


def _sections() -> dict[str, dict[str, object]]:
    return {name: get_type_hints(cls, include_extras=True) for name, cls in get_type_hints(RunConfig).items()}


KEYS: Mapping[str, Mapping[str, object]] = _sections()
"""Section to key to type, read from the dataclasses above."""

RENAMED = {"output.spelling": "key_format"}
"""Older names of settings, which are read for one version more."""

_OWNERS = {key: section for section, keys in KEYS.items() for key in keys}


def _names(section: str) -> list[str]:
    """Valid names, those of the section first."""
    return [*KEYS[section], *(f"{other}.{key}" for other in KEYS for key in KEYS[other] if other != section)]


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:100], list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(list(names)[:20])}"


def _name(text: str) -> str:
    return quoted(text)[1:-1]


def _shown(value: object) -> str:
    """A value in a message: numbers as they are, if they can be read."""
    if isinstance(value, int) and abs(value) >= MAX_INT:
        return "a number of more than 64 bits"
    return str(value) if isinstance(value, (bool, int, float)) else quoted(value)


def choices_of(kind: object) -> tuple[str, ...]:
    """The values that a key of this type may have; none where any text or number may stand."""
    if get_origin(kind) is Annotated:
        return cast(OneOf, get_args(kind)[1]).names()
    return get_args(kind) if get_origin(kind) is Literal else ()


def _typed(where: str, kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        items = cast("list[Any]", list(value)) if isinstance(value, (list, tuple)) else [value]
        if len(items) > MAX_ITEMS:
            raise InvalidInputError(f"{where} has {len(items)} entries; it may have {MAX_ITEMS}")
        return tuple(_typed(where, get_args(kind)[0], item) for item in items)
    if isinstance(value, (list, tuple, Mapping)):
        raise InvalidInputError(f"{where} is a list or a section; one value was expected")
    choices = choices_of(kind)
    if choices:
        if value not in choices:
            close = _nearest(_shown(value), choices)
            raise InvalidInputError(f"{where} is {_shown(value)}; choose one of {', '.join(choices)}{close}")
        return value
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise InvalidInputError(f"{where} is {_shown(value)}; no setting needs one")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, Path):
        return str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidInputError(f"{where} is {_shown(value)}; a value of type {kind.__name__} was expected")
    return value


def _with(config: RunConfig, section: str, changes: Mapping[str, object]) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


PATHS = (
    "model.base", "model.config", "model.image_encoder", "adapter.start_from", "lora.start_from", "data.path", "data.cache",
    "output.folder",
)  # fmt: skip
"""Keys whose values are files or folders."""

WINDOWS = "in \"double quotes\" TOML takes backslashes as escapes: write Windows paths in 'single quotes', or with / instead of \\"
_BACKSLASHES = re.compile(r'"[^"\n]{0,300}\\')
_ESCAPED = re.compile(r"(?:[A-Za-z]:|\\\w).{0,4000}?[\x00-\x1f]", re.DOTALL)
"""What is left of a Windows path whose ``\\t`` or ``\\n`` was read as an escape."""

MAX_TEXT = 2**20
"""Bytes of a config file, and characters of an override."""
MAX_STRING = 100_000
"""Characters of one text in a config."""
MAX_ITEMS = 1000
"""Entries of a list in a config."""
MAX_DOTS = 100
MAX_INT = 2**63

# least and most; the most is far above what any real run needs, and below what would exhaust a machine by its mere number
_RANGES: Mapping[str, tuple[float, float]] = {
    "adapter.num_tokens": (0, 10_000), "adapter.depth": (1, 100), "adapter.hidden_dim": (0, 2**16),
    "lora.rank": (0, 2**16), "lora.alpha": (0, 10**6), "lora.text_learning_rate": (0, 10**4), "lora.factor": (1, 2**16),
    "data.resolution": (8, 2**14), "data.bucket_step": (8, 2**14), "data.min_side": (1, 10**6), "data.variants": (1, 1000),
    "data.shuffle": (1, 10**7), "data.encode_batch": (1, 2**16), "data.workers": (0, 1024),
    "loss.min_snr": (0, 10**6), "loss.noise_offset": (-100, 100), "loss.logit_mean": (-10, 10), "loss.logit_std": (0.01, 10),
    "loss.base_shift": (-10, 10), "loss.max_shift": (-10, 10),
    "train.steps": (1, 10**9), "train.batch": (1, 2**16), "train.accumulate": (1, 10**6), "train.lr": (0, 10**4),
    "train.weight_decay": (0, 10**4), "train.warmup": (0, 10**9), "train.clip": (0, 10**9), "train.bad_steps": (1, 10**9),
    "train.seed": (1 - 2**63, 2**63 - 1),
    "watch.log_every": (1, 10**9), "watch.validate_every": (0, 10**9), "watch.validation": (0, 10**6),
    "watch.sample_every": (0, 10**9), "watch.sample_count": (1, 1000), "watch.sample_steps": (1, 10_000),
    "watch.guidance": (-1000, 1000),
    "output.save_every": (0, 10**9), "output.keep": (1, 10**6), "output.state_every": (0, 10**9),
    "output.keep_states": (1, 10**6),
}  # fmt: skip
_SHARES = (
    "data.pairs",
    "data.augment",
    "loss.drop_image",
    "loss.drop_text",
    "loss.drop_both",
    "train.ema",
    "train.beta2",
    "lora.dropout",
)
_OF_ADAPTERS = (
    "data.pairs", "data.augment", "data.variants", "loss.drop_image", "loss.drop_both", "model.image_encoder",
    "output.nested",
)  # fmt: skip
"""Keys that are about references, which a LoRA has none of."""


def _check_text(name: str, value: str) -> None:
    check_length(value, name, MAX_STRING)
    try:
        # a file may have a name in another encoding, which Python keeps as lone surrogates
        _ = os.fsencode(value) if name in PATHS else value.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(f"{name} is {quoted(value)}, which has half a character (a lone surrogate)") from None
    if name in PATHS and "\0" in value:
        raise InvalidInputError(f"{name} is {quoted(value)}; no path has a NUL character")


def _check(config: RunConfig) -> None:
    values = config.as_dict()
    for section, entries in values.items():
        for key, value in entries.items():
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, str):
                    _check_text(f"{section}.{key}", one)
    for name, (least, most) in _RANGES.items():
        section, key = name.split(".")
        value = values[section][key]
        if not value >= least:
            raise InvalidInputError(f"{name} is {_shown(value)}; it must be at least {least}")
        if not value <= most:
            raise InvalidInputError(f"{name} is {_shown(value)}; it must be at most {most:,}")
    for name in _SHARES:
        section, key = name.split(".")
        if not 0 <= values[section][key] <= 1:
            raise InvalidInputError(f"{name} is {values[section][key]}; it must lie in 0..1")
    loss = config.loss
    if loss.drop_image + loss.drop_text + loss.drop_both > 1:
        raise InvalidInputError(
            "loss.drop_image, drop_text and drop_both exclude one another: their sum must not pass 1"
        )
    if not config.train.lr > 0:
        raise InvalidInputError(f"train.lr is {config.train.lr}; it must be above 0")
    if config.train.beta2 == 1:
        raise InvalidInputError("train.beta2 is 1, which never learns how large gradients are; 0.99 to 0.999 are usual")
    if config.data.variants > 1 and config.data.augment == 0:
        raise InvalidInputError(
            "data.variants above 1 needs data.augment above 0: all of them would be the same picture"
        )
    if config.train.device == "cpu" and config.train.precision == "fp16":
        raise InvalidInputError("train.precision fp16 does not run on a CPU; use bf16 or fp32")
    if any(not 0 <= t < 1000 for t in config.watch.timesteps):
        raise InvalidInputError(f"watch.timesteps are {config.watch.timesteps}; each must lie in 0..999")
    for section in dataclasses.fields(config):
        check: Callable[[RunConfig], None] | None = getattr(getattr(config, section.name), "check", None)
        if check is not None:
            check(config)


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a finished file may tell them to anybody: of an absolute path the last part alone."""

    def told(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: told(one) for key, one in cast("dict[str, Any]", value).items()}
        if isinstance(value, (list, tuple)):
            return [told(one) for one in cast("Sequence[Any]", value)]
        absolute = isinstance(value, str) and (
            PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
        )
        return PureWindowsPath(value).name if absolute else value

    return told(dict(settings))
