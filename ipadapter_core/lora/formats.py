"""Files of every spelling → ``LoRAWeights``: tensors grouped by module, the algorithm told by which tensors are there.

scale = alpha / rank, with alpha from the module's tensor, else from PEFT's config (``peft_config.py``), else the rank. An
alpha of 0 means the rank (kohya). Ranks are read per module. What shapes a file declares is checked here against each other
and at placement against the layer, before anything is allocated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..errors import CorruptFileError, UnknownFormatError, quoted
from ..files.state_dict import Source, StoredTensors, TensorFile, open_state_dict
from .decomposed import Axis, Decomposed
from .difference import Difference, Replacement
from .generalized import Generalized
from .hadamard import Hadamard
from .ia3 import ChannelScale
from .input_rotation import InputButterfly, InputOrthogonal, Reflections, butterfly_is_possible
from .kronecker import Kronecker
from .low_rank import LowRank
from .names import canonical, spelling_of, split_key
from .orthogonal import Butterfly, Orthogonal
from .peft_config import METHODS, PeftConfig, belongs, config_beside, config_in_header, path_of, refuse_method
from .update import Update, shape_text
from .weights import LeftOut, LoRAModule, LoRAWeights

NOT_LORA = re.compile(r"^(?:image_proj\.|ip_adapter\.|proj\.)|\.to_[kv]_ip\.weight$|^\d+\.")
"""Keys of an image adapter around an embedded LoRA."""

LARGEST = 1e6
"""A LoRA's numbers are below 10³. Above this they are of a failed training, and products of them overflow."""

MAX_SIZE = 2**30
"""Numbers of a weight that a module may be for; the largest layers of any model that is known have 2²⁸."""

UNKNOWN = "keys of nothing known"
NO_WEIGHTS = "modules of which only an alpha or the like is there"
UNUSED = "tensors that their module's algorithm has no use for"
BUNDLED = "embeddings that OneTrainer put beside the LoRA; save them as textual inversions and load those"
SCALAR = "LyCORIS scalars, which its own loader multiplies into the factors; merge or convert the file with LyCORIS"

_SAVED = re.compile(r"^(.+?)(?:\.modules_to_save(?:\.[^.]+)?)?\.(weight|bias)$")
_PEFT_ROOT = re.compile(r"^(?:module\.)?(?:(?:unet|transformer|text_encoder(?:_[23])?)\.)?base_model\.model\.")


class _Parts:
    """The tensors of one module by role, and what was taken of them."""

    def __init__(self, stem: str, tensors: Mapping[str, Tensor], file: str, config: PeftConfig | None) -> None:
        self.stem, self.tensors, self.file, self.config = stem, tensors, file, config
        self.used: set[str] = set()
        self.alpha: float | None = None
        self.alpha_from = ""

    def __contains__(self, role: str) -> bool:
        return role in self.tensors

    def __getitem__(self, role: str) -> Tensor:
        tensor = self.get(role)
        if tensor is None:
            raise CorruptFileError(
                f"{self.file}: module {quoted(self.stem)} has {', '.join(sorted(self.tensors))}, but no '{role}' that belongs "
                "to it; the file is incomplete"
            )
        return tensor

    def get(self, role: str) -> Tensor | None:
        self.used.add(role)
        return self.tensors.get(role)

    def matrix(self, role: str, axes: int = 2) -> Tensor:
        """A tensor of at least so many axes."""
        tensor = self[role]
        if tensor.ndim < axes:
            raise CorruptFileError(
                f"{self.file}: the {role} of {quoted(self.stem)} has the shape {list(tensor.shape)}; at least {axes} axes were "
                "expected, so the file was not saved whole"
            )
        return tensor

    def scale(self, rank: int) -> float:
        """alpha / rank, from what decides it."""
        alpha = self.number("alpha")
        if alpha is not None:
            self.alpha, self.alpha_from = alpha, "tensor"
            factor = 1.0 if alpha == 0 else alpha / rank
        else:
            found = None if self.config is None else self.config.scale_of(path_of(self.stem), rank)
            if found is None or found.alpha == 0:
                self.alpha, self.alpha_from = float(rank), "default"
                return 1.0
            assert self.config is not None
            self.alpha, self.alpha_from, factor = found.alpha, self.config.origin, found.factor
        if not abs(factor) <= LARGEST:
            raise CorruptFileError(
                f"{self.file}: {quoted(self.stem)} has the scale {factor:g}; use another version of the file"
            )
        return factor

    def number(self, role: str) -> float | None:
        tensor = self.get(role)
        if tensor is None:
            return None
        if tensor.numel() != 1:
            raise CorruptFileError(
                f"{self.file}: {quoted(self.stem)} has an {role} of shape {list(tensor.shape)}; one number was expected"
            )
        return 1.0 if tensor.is_meta else float(tensor.double().reshape(()))

    def mismatch(self) -> CorruptFileError:
        shapes = ", ".join(f"{role} {list(t.shape)}" for role, t in self.tensors.items())
        return CorruptFileError(f"{self.file}: the factors of {quoted(self.stem)} do not multiply: {shapes}")


