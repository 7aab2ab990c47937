"""Adapter files: opened, told apart, read into ``AdapterWeights``, and written.

A new family is one new file beside this one and one line in ``FORMATS``.
"""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterError, CorruptFileError, InvalidInputError, UnknownFormatError, one_line, reason
from ..features import ENCODERS
from ..files.state_dict import Source, StateDict, TensorFile, describe_state_dict, open_state_dict
from ..files.whole import written_whole
from . import (
    anima_character,
    anima_pe,
    base,
    face_resampler,
    faceid,
    faceid_plus,
    full_face,
    instantcharacter,
    instantx,
    plus,
    sd35,
    xlabs,
)
from .containers import left_out, normalise, other_family, other_file
from .embedded_lora import kohya_lora
from .format import (
    BARE,
    AdapterModule,
    AdapterSpec,
    AdapterWeights,
    Format,
    TrainedUnconditional,
    check_finite,
    check_tensors,
    empty_module,
    few,
)
from .projectors import TORCH, Operations

__all__ = [
    "FORMATS",
    "AdapterModule",
    "AdapterSpec",
    "AdapterWeights",
    "Format",
    "as_version",
    "claimants",
    "describe_adapter",
    "format_named",
    "kohya_lora",
    "load_adapter",
    "save_adapter",
    "trainable_families",
]

FORMATS: tuple[Format, ...] = (
    base.FORMAT,
    plus.FORMAT,
    full_face.FORMAT,
    faceid.FORMAT,
    faceid_plus.FORMAT,
    face_resampler.UNNORM,
    face_resampler.INSTANTID,
    xlabs.FORMAT,
    xlabs.CONVERTED,
    instantx.FORMAT,
    instantx.RESAMPLER,
    instantcharacter.FORMAT,
    sd35.FORMAT,
    anima_character.FORMAT,
    anima_pe.FORMAT,
)
"""Every family of adapter files that is known, one value per file of this package."""

TOLD_BY_SHAPES = {"SD1.5", "SD2", "SDXL", "Kolors", "FLUX", "SD3.5", "Anima"}
"""Base models that metadata cannot claim: an adapter for them has their shapes."""

Layout = Literal["flat", "nested"]
EXTENSIONS: Mapping[Layout, tuple[str, ...]] = {
    "flat": (".safetensors", ".sft"),
    "nested": (".bin", ".pt", ".pth", ".ckpt"),
}


def load_adapter(
    source: Source,
    *,
    name: str | None = None,
    dtype: torch.dtype | Callable[[torch.dtype], torch.dtype] | None = None,
    operations: Operations = TORCH,
) -> AdapterWeights:
    """Load an adapter from a file or a state dict, on the CPU.

    The weights keep the file's dtype unless ``dtype`` is given, or chosen by a function of the file's; a file that mixes dtypes
    gets the widest of them. They are read once and not copied. ``operations`` says whose layers are built: torch.nn's, or comfy.ops.manual_cast's.

    Raises UnknownFormatError for what is not an adapter of a known family, CorruptFileError for incomplete or damaged
    ones and for NaN weights, UnsafeFileError for pickles that carry code, FileNotFoundError.
    """
    file = open_state_dict(source, name=name)
    spec, tensors, lora = _read(file)
    module = empty_module(spec, BARE if operations is TORCH else operations)
    with _named(file, spec.format):
        check_finite({module.keys.in_file(key): tensor for key, tensor in tensors.items()} | lora)
    if not isinstance(dtype, torch.dtype):
        own = reduce(_wider, (tensor.dtype for tensor in tensors.values()))
        dtype = own if dtype is None else dtype(own)
    file.tensors.clear()  # so that a tensor goes when another dtype of it comes, and the file is not in memory twice
    converted: dict[str, Tensor] = {}
    while tensors:
        key, tensor = tensors.popitem()
        converted[key] = tensor.to(dtype)
    module.load_state_dict(converted, assign=True)
    return AdapterWeights(spec, module.requires_grad_(False).eval(), file.name, file.metadata, lora)


def describe_adapter(source: Source, *, name: str | None = None) -> AdapterSpec:
    """What an adapter is, without its numbers: of a safetensors file only the header is read.

    Raises what ``load_adapter`` raises, but for NaN weights, which it does not see.
    """
    return _read(describe_state_dict(source, name=name))[0]


