"""A file's keys: which tensor is which module's, in which role; and what of a file is no part of any update."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from functools import lru_cache

from torch import Tensor

from ..errors import CorruptFileError, quoted
from ..files.state_dict import TensorFile
from ..narrowing import is_list
from . import algorithms
from .parts import Key
from .peft_config import PEFT_ROOT, PeftConfig, path_of
from .update import Update
from .weights import LeftOut

NOT_LORA = re.compile(
    r"^(?:image_proj\.|ip_adapter\.|proj\.)|\.to_[kv]_ip\.weight$|^\d+\.|^blocks\.\d+\.(?:ip_[kv]_proj|adaln_ip)\."
)
"""Keys of an image adapter around an embedded LoRA."""

UNKNOWN = "keys of nothing known"
BUNDLED = "embeddings that OneTrainer put beside the LoRA; save them as textual inversions and load those"
SCALAR = "LyCORIS scalars, which its own loader multiplies into the factors; merge or convert the file with LyCORIS"

_SAVED = re.compile(r"^(.+?)(?:\.modules_to_save(?:\.[^.]+)?)?\.(weight|bias)$")

Modules = dict[str, dict[str, Tensor]]
"""Tensors by module, as the file names it, and role."""


def all_keys() -> tuple[Key, ...]:
    """How files name tensors, of every algorithm; the first that matches wins."""
    return _keys_of(algorithms.ALGORITHMS)


def check_algorithms(listed: Iterable[type[Update]]) -> None:
    """Raise TypeError for a class without one of the members that every algorithm has, or with another's role or mark."""
    owners: dict[tuple[str, str], type[Update]] = {}
    for algorithm in listed:
        missing = sorted(algorithm.__abstractmethods__)
        if missing:
            raise TypeError(f"{algorithm.__name__} has no {', '.join(missing)}; see lora.update.Update")
        claims = {("role", key.role) for key in algorithm.keys} | {("mark", mark) for mark in algorithm.marks}
        for kind, name in sorted(claims):
            owner = owners.setdefault((kind, name), algorithm)
            if owner is not algorithm:
                raise TypeError(
                    f"{algorithm.__name__} and {owner.__name__} both have the {kind} {name!r}, so that files of the one would load "
                    "as the other; give it a name of its own"
                )


@lru_cache(maxsize=8)
def _keys_of(listed: tuple[type[Update], ...]) -> tuple[Key, ...]:
    check_algorithms(listed)
    # what stands around another algorithm is asked first: an adapter's name at the end may look like another's tensor
    return tuple(key for algorithm in sorted(listed, key=lambda a: not a.wraps) for key in algorithm.keys)


def split_key(name: str, beside: Mapping[str, Container[str]] | None = None) -> tuple[str, str] | None:
    """Module and role of a tensor by its name in a file; None if no algorithm has such a tensor.

    ``beside``: roles that modules have already; it decides on names that count only beside others, which are else none.
    """
    for key in all_keys():
        if key.part not in name or bool(key.beside) != (beside is not None):
            continue
        match = key.pattern.search(name)
        if match is None:
            continue
        stem = name[: match.start()]
        if beside is None:
            stem = stem.removesuffix(".base_layer")
        elif key.beside not in beside.get(stem, ()):
            continue
        return stem, match.expand(key.role) if "\\" in key.role else key.role
    return None


def grouped(file: TensorFile) -> tuple[Modules, dict[str, Tensor]]:
    """Tensors by module and role, and those of no known role. Raises CorruptFileError for two tensors of one role."""
    modules: Modules = {}
    left: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        split = split_key(name)
        if split is None:
            left[name] = tensor
            continue
        stem, role = split
        module = modules.setdefault(stem, {})
        if role in module:
            raise CorruptFileError(
                f"{file.name} has two tensors for the {role} of {quoted(stem)}, so it holds several adapters at once; save each "
                "in a file of its own"
            )
        module[role] = tensor
    for name in list(left):
        split = split_key(name, modules)
        if split is not None:
            modules[split[0]][split[1]] = left.pop(name)
    return modules, left


def take_saved(modules: Modules, left: Mapping[str, Tensor], configs: Mapping[str, PeftConfig]) -> list[LeftOut]:
    """Put layers that PEFT saved whole (``modules_to_save``, trained biases) into their modules; the rest is left out."""
    wanted = tuple(m for config in configs.values() for m in _texts(config.table.get("modules_to_save")))
    left_out: list[LeftOut] = []
    for name, tensor in left.items():
        match = _SAVED.match(name)
        if match is not None and (PEFT_ROOT.match(name) or path_of(match[1]).endswith(wanted)):
            stem = match[1].removesuffix(".base_layer")
            modules.setdefault(stem, {}).setdefault(f"saved_{match[2]}", tensor)
        elif not NOT_LORA.search(name):
            left_out.append(LeftOut(name, _why(name)))
    return left_out


def _texts(value: object) -> list[str]:
    items = value[:1000] if is_list(value) else []
    return [item for item in items if isinstance(item, str)]


def _why(name: str) -> str:
    if name.startswith("bundle_emb."):
        return BUNDLED
    return SCALAR if name.endswith(".scalar") else UNKNOWN