def load_lora(source: Source, *, name: str | None = None) -> LoRAWeights:
    """Read a LoRA of any spelling and algorithm; tensors stay in the file's dtype on the CPU (float8 becomes bfloat16).

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
    grouped, left = _grouped(file)
    configs, notes = config_in_header(file.metadata, file.name)
    if not configs and path is not None and _is_peft(file.tensors):
        beside = config_beside(Path(path), file.name)
        if beside is not None:
            mine, note = belongs(beside, Path(path), _ranks(grouped))
            notes += [note] if note else []
            configs = {"": beside} if mine else {}
    for config in configs.values():
        config.check()
    _refuse_methods(file.name, left)
    if not grouped:
        keys = ", ".join(quoted(key) for key in list(file.tensors)[:3]) or "no tensors"
        raise UnknownFormatError(
            f"{file.name} has no LoRA in it ({len(file.tensors)} tensors, such as {keys}); choose a LoRA, LyCORIS or PEFT file"
        )
    left_out = _take_saved(grouped, left, configs)
    modules: list[LoRAModule] = []
    for stem, tensors in grouped.items():
        checked = {role: _checked(file.name, stem, role, tensor) for role, tensor in tensors.items()}
        parts = _Parts(stem, checked, file.name, _config_for(configs, stem))
        weight, bias = _updates(parts)
        if weight is None and bias is None:
            left_out.append(LeftOut(f"{stem} ({', '.join(tensors)})", NO_WEIGHTS))
            continue
        unused = [role for role in tensors if role not in parts.used]
        if unused:
            left_out.append(LeftOut(f"{stem} ({', '.join(unused)})", UNUSED))
        modules.append(LoRAModule(stem, *canonical(stem), weight, bias, parts.alpha, parts.alpha_from))
    if not modules:
        some = ", ".join(quoted(found.name) for found in left_out[:3])
        raise UnknownFormatError(f"{file.name} has alphas but no weights of a LoRA: {some}")
    spelling = spelling_of(list(file.tensors))
    return LoRAWeights(file.name, tuple(modules), spelling, file.metadata, tuple(left_out), tuple(notes))


def _grouped(file: TensorFile) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by module and role, and those of no known role."""
    grouped: dict[str, dict[str, Tensor]] = {}
    left: dict[str, Tensor] = {}
    for key, tensor in file.tensors.items():
        split = split_key(key)
        if split is None:
            left[key] = tensor
            continue
        stem, role = split
        module = grouped.setdefault(stem, {})
        if role in module:
            raise CorruptFileError(
                f"{file.name} has two tensors for the {role} of {quoted(stem)}, so it holds several adapters at once; save each "
                "in a file of its own"
            )
        module[role] = tensor
    for key in list(left):  # IA3's only tensor is called weight; what tells it is on_input beside it
        stem = key.removesuffix(".weight")
        if stem != key and "on_input" in grouped.get(stem, {}):
            grouped[stem]["ia3"] = left.pop(key)
    return grouped, left