def save_adapter(
    adapter: AdapterWeights,
    path: str | os.PathLike[str],
    *,
    layout: Layout = "flat",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter as released files are, in its dtype, and return the path.

    "flat" makes a safetensors file with its family's keys (``image_proj.``, ``ip_adapter.``) that describes itself in its
    metadata (the spec, the adapter's own entries, then ``metadata``); "nested" a .bin of dictionaries, one for each word
    that keys begin with, which has no room for metadata. The file appears whole or not at all.

    Raises InvalidInputError for an extension that does not belong to the layout, an adapter without numbers, metadata
    that is not text, or a folder that does not exist.
    """
    path = Path(path)
    if layout not in EXTENSIONS:
        raise InvalidInputError(f"layout is {one_line(layout)!r}; choose 'flat' (safetensors) or 'nested' (.bin).")
    if path.suffix.lower() not in EXTENSIONS[layout]:
        raise InvalidInputError(
            f"{one_line(path.name)} should end in {' or '.join(EXTENSIONS[layout])} for the layout {layout!r}."
        )
    if not path.parent.is_dir():
        raise InvalidInputError(f"the folder {one_line(path.parent)} does not exist: create it first.")
    texts = {**adapter.metadata, **_as_metadata(adapter.spec), **(metadata or {})}
    if not all(isinstance(text, str) for entry in texts.items() for text in cast("tuple[object, object]", entry)):
        raise InvalidInputError("metadata must be text to text: write numbers as strings.")
    state = {**adapter.module.checkpoint_state(), **adapter.lora}
    if any(tensor.is_meta for tensor in state.values()):
        raise InvalidInputError(f"{adapter.name} has shapes but no numbers (meta tensors): load it from a file first.")
    state = {key: tensor.cpu().contiguous() for key, tensor in state.items()}
    with written_whole(path) as place:
        _write(state, place, layout, {"format": "pt", **texts})
    return path


def _write(state: dict[str, Tensor], path: Path, layout: Layout, texts: dict[str, str]) -> None:
    if layout == "flat":
        save_file(_apart(state), path, metadata=texts)
    else:
        groups: dict[str, dict[str, Tensor] | Tensor] = {}
        for key, tensor in state.items():
            name, _, rest = key.partition(".")
            # clone: torch.save writes the whole storage of a view
            if rest:
                cast("dict[str, Tensor]", groups.setdefault(name, {}))[rest] = tensor.clone()
            else:
                groups[name] = tensor.clone()
        torch.save(groups, path)


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that share numbers (tied weights of a pickle) as copies: safetensors keeps each by itself."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for key, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _read(file: TensorFile) -> tuple[AdapterSpec, dict[str, Tensor], dict[str, Tensor]]:
    """The spec of a file, its tensors under the keys of ``AdapterModule``, and a LoRA inside."""
    normalised = replace(file, tensors=normalise(file.tensors))
    with _named(file):
        format = _claim(normalised)
    with _named(file, format):
        state, lora = _lora_apart(normalised.tensors, format)
        spec = replace(
            format.parse(replace(file, tensors=state)), left_out=left_out(file.tensors), lora_layers=len(lora) // 2
        )
        try:
            module = empty_module(spec, BARE)
        except (RuntimeError, OverflowError, TypeError) as error:
            raise CorruptFileError(
                f"its sizes do not make a network ({reason(error)}): the file is damaged."
            ) from error
        tensors = check_tensors(module, state)
        format.check_lora(lora, spec)
        return _with_hints(spec, file.metadata), tensors, lora


def _lora_apart(state: StateDict, format: Format) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state without the LoRA that a family's files may carry, and that LoRA, under its keys in the file."""
    matches = None if format.lora_keys is None else format.lora_keys.fullmatch
    lora = {key: tensor for key, tensor in state.items() if matches is not None and matches(key)}
    return {key: tensor for key, tensor in state.items() if key not in lora}, lora


def claimants(file: TensorFile) -> list[Format]:
    """The formats that claim a file (normalised); exactly one claims each file of a known family."""
    return _foremost(format for format in FORMATS if format.detect(file))


def trainable_families() -> tuple[str, ...]:
    """The names of the families that can be trained anew."""
    return tuple(format.name for format in FORMATS if format.trains)


def format_named(name: str) -> Format:
    """The format of a family. Raises InvalidInputError for a name that is none's."""
    for format in FORMATS:
        if format.name == name:
            return format
    raise InvalidInputError(f"{one_line(name)!r} is no family of adapters; choose one of: {_names()}.")


def _foremost(formats: Iterable[Format]) -> list[Format]:
    """Formats without those that another of them comes before."""
    found = list(formats)
    behind = {name for format in found for name in format.before}
    return [format for format in found if format.name not in behind]


def _names() -> str:
    return ", ".join(format.name for format in FORMATS)


def _claim(file: TensorFile) -> Format:
    claims, state = claimants(file), file.tensors
    has_layers = any(format.keys.any_layer(state) for format in FORMATS)
    if len(claims) == 1 and has_layers:
        return claims[0]
    seen = _seen(state)
    if len(claims) > 1:
        names = " and ".join(format.name for format in claims)
        raise UnknownFormatError(f"could be {names} at once, so it is none of them. {seen} Export it again.")
    if claims:
        group = claims[0].keys.projector.rstrip(".")
        layers = claims[0].keys.layers["to_k_ip"].split(".", 1)[0]
        raise UnknownFormatError(
            f"holds the {group} half of a {claims[0].name} adapter and no {layers} layers. {seen} "
            "The export is incomplete: save both groups."
        )
    other = other_family(state)
    if other is not None:
        raise UnknownFormatError(f"looks like {other}. This family is not supported; {_names()} adapters are. {seen}")
    near = _nearest(file)
    if near is not None:
        raise _strangeness(near, file)
    known = other_file(state)
    if known is not None:
        what, advice = known
        raise UnknownFormatError(f"looks like {what}. {advice}. {seen}")
    if has_layers:
        raise UnknownFormatError(
            f"has ip_adapter layers, but its image_proj group is missing or of no known family. {seen} "
            "Export both groups, or choose another file."
        )
    raise UnknownFormatError(f"is not an IP-Adapter file. {seen} Choose e.g. ip-adapter-plus_sd15.safetensors.")


def _nearest(file: TensorFile) -> Format | None:
    """The format to which most of the projector's keys belong, if its own is among them or more than half of them do."""
    likeness = {format: format.likeness(file.tensors) for format in FORMATS if format.may_be(file)}
    most = max((count for count, _ in likeness.values()), default=0)
    near = _foremost(format for format, (count, _) in likeness.items() if count == most)
    resembling = next((format for format in near if format.resembles(file.tensors)), None)
    return resembling or next((format for format in near if 2 * most > max(1, likeness[format][1])), None)


def _strangeness(near: Format, file: TensorFile) -> AdapterError:
    """Why a file is none of the format that it resembles."""
    foreign, told = near.foreign_keys(file.tensors), near.variant(file)
    if told is not None:
        return UnknownFormatError(
            f"resembles the family {near.name} but has {told}, which no published file has: this pack does not read it."
        )
    if foreign:
        return UnknownFormatError(
            f"resembles the family {near.name} but has keys that such a file has not: {few(foreign)}. "
            "It may be of a newer family, which an update of this pack may read."
        )
    return CorruptFileError(
        f"resembles the family {near.name}, but the tensor '{near.keys.projector}{near.anchor}' is missing: the file is incomplete; "
        "download or export it again."
    )


def _seen(state: StateDict) -> str:
    if not state:
        return "It holds no tensors."
    projectors = tuple(filter(None, {format.keys.projector for format in FORMATS}))
    listed = sorted(state, key=lambda key: (not key.startswith(projectors), key))
    return f"It holds: {few((f'{key[:60]} {list(state[key].shape)}' for key in listed), limit=6)}."


def _with_hints(spec: AdapterSpec, metadata: Mapping[str, str]) -> AdapterSpec:
    """Fill in from metadata what shapes cannot tell; what they do tell stands."""
    encoder = one_line(metadata.get("encoder", ""))
    if spec.encoder == "custom" and encoder and not _contradicts(encoder, spec):
        spec = replace(spec, encoder=encoder)
    base_model = one_line(metadata.get("base_model", ""))
    if spec.base_model.startswith("custom ") and base_model and base_model not in TOLD_BY_SHAPES:
        spec = replace(spec, base_model=base_model)
    for known in get_args(TrainedUnconditional):
        if known == metadata.get("unconditional"):
            spec = replace(spec, unconditional=known)
    tokens = metadata.get("num_tokens", "")
    if spec.num_tokens == 0 and tokens.isascii() and tokens.isdigit() and 0 < len(tokens) < 6:
        spec = replace(spec, num_tokens=int(tokens))
    return spec


def as_version(adapter: AdapterWeights, version: int) -> AdapterWeights:
    """A FaceID Plus adapter read as version 1 or 2, against what its name says (others as they are); tensors are shared."""
    spec = adapter.spec.format.as_version(adapter.spec, version)
    if spec == adapter.spec:
        return adapter
    module = empty_module(spec, BARE)
    module.load_state_dict(adapter.module.state_dict(), assign=True)
    return replace(adapter, spec=spec, module=module.requires_grad_(False).eval())


def _contradicts(encoder: str, spec: AdapterSpec) -> bool:
    known, encoded = ENCODERS.get(encoder), spec.format.feature.encoded
    return known is not None and encoded is not None and known.width(encoded) != spec.feature_dim


def _as_metadata(spec: AdapterSpec) -> dict[str, str]:
    return {
        "family": spec.family,
        "base_model": spec.base_model,
        "encoder": spec.encoder,
        "num_tokens": str(spec.num_tokens),
        "token_dim": str(spec.token_dim),
        "feature": spec.feature,
        "feature_dim": str(spec.feature_dim),
        "unconditional": spec.unconditional,
        **spec.format.metadata(spec),
    }


def _wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    if a == b:
        return a
    if a.itemsize == 1 or b.itemsize == 1:  # float8 has no promotion rule
        return max(a, b, key=lambda dtype: dtype.itemsize) if a.itemsize != b.itemsize else torch.float16
    return torch.promote_types(a, b)


@contextmanager
def _named(file: TensorFile, format: Format | None = None) -> Generator[None]:
    """Say in errors which file it is about, and what that file is, where it is known."""
    try:
        yield
    except AdapterError as error:
        what = "" if format is None else f" ({format.name} adapter)"
        raise type(error)(f"{file.name}{what}: {error}") from error
