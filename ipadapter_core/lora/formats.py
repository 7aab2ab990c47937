"""Files of every key format → ``LoRAWeights``: tensors grouped by module, the algorithm told by which tensors are there.

scale = alpha / rank, with alpha from the module's tensor, else from PEFT's config (``peft_config.py``), else the rank. An
alpha of 0 means the rank (kohya). Ranks are read per module. What shapes a file declares is checked here against each other
and at placement against the layer, before anything is allocated.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..errors import CorruptFileError, UnknownFormatError, quoted
from ..files.state_dict import Source, StoredTensors, TensorFile, open_state_dict
from . import algorithms
from .grouping import Modules, all_keys, grouped, take_saved
from .names import canonical, key_format_of
from .parts import Parts, checked
from .peft_config import METHODS, path_of, refuse_method
from .peft_files import config_for, configs_of
from .update import Changes, Update, shape_text
from .weights import LeftOut, LoRAModule, LoRAWeights

MAX_SIZE = 2**30
"""Numbers of a weight that a module may be for; the largest layers of any model that is known have 2²⁸."""

NO_WEIGHTS = "modules of which only an alpha or the like is there"
UNUSED = "tensors that their module's algorithm has no use for"


def load_lora(source: Source, *, name: str | None = None) -> LoRAWeights:
    """Read a LoRA of any key format and algorithm; tensors stay in the file's dtype on the CPU (float8 becomes bfloat16).

    Raises the errors of ``open_state_dict``; UnknownFormatError if no key is of a LoRA, or for methods that are not read;
    CorruptFileError for incomplete modules, impossible shapes, NaN, infinite and absurd numbers.
    """
    return parse_lora(open_state_dict(source, name=name), source if isinstance(source, (str, Path)) else None)


def describe_lora(source: Source, *, name: str | None = None) -> LoRAWeights:
    """Like ``load_lora``, with every tensor but single numbers (alphas) on the meta device: no weight is read."""
    stored = StoredTensors(source, name=name)
    file = stored.described
    numbers = stored.read_some(key for key, t in file.tensors.items() if t.numel() == 1)
    shapes = {
        key: numbers[key] if key in numbers else torch.empty(t.shape, dtype=t.dtype, device="meta")
        for key, t in file.tensors.items()
    }
    return parse_lora(TensorFile(shapes, file.metadata, file.name), source if isinstance(source, (str, Path)) else None)


def parse_lora(file: TensorFile, path: str | Path | None = None) -> LoRAWeights:
    """An opened file as modules; ``path`` says where an ``adapter_config.json`` may lie."""
    modules, left = grouped(file)
    keys = all_keys()
    configs, notes = configs_of(file, None if path is None else Path(path), keys, _ranks(modules))
    methods = [method for algorithm in algorithms.ALGORITHMS for method in algorithm.peft]
    for config in configs.values():
        config.check(methods)
    for name in left:
        method = next((method for part, method in METHODS if part in name), None)
        if method is not None:
            refuse_method(file.name, method, methods)
    if not modules:
        names = ", ".join(quoted(name) for name in list(file.tensors)[:3]) or "no tensors"
        raise UnknownFormatError(
            f"{file.name} has no LoRA in it ({len(file.tensors)} tensors, such as {names}); choose a LoRA, LyCORIS or PEFT file"
        )
    left_out = take_saved(modules, left, configs)
    numbers, sizes = ({key.role for key in keys if key.number}, {key.role for key in keys if key.sizes})
    found: list[LoRAModule] = []
    for stem, tensors in modules.items():
        tensors = {
            role: checked(file.name, stem, role, t, number=role in numbers, sizes=role in sizes)
            for role, t in tensors.items()
        }
        parts = Parts(stem, tensors, file.name, config_for(configs, stem))
        weight, bias = _updates(parts)
        if weight is None and bias is None:
            left_out.append(LeftOut(f"{stem} ({', '.join(tensors)})", NO_WEIGHTS))
            continue
        unused = [role for role in tensors if role not in parts.used]
        if unused:
            left_out.append(LeftOut(f"{stem} ({', '.join(unused)})", UNUSED))
        found.append(LoRAModule(stem, *canonical(stem), weight, bias, parts.alpha, parts.alpha_from))
    if not found:
        some = ", ".join(quoted(item.name) for item in left_out[:3])
        raise UnknownFormatError(f"{file.name} has alphas but no weights of a LoRA: {some}")
    return LoRAWeights(
        file.name, tuple(found), key_format_of(list(file.tensors)), file.metadata, tuple(left_out), tuple(notes)
    )


def _ranks(modules: Modules) -> dict[str, int]:
    """Rank of every module that has one, by path."""
    roles = [algorithm.inner_width for algorithm in algorithms.ALGORITHMS if algorithm.inner_width]
    found: dict[str, int] = {}
    for stem, tensors in modules.items():
        tensor = next((tensors[role] for role in roles if role in tensors), None)
        if tensor is not None and tensor.ndim:
            found[path_of(stem)] = int(tensor.shape[0])
    return found


def _updates(parts: Parts) -> tuple[Update | None, Update | None]:
    """What a module changes of its layer's weight and bias."""
    weight, bias = None, None
    algorithm = next((a for a in algorithms.ALGORITHMS if a.claims(parts)), None)
    if algorithm is not None:
        made = algorithm.from_parts(parts)
        weight, bias = (made.weight, made.bias) if isinstance(made, Changes) else (made, None)
        _check_size(weight, parts)
        for outer in algorithms.ALGORITHMS:
            weight = outer.around(weight, parts)
    if bias is None:
        of_bias = (algorithm.bias_from_parts(parts) for algorithm in algorithms.ALGORITHMS)
        bias = next((found for found in of_bias if found is not None), None)
    return weight, bias


def _check_size(update: Update, parts: Parts) -> None:
    """No layer is as large as a few small factors can declare; tools would allocate it."""
    if math.prod(size for size in update.weight_shape if size is not None) > MAX_SIZE:
        raise CorruptFileError(
            f"{parts.file}: {quoted(parts.stem)} is for a layer of {shape_text(update.weight_shape)} numbers, larger than any; the "
            "file is damaged"
        )
