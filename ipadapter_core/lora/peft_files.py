"""Where PEFT's configs of a file are, and which of its modules each is for."""

# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..errors import AdapterError, CorruptFileError, quoted
from ..files.state_dict import TensorFile
from ..files.text import as_table, parse_json, read_bytes
from .names import canonical
from .parts import Key
from .peft_config import PEFT_ROOT, PeftConfig

HEADER_KEY = "lora_adapter_metadata"
CONFIG_FILE = "adapter_config.json"
MAX_HEADER_TEXT = 16 * 2**20


def configs_of(
    file: TensorFile, path: Path | None, keys: Sequence[Key], ranks: Mapping[str, int]
) -> tuple[dict[str, PeftConfig], list[str]]:
    """The configs of a file by the model's part (``unet``, ``text_encoder``; "" for all), and notes on what was not read.

    ``path`` says where an ``adapter_config.json`` may lie; ``ranks`` are those of the file's modules, by path.
    """
    configs, notes = _in_header(file.metadata, file.name)
    if configs or path is None or not _is_peft(file.tensors, keys):
        return configs, notes
    beside = _beside(path, file.name)
    if beside is None:
        return {}, notes
    mine, note = _belongs(beside, path, ranks)
    return {"": beside} if mine else {}, [*notes, *([note] if note else [])]


def config_for(configs: Mapping[str, PeftConfig], stem: str) -> PeftConfig | None:
    """The config of one module."""
    if not configs:
        return None
    found = configs.get(stem.split(".", 1)[0]) or configs.get("")
    if found is None and len(configs) == 1:  # a module without the part's name in front
        ((part, only),) = configs.items()
        found = only if canonical(f"{part}.x")[0] == canonical(stem)[0] else None
    return found


def _is_peft(tensors: Mapping[str, Tensor], keys: Sequence[Key]) -> bool:
    """Whether a config of PEFT could belong to such keys; kohya's and LyCORIS's own have their alphas inside."""
    signs = [key.part for key in keys if key.peft]
    return any(PEFT_ROOT.match(name) or any(sign in name for sign in signs) for name in tensors)


def _in_header(metadata: Mapping[str, str], file: str) -> tuple[dict[str, PeftConfig], list[str]]:
    """diffusers' ``lora_adapter_metadata`` by the model's part (``unet``, ``text_encoder``; "" for all), and notes."""
    text = metadata.get(HEADER_KEY)
    if text is None:
        return {}, []
    try:
        if len(text) > MAX_HEADER_TEXT:
            raise CorruptFileError(f"it has {len(text):,} characters")
        value = parse_json(text, HEADER_KEY)
    except AdapterError as error:
        return {}, [f"its {HEADER_KEY} cannot be read, so no alpha is taken from it ({error})"]
    tables: dict[str, dict[str, object]] = {}
    for prefix, entry in as_table(value).items():
        part, dot, name = prefix.partition(".")
        tables.setdefault(part if dot else "", {})[name or prefix] = entry
    return {part: PeftConfig(table, "header", file) for part, table in tables.items()}, []


def _beside(path: Path, file: str) -> PeftConfig | None:
    """The ``adapter_config.json`` in a file's folder, which may belong to another file there. Raises as ``read_bytes`` and ``parse_json``."""
    beside = path.parent / CONFIG_FILE
    if not beside.exists():
        return None
    name = f"{CONFIG_FILE} beside {file}"
    value = parse_json(read_bytes(beside), name)
    table = as_table(value)
    if not isinstance(value, dict):
        raise CorruptFileError(f"{quoted(name)} is no PEFT config: a table of options was expected")
    return PeftConfig(table, CONFIG_FILE, file)


def _belongs(config: PeftConfig, path: Path, ranks: Mapping[str, int]) -> tuple[bool, str]:
    """Whether a config beside a file is the file's, and what to say about it.

    PEFT writes ``adapter_model.*``. A renamed file keeps its config if it is alone in its folder or if the ranks of its
    modules (``ranks``, by path) are those of the config.
    """
    if path.name.startswith("adapter_model."):
        return True, ""
    others = _other_files(path)
    if not others:
        return True, ""
    wrong = [(name, rank) for name, rank in list(ranks.items())[:2000] if config.rank_of(name) not in (None, rank)]
    if wrong:
        name, rank = wrong[0]
        return False, (
            f"{CONFIG_FILE} beside it was not read: it is for rank {config.rank_of(name)} in {quoted(name)}, which has {rank} "
            "here, so it belongs to another file of the folder"
        )
    return (
        True,
        f"alpha and options from {CONFIG_FILE} beside it, though the folder has {len(others) + 1} files of weights",
    )


def _other_files(path: Path) -> list[str]:
    kinds = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
    try:
        found = [p.name for p in path.parent.iterdir() if p.suffix.lower() in kinds and p.name != path.name]
    except OSError:
        return []
    return found