def _is_peft(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a config of PEFT could belong to such keys; kohya's and LyCORIS's own have their alphas inside."""
    signs = (".lora_A", ".lora_B", ".lora_embedding_", ".oft_R", ".boft_", ".ia3_l", ".hra_u")
    return any(_PEFT_ROOT.match(key) or any(sign in key for sign in signs) for key in tensors)


def _ranks(grouped: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int]:
    """Rank of every module that has one, by path."""
    found: dict[str, int] = {}
    for stem, tensors in grouped.items():
        down = tensors.get("down", tensors.get("hada_w1_b", tensors.get("lokr_w2_b")))
        if down is not None and down.ndim:
            found[path_of(stem)] = int(down.shape[0])
    return found


def _config_for(configs: Mapping[str, PeftConfig], stem: str) -> PeftConfig | None:
    if not configs:
        return None
    found = configs.get(stem.split(".", 1)[0]) or configs.get("")
    if found is None and len(configs) == 1:  # a module without the part's name in front
        ((part, only),) = configs.items()
        found = only if canonical(f"{part}.x")[0] == canonical(stem)[0] else None
    return found


def _refuse_methods(file: str, left: Mapping[str, Tensor]) -> None:
    for key in left:
        for part, method in METHODS:
            if part in key:
                refuse_method(file, method)


def _take_saved(
    grouped: dict[str, dict[str, Tensor]], left: Mapping[str, Tensor], configs: Mapping[str, PeftConfig]
) -> list[LeftOut]:
    """Put layers that PEFT saved whole (``modules_to_save``, trained biases) into their modules; the rest is left out."""
    wanted = tuple(m for config in configs.values() for m in _texts(config.table.get("modules_to_save")))
    left_out: list[LeftOut] = []
    for key, tensor in left.items():
        match = _SAVED.match(key)
        if match is not None and (_PEFT_ROOT.match(key) or path_of(match[1]).endswith(wanted)):
            stem = match[1].removesuffix(".base_layer")
            grouped.setdefault(stem, {}).setdefault(f"saved_{match[2]}", tensor)
        elif not NOT_LORA.search(key):
            left_out.append(LeftOut(key, _why(key)))
    return left_out


def _texts(value: object) -> list[str]:
    items = cast("list[object]", value)[:1000] if isinstance(value, list) else []
    return [item for item in items if isinstance(item, str)]


def _why(key: str) -> str:
    if key.startswith("bundle_emb."):
        return BUNDLED
    return SCALAR if key.endswith(".scalar") else UNKNOWN


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBERS = ("alpha", "on_input", "oft_scaled")


def _checked(file: str, stem: str, role: str, tensor: Tensor) -> Tensor:
    """The tensor, if it holds real, finite numbers that a LoRA can have; float8 as bfloat16, which holds it exactly."""
    if tensor.numel() == 0:
        raise CorruptFileError(f"{file}: the {role} of {quoted(stem)} is empty (shape {list(tensor.shape)})")
    if role in _NUMBERS and not tensor.is_complex() and tensor.numel() == 1:
        if not tensor.is_meta and not math.isfinite(float(tensor.double().reshape(()))):
            raise CorruptFileError(
                f"{file}: {quoted(stem)} has NaN or infinite numbers in its {role}; use another version"
            )
        return tensor
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        tensor = tensor.to(torch.bfloat16)
    if tensor.dtype not in _FLOATS:
        raise CorruptFileError(
            f"{file}: the {role} of {quoted(stem)} is stored as {str(tensor.dtype).removeprefix('torch.')}; a LoRA's numbers are "
            "float16, bfloat16, float32 or float64. Convert the file"
        )
    if tensor.is_meta:
        return tensor
    ends = torch.aminmax(tensor)  # both are NaN if any number is
    low, high = float(ends.min), float(ends.max)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CorruptFileError(
            f"{file}: {quoted(stem)} has NaN or infinite numbers in its {role}; it was saved from a failed training. "
            "Use another version of the file"
        )
    if max(-low, high) > LARGEST:
        raise CorruptFileError(
            f"{file}: {quoted(stem)} has numbers up to {max(-low, high):.1g} in its {role}, a million times what a LoRA has; it "
            "was saved from a failed training. Use another version of the file"
        )
    return tensor


# --- one module ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pair:
    """What a builder makes: an update of the weight, and of the bias if the algorithm has one."""

    weight: Update
    bias: Update | None = None


def _updates(parts: _Parts) -> tuple[Update | None, Update | None]:
    weight: Update | None = None
    bias: Update | None = None
    for marker, build in _BUILDERS:
        if marker in parts:
            made = build(parts)
            weight, bias = (made.weight, made.bias) if isinstance(made, _Pair) else (made, None)
            _check_size(weight, parts)
            weight = _with_magnitude(weight, parts)
            break
    return weight, bias if bias is not None else _bias_update(parts)


def _with_magnitude(update: Update, parts: _Parts) -> Update:
    magnitude = parts.get("dora_scale")
    if magnitude is not None:
        return _decompose(update, magnitude, parts)
    vector = parts.get("magnitude")
    if vector is None:
        return update
    _additive(update, parts)
    return Decomposed(update, vector.flatten(), "out")


def _low_rank(parts: _Parts) -> Update:
    down, up, mid = parts.matrix("down"), parts.matrix("up"), parts.get("mid")
    rank, inner = int(down.shape[0]), int(up.flatten(1).shape[1])
    fits = inner == rank and up.shape[1] == inner
    if mid is not None:
        flat = down.flatten(1).shape[1] == down.shape[1]
        fits = mid.ndim > 2 and inner == mid.shape[0] and mid.shape[1] == rank and up.shape[1] == inner and flat
    if not fits:
        raise CorruptFileError(
            f"{parts.file}: the matrices of {quoted(parts.stem)} do not multiply: down {list(down.shape)}, up {list(up.shape)}"
            + (f", mid {list(mid.shape)}" if mid is not None else "")
            + "; their inner widths must be equal"
        )
    singular = parts.get("singular")
    if singular is not None:
        if parts.config is None or parts.config.method != "ADALORA":
            raise UnknownFormatError(
                f"{parts.file} is a PEFT AdaLoRA file without its adapter_config.json, whose rank its strength needs; put it "
                "beside the file"
            )
        if singular.numel() != rank or down.ndim != 2:
            raise parts.mismatch()
        down = down if down.is_meta else down.float() * singular.float().reshape(-1, 1)
    return LowRank(down, up, parts.scale(rank), mid)


def _embedding(parts: _Parts) -> Update:
    """PEFT's LoRA of an embedding: its table changes by ``(B A)ᵀ``."""
    down, up = parts.matrix("embedding_down"), parts.matrix("embedding_up")
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise parts.mismatch()
    return LowRank(up.T, down.T, parts.scale(int(down.shape[0])))


def _hadamard(parts: _Parts) -> Update:
    w1_a, w1_b, w2_a, w2_b = (parts.matrix(f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    t1, t2 = parts.get("hada_t1"), parts.get("hada_t2")
    sizes: list[tuple[int, ...]] = []
    for a, b, core in ((w1_a, w1_b, t1), (w2_a, w2_b, t2)):
        if core is None:
            fits = a.ndim == 2 and a.shape[1] == b.shape[0]
            sizes.append((int(a.shape[0]), int(b.flatten(1).shape[1])))
        else:
            fits = core.ndim > 2 and a.ndim == b.ndim == 2 and tuple(core.shape[:2]) == (a.shape[0], b.shape[0])
            sizes.append((int(a.shape[1]), int(b.shape[1]), *core.shape[2:]))
        if not fits:
            raise parts.mismatch()
    if sizes[0] != sizes[1] or (t1 is None) != (t2 is None):
        raise parts.mismatch()
    return Hadamard(w1_a, w1_b, w2_a, w2_b, parts.scale(int(w1_b.shape[0])), t1, t2)


def _kronecker(parts: _Parts) -> Update:
    tensors: dict[str, Tensor] = {}
    for half in ("w1", "w2"):
        if f"lokr_{half}" in parts:
            tensors[half] = parts.matrix(f"lokr_{half}")
            continue
        a, b = parts.matrix(f"lokr_{half}_a"), parts.matrix(f"lokr_{half}_b")
        core = parts.get("lokr_t2") if half == "w2" else None
        if core is not None:
            fits = core.ndim > 2 and a.ndim == b.ndim == 2 and tuple(core.shape[:2]) == (a.shape[0], b.shape[0])
            tensors["t2"] = core
        else:
            fits = a.ndim == 2 and a.shape[1] == b.shape[0]
        if not fits:
            raise parts.mismatch()
        tensors |= {f"{half}_a": a, f"{half}_b": b}
    if any(tensors[name].ndim > 2 for name in ("w1", "w1_b") if name in tensors):
        raise parts.mismatch()
    update = Kronecker(1.0, **tensors)
    rank = update.rank
    if parts.config is not None and parts.config.method == "LOKR":  # whole factors count as of the config's rank
        rank = parts.config.rank_of(path_of(parts.stem)) or rank
    if rank is None:  # LyCORIS: with both factors whole, alpha counts for nothing (lokr.py)
        parts.alpha = parts.number("alpha")
        return update
    return Kronecker(parts.scale(rank), **tensors)


def _generalized(parts: _Parts) -> Update:
    a1, a2, b1, b2 = (parts.matrix(f"glora_{name}") for name in ("a1", "a2", "b1", "b2"))
    core = parts.get("glora_bm")
    readings: list[Generalized] = []
    for a_first, a_second, b_up, b_down in ((a1, a2, b1, b2), (a2, a1, b2, b1)):  # LyCORIS today, and until 2.3
        first, second, up = a_first.flatten(1), a_second.flatten(1), b_up.flatten(1)
        a_fits = first.shape[1] == a_second.shape[0] and first.shape[0] == second.shape[1]
        if core is None:
            b_fits = up.shape[1] == b_down.shape[0]
        else:
            b_fits = core.ndim > 2 and tuple(core.shape[:2]) == (up.shape[1], b_down.shape[0])
            b_fits = b_fits and b_down.flatten(1).shape[1] == b_down.shape[1]
        if a_fits and b_fits and a_first.shape[0] == b_down.shape[1]:
            readings.append(Generalized(a_first, a_second, b_up, b_down, parts.scale(int(a_second.shape[0])), core))
    if not readings:
        raise CorruptFileError(
            f"{parts.file}: the four matrices of {quoted(parts.stem)} have no common inner width: a1 {list(a1.shape)}, "
            f"a2 {list(a2.shape)}, b1 {list(b1.shape)}, b2 {list(b2.shape)}"
        )
    first, *rest = sorted(readings, key=lambda reading: reading.rank)  # without a layer: an inner width is small
    if not rest:
        return first
    return Generalized(first.a_first, first.a_second, first.b_up, first.b_down, first.scale, core, other=rest[0])


def _orthogonal(parts: _Parts) -> Update:
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    constraint = parts.number("alpha") or 0.0
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise CorruptFileError(
            f"{parts.file}: the oft_blocks of {quoted(parts.stem)} have the shape {list(blocks.shape)}; OFT has (blocks, n, n), "
            "BOFT (stages, blocks, n, n)"
        )
    constraint = min(constraint, torch.finfo(torch.float32).max)
    parts.alpha, parts.alpha_from = constraint, "tensor" if "alpha" in parts else "default"
    if blocks.ndim == 3:
        return Orthogonal(blocks, constraint, rescale)
    stages, count, size = (int(n) for n in blocks.shape[:3])
    if size % 2 or stages > 30 or count * size % (2 ** (stages - 1) * size):
        raise CorruptFileError(
            f"{parts.file}: the oft_blocks of {quoted(parts.stem)} have the shape {list(blocks.shape)}, but {count} blocks of "
            f"{size} cannot be mixed in {stages} stages; the file is damaged"
        )
    return Butterfly(blocks, constraint, rescale)


def _peft_oft(parts: _Parts) -> Update:
    vectors, config = parts["oft_r"], parts.config
    size = (1 + math.isqrt(1 + 8 * int(vectors.shape[1]))) // 2 if vectors.ndim == 2 else 0
    if vectors.ndim != 2 or size * (size - 1) // 2 != vectors.shape[1]:
        raise CorruptFileError(
            f"{parts.file}: the oft_R of {quoted(parts.stem)} has the shape {list(vectors.shape)}; (blocks, n(n-1)/2) was expected"
        )
    scaled = bool(parts.number("oft_scaled"))
    divisor = 2 * math.sqrt(size - 1) if scaled else 1.0
    if config is None:  # what PEFT does if nothing is said, and OneTrainer, which writes no config
        return InputOrthogonal(vectors, size, 5, 0.0, divisor)
    terms = _count(config, "num_cayley_neumann_terms", 5) if config.on("use_cayley_neumann", default=True) else 0
    eps = config.number("eps")
    return InputOrthogonal(vectors, size, terms, (6e-5 if eps is None else eps) if config.on("coft") else 0.0, divisor)


def _count(config: PeftConfig, key: str, default: int) -> int:
    value = config.number(key)
    return default if value is None else max(1, min(int(value), 64))


def _peft_boft(parts: _Parts) -> Update:
    blocks, rescale = parts["boft_R"], parts["boft_s"]
    if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3]:
        raise CorruptFileError(
            f"{parts.file}: the boft_R of {quoted(parts.stem)} has the shape {list(blocks.shape)}; (stages, blocks, n, n) was expected"
        )
    stages, count, size = (int(n) for n in blocks.shape[:3])
    if not butterfly_is_possible(count, size, stages):
        raise CorruptFileError(
            f"{parts.file}: the boft_R of {quoted(parts.stem)} has {count} blocks of {size}, which cannot be mixed in {stages} "
            "stages; the file is damaged"
        )
    return InputButterfly(blocks, rescale)


def _peft_ia3(parts: _Parts) -> _Pair:
    """PEFT's vectors begin at 1, ours at 0. On outputs the bias is multiplied too."""
    vector = parts["ia3_l"]
    shape = tuple(vector.shape)
    if len(shape) < 2 or math.prod(shape) != max(shape):
        raise parts.mismatch()
    told = None if parts.config is None else parts.config.is_feedforward(path_of(parts.stem))
    on_input: bool | None = None
    if len(shape) == 2 and shape[0] != shape[1]:
        on_input = shape[0] == 1
    elif told is not None:
        on_input = told
    if on_input is None:
        raise UnknownFormatError(
            f"{parts.file} is a PEFT IA3 file whose adapter_config.json is needed to tell whether {quoted(parts.stem)} acts on "
            "inputs or outputs; put it beside the file"
        )
    factor = vector.flatten() if vector.is_meta else vector.flatten().float() - 1
    scale = ChannelScale(factor, on_input)
    return _Pair(scale, None if on_input else scale)


def _peft_hra(parts: _Parts) -> Update:
    vectors = parts["hra_u"]
    if vectors.ndim != 2:
        raise CorruptFileError(
            f"{parts.file}: the hra_u of {quoted(parts.stem)} has the shape {list(vectors.shape)}; (inputs, r) was expected"
        )
    if not vectors.is_meta and not bool(torch.linalg.vector_norm(vectors.float(), dim=0).all()):
        raise CorruptFileError(
            f"{parts.file}: the hra_u of {quoted(parts.stem)} has a column of zeros, which is no reflection"
        )
    return Reflections(vectors, parts.config is not None and parts.config.on("apply_GS"))


def _scaled_channels(parts: _Parts) -> Update:
    return ChannelScale(parts["ia3"], bool(parts.number("on_input")))


_BUILDERS: tuple[tuple[str, Callable[[_Parts], Update | _Pair]], ...] = (
    ("down", _low_rank),
    ("up", _low_rank),
    ("embedding_down", _embedding),
    ("embedding_up", _embedding),
    ("hada_w1_a", _hadamard),
    ("lokr_w1", _kronecker),
    ("lokr_w1_a", _kronecker),
    ("lokr_w2", _kronecker),
    ("lokr_w2_a", _kronecker),
    ("glora_a1", _generalized),
    ("oft_blocks", _orthogonal),
    ("oft_r", _peft_oft),
    ("boft_R", _peft_boft),
    ("ia3_l", _peft_ia3),
    ("hra_u", _peft_hra),
    ("ia3", _scaled_channels),
    ("diff", lambda parts: Difference(parts.matrix("diff", 1))),
    ("w_norm", lambda parts: Difference(parts.matrix("w_norm", 1))),
    ("set_weight", lambda parts: Replacement(parts.matrix("set_weight", 1))),
    ("saved_weight", lambda parts: Replacement(parts.matrix("saved_weight", 1))),
)


def _bias_update(parts: _Parts) -> Update | None:
    for role in ("diff_b", "b_norm"):
        if role in parts:
            return Difference(parts.matrix(role, 1))
    if "lora_bias" in parts:  # of lora_B, so under the scale of the whole product
        bias = parts.matrix("lora_bias", 1)
        down = parts.get("down")
        factor = 1.0 if down is None or down.ndim == 0 else parts.scale(int(down.shape[0]))
        return Difference(bias if factor == 1 or bias.is_meta else bias.float() * factor)
    return Replacement(parts.matrix("saved_bias", 1)) if "saved_bias" in parts else None


def _additive(update: Update, parts: _Parts) -> None:
    if update.reads_weight:
        raise CorruptFileError(
            f"{parts.file}: {quoted(parts.stem)} has a dora_scale on {update.title}, which has no such form"
        )


def _decompose(update: Update, magnitude: Tensor, parts: _Parts) -> Decomposed:
    _additive(update, parts)
    axis: Axis = "in" if magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] > 1 else "out"
    if magnitude.ndim == 1 and magnitude.shape[0] != update.weight_shape[0]:
        axis = "in"
    return Decomposed(update, magnitude.flatten(), axis)


def _check_size(update: Update, parts: _Parts) -> None:
    """No layer is as large as a few small factors can declare; tools would allocate it."""
    if math.prod(size for size in update.weight_shape if size is not None) > MAX_SIZE:
        raise CorruptFileError(
            f"{parts.file}: {quoted(parts.stem)} is for a layer of {shape_text(update.weight_shape)} numbers, larger than any; the file is "
            "damaged"
        )
