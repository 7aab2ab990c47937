"""Files of every spelling → ``LoRAWeights``: tensors grouped by module, the algorithm told by which tensors are there.

scale = alpha / rank, with alpha from the module's tensor, else the header (diffusers' ``lora_adapter_metadata``, PEFT's
``adapter_config.json``), else the rank. An alpha of 0 means the rank (kohya). Ranks are read per module.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import CorruptFileError, UnknownFormatError
from ..state_dict import Source, TensorFile, describe_state_dict, open_state_dict
from .decomposed import Axis, Decomposed
from .difference import Difference, Replacement
from .generalized import Generalized
from .hadamard import Hadamard
from .ia3 import ChannelScale
from .kronecker import Kronecker
from .low_rank import LowRank
from .names import canonical, spelling_of, split_key
from .orthogonal import Butterfly, Orthogonal
from .update import Update
from .weights import LoRAModule, LoRAWeights

NOT_LORA = re.compile(r"^(?:image_proj\.|ip_adapter\.|proj\.)|\.to_[kv]_ip\.weight$|^\d+\.")
"""Keys of an image adapter around an embedded LoRA."""

Alpha = Callable[[str], tuple[float, bool] | None]


@dataclass(frozen=True, slots=True)
class _Parts:
    """The tensors of one module by role."""

    stem: str
    tensors: Mapping[str, Tensor]
    file: str
    header_alpha: Alpha

    def __getitem__(self, role: str) -> Tensor:
        try:
            return self.tensors[role]
        except KeyError:
            there = ", ".join(sorted(self.tensors))
            raise CorruptFileError(
                f"{self.file}: module '{self.stem}' has {there}, but no '{role}' that belongs to it; the file is incomplete"
            ) from None

    def get(self, role: str) -> Tensor | None:
        return self.tensors.get(role)

    def scale(self, rank: int) -> float:
        alpha = self.number("alpha")
        if alpha is not None:
            return 1.0 if alpha == 0 else alpha / rank
        found = self.header_alpha(self.stem)
        if found is None or found[0] == 0:
            return 1.0
        return found[0] / (math.sqrt(rank) if found[1] else rank)

    def number(self, role: str) -> float | None:
        tensor = self.tensors.get(role)
        if tensor is None:
            return None
        if tensor.numel() != 1:
            raise CorruptFileError(
                f"{self.file}: '{self.stem}' has an {role} of shape {list(tensor.shape)}; one number was expected"
            )
        return 1.0 if tensor.is_meta else float(tensor.float().reshape(()))


def load_lora(source: Source, *, name: str | None = None) -> LoRAWeights:
    """Read a LoRA of any spelling and algorithm; tensors stay in the file's dtype on the CPU.

    Raises the errors of ``open_state_dict``; UnknownFormatError if no key is of a LoRA; CorruptFileError for incomplete
    modules, impossible shapes, NaN or infinite numbers.
    """
    return parse_lora(open_state_dict(source, name=name), source if isinstance(source, (str, Path)) else None)


def describe_lora(source: Source, *, name: str | None = None) -> LoRAWeights:
    """Like ``load_lora`` from the header alone: every tensor on the meta device, scales as if alpha were 1."""
    return parse_lora(describe_state_dict(source, name=name), source if isinstance(source, (str, Path)) else None)


def parse_lora(file: TensorFile, path: str | Path | None = None) -> LoRAWeights:
    """An opened file as modules; ``path`` says where an ``adapter_config.json`` may lie."""
    grouped: dict[str, dict[str, Tensor]] = {}
    left: dict[str, Tensor] = {}
    for key, tensor in file.tensors.items():
        split = split_key(key)
        if split is None:
            left[key] = tensor
        else:
            grouped.setdefault(split[0], {})[split[1]] = tensor
    for key in list(left):  # IA3's only tensor is called weight; what tells it is on_input beside it
        stem = key.removesuffix(".weight")
        if stem != key and "on_input" in grouped.get(stem, {}):
            grouped[stem]["ia3"] = left.pop(key)
    if not grouped:
        keys = ", ".join(list(file.tensors)[:3]) or "no tensors"
        raise UnknownFormatError(
            f"{file.name} has no LoRA in it ({len(file.tensors)} tensors, such as {keys}); choose a LoRA, LyCORIS or PEFT file"
        )
    header_alpha = _header_alpha(file.metadata, path)
    modules: list[LoRAModule] = []
    strays: list[str] = [key for key in left if not NOT_LORA.search(key)]
    for stem, tensors in grouped.items():
        _check_finite(file.name, stem, tensors)
        parts = _Parts(stem, tensors, file.name, header_alpha)
        weight, bias = _weight_update(parts), _bias_update(parts)
        if weight is None and bias is None:
            strays += [f"{stem} ({', '.join(tensors)})"]
            continue
        component, name = canonical(stem)
        modules.append(LoRAModule(stem, component, name, weight, bias))
    if not modules:
        raise UnknownFormatError(f"{file.name} has alphas but no weights of a LoRA: {', '.join(strays[:3])}")
    return LoRAWeights(file.name, tuple(modules), spelling_of(list(file.tensors)), file.metadata, tuple(strays))


def _check_finite(file: str, stem: str, tensors: Mapping[str, Tensor]) -> None:
    for role, tensor in tensors.items():
        if not tensor.is_meta and tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CorruptFileError(
                f"{file}: '{stem}' has NaN or infinite numbers in its {role}; it was saved from a failed training. "
                "Use another version of the file"
            )
        if tensor.numel() == 0:
            raise CorruptFileError(f"{file}: the {role} of '{stem}' is empty (shape {list(tensor.shape)})")


# --- one module ------------------------------------------------------------------------------------------------------


def _weight_update(parts: _Parts) -> Update | None:
    for marker, build in _BUILDERS:
        if marker in parts.tensors:
            update = build(parts)
            magnitude = parts.get("dora_scale")
            if magnitude is not None:
                return _decompose(update, magnitude, parts)
            vector = parts.get("magnitude")
            return update if vector is None else Decomposed(update, vector.flatten(), "out")
    return None


def _low_rank(parts: _Parts) -> Update:
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    inner = up.shape[1] if up.ndim > 1 else None
    if down.ndim < 2 or inner != (down.shape[0] if mid is None else mid.shape[0]):
        raise CorruptFileError(
            f"{parts.file}: the matrices of '{parts.stem}' do not multiply: down {list(down.shape)}, up {list(up.shape)}; "
            "their inner widths must be equal"
        )
    return LowRank(down, up, parts.scale(int(down.shape[0])), mid)


def _hadamard(parts: _Parts) -> Update:
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    tensors = {name: parts[f"hada_{name}"] for name in names}
    scale = parts.scale(int(tensors["w1_b"].shape[0]))
    update = Hadamard(**tensors, scale=scale, t1=parts.get("hada_t1"), t2=parts.get("hada_t2"))
    _check_shape(update, parts)
    return update


def _kronecker(parts: _Parts) -> Update:
    tensors: dict[str, Tensor] = {}
    for half in ("w1", "w2"):
        if parts.get(f"lokr_{half}") is not None:
            tensors[half] = parts[f"lokr_{half}"]
        else:
            tensors |= {f"{half}_{side}": parts[f"lokr_{half}_{side}"] for side in "ab"}
    core = parts.get("lokr_t2")
    if core is not None and "w2" not in tensors:
        tensors["t2"] = core
    update = Kronecker(1.0, **tensors)
    if update.rank is not None:  # with both factors whole, alpha counts for nothing (LyCORIS lokr.py)
        update = Kronecker(parts.scale(update.rank), **tensors)
    _check_shape(update, parts)
    return update


def _generalized(parts: _Parts) -> Update:
    a1, a2, b1, b2 = (parts[f"glora_{name}"] for name in ("a1", "a2", "b1", "b2"))
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    if not new and not old:
        raise CorruptFileError(f"{parts.file}: the four matrices of '{parts.stem}' have no common inner width")
    a_first, a_second, b_up, b_down = (a1, a2, b1, b2) if new else (a2, a1, b2, b1)
    return Generalized(a_first, a_second, b_up, b_down, parts.scale(int(a_second.shape[0])), parts.get("glora_bm"))


def _orthogonal(parts: _Parts) -> Update:
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    constraint = parts.number("alpha") or 0.0
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise CorruptFileError(
            f"{parts.file}: the oft_blocks of '{parts.stem}' have the shape {list(blocks.shape)}; OFT has (blocks, n, n), "
            "BOFT (stages, blocks, n, n)"
        )
    return (Orthogonal if blocks.ndim == 3 else Butterfly)(blocks, constraint, rescale)


def _scaled_channels(parts: _Parts) -> Update:
    return ChannelScale(parts["ia3"], bool(parts.number("on_input")))


_BUILDERS: tuple[tuple[str, Callable[[_Parts], Update]], ...] = (
    ("down", _low_rank),
    ("up", _low_rank),
    ("hada_w1_a", _hadamard),
    ("lokr_w1", _kronecker),
    ("lokr_w1_a", _kronecker),
    ("lokr_w2", _kronecker),
    ("glora_a1", _generalized),
    ("oft_blocks", _orthogonal),
    ("ia3", _scaled_channels),
    ("diff", lambda parts: Difference(parts["diff"])),
    ("w_norm", lambda parts: Difference(parts["w_norm"])),
    ("set_weight", lambda parts: Replacement(parts["set_weight"])),
)


def _bias_update(parts: _Parts) -> Update | None:
    for role in ("diff_b", "b_norm", "lora_bias"):
        if role in parts.tensors:
            return Difference(parts[role])
    return None


def _decompose(update: Update, magnitude: Tensor, parts: _Parts) -> Decomposed:
    if update.reads_weight:
        raise CorruptFileError(
            f"{parts.file}: '{parts.stem}' has a dora_scale on {update.title}, which has no such form"
        )
    axis: Axis = "in" if magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] > 1 else "out"
    if magnitude.ndim == 1 and str(magnitude.shape[0]) != update.describe_shape().split("×")[0]:
        axis = "in"
    return Decomposed(update, magnitude.flatten(), axis)


def _check_shape(update: Update, parts: _Parts) -> None:
    """Let inconsistent factors fail here, by name, and not in a matrix product."""
    try:
        rows, columns = (int(size) for size in update.describe_shape().split("×"))
        update.to(torch.device("meta")).delta(torch.empty(rows, columns, device="meta"))
    except (RuntimeError, ValueError, IndexError):
        shapes = ", ".join(f"{role} {list(t.shape)}" for role, t in parts.tensors.items())
        raise CorruptFileError(f"{parts.file}: the factors of '{parts.stem}' do not multiply: {shapes}") from None


# --- alpha from the header -------------------------------------------------------------------------------------------


def _header_alpha(metadata: Mapping[str, str], path: str | Path | None) -> Alpha:
    """Alpha of a module, and whether it is divided by the root of the rank, from the header or the file beside."""
    tables: dict[str, dict[str, Any]] = {}
    for prefix, value in _json_table(metadata.get("lora_adapter_metadata")).items():
        part, dot, name = prefix.partition(".")
        tables.setdefault(part if dot else "", {})[name or prefix] = value
    if not tables and path is not None:
        config = Path(path).parent / "adapter_config.json"
        if config.is_file() and Path(path).name.startswith("adapter_model"):
            tables[""] = _json_table(config.read_text(encoding="utf-8", errors="replace"))

    def alpha(stem: str) -> tuple[float, bool] | None:
        part = stem.split(".")[0]
        table = tables.get(part) or tables.get("") or (next(iter(tables.values())) if len(tables) == 1 else None)
        if not table:
            return None
        value = table.get("lora_alpha")
        for pattern, own in _json_dict(table.get("alpha_pattern")).items():
            if stem == pattern or stem.endswith(f".{pattern}"):  # never a regex from a file
                value = own
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return float(value), bool(table.get("use_rslora"))

    return alpha


def _json_table(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        return _json_dict(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _json_dict(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
