"""Files of weights, opened safely: raw bytes in, flat `{key: tensor}` out, whatever the container.

What a file is decides its first bytes, not its extension. Nothing here knows what an adapter is.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CorruptFileError, InvalidInputError, UnsafeFileError

StateDict = Mapping[str, Tensor]
Source = str | os.PathLike[str] | Mapping[str, object]

MAX_DEPTH = 8
MAX_ENTRIES = 200_000
"""Levels and entries of nested dictionaries: a pickle of a kilobyte can hold a cycle, or a tree of 10^14 leaves."""

MAX_SHARING = 4
"""How many times over a pickle's tensors may show the bytes of its file."""

MAX_HEADER_BYTES = 100_000_000
"""The safetensors specification's own limit."""

# https://github.com/huggingface/safetensors, README "Format"
SAFETENSORS_DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}

NOT_WEIGHTS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a git-lfs pointer of some hundred bytes that stands for the real file",
        "run `git lfs pull` in its folder, or download the file itself",
    ),
    (b"<!doctype", "a web page", "the download ended at a page (a log-in or an error): open the link in a browser"),
    (b"<html", "a web page", "the download ended at a page (a log-in or an error): open the link in a browser"),
    (b"<?xml", "an XML text, often a download server's error", "download it again"),
    (b"{", "a JSON text (a config, or a download server's error)", "choose the file of weights beside it"),
    (b"gguf", "a GGUF file (a quantised language or diffusion model)", "choose a .safetensors or .bin adapter"),
    (b"rar!", "a RAR archive", "unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x89png", "a picture", "choose a file of weights"),
    (b"\xff\xd8\xff", "a picture", "choose a file of weights"),
)

_DAMAGED = "it is damaged or was not downloaded completely; download it again"
# What torch says: "GLOBAL os.system was not an allowed global", "unsupported GLOBAL x.y whose module"; torch 2.1:
# "Unsupported class x.y".
_REFUSED_GLOBAL = re.compile(r"(?:GLOBAL|Unsupported class)\s+([\w.]+)")


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The tensors of one file under flat keys, its text metadata, and the name to use in messages."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    name: str = "state dict"


def open_state_dict(source: Source, *, name: str | None = None) -> TensorFile:
    """Open a file of weights, or take a mapping, as flat keys: `{"image_proj": {"x": t}}` becomes `image_proj.x`.

    `.safetensors`, `.sft`, `.bin`, `.pt`, `.pth`, `.ckpt`; the content decides, not the extension. Tensors are mapped
    from the file where its format allows, on the CPU, in the file's dtype. Values that are not tensors are left out.
    Pickles are read with `weights_only=True`.

    Raises FileNotFoundError; InvalidInputError for a folder; UnsafeFileError for a pickle that carries code;
    CorruptFileError for anything that is not a readable file of tensors.
    """
    return _open(source, name, shapes_only=False)


def describe_state_dict(source: Source, *, name: str | None = None) -> TensorFile:
    """Like `open_state_dict`, with every tensor on the meta device: keys, shapes and dtypes, no numbers.

    Of a safetensors file only the header is read. Raises the same errors.
    """
    return _open(source, name, shapes_only=True)


def open_tensors(source: str | os.PathLike[str]) -> list[tuple[Tensor, bool]]:
    """The tensors of a pickle that holds one, or a list of some (each with True): what `.ipadpt` files are.

    Raises what `open_state_dict` raises.
    """
    path = Path(source)
    name = path.name
    head = _first_bytes(path)
    if head[:4] == b"PK\x03\x04":
        _check_zip(path, name, path.stat().st_size)
        content = _load_pickle(path, name, mmap=False)
    elif head[:1] == b"\x80":
        _check_tar(path, name)
        content = _load_pickle(path, name, mmap=False)
    else:
        raise CorruptFileError(_not_weights(head, path.stat().st_size, name))
    if isinstance(content, Tensor):
        return [(_plain("embeds", content, name), False)]
    items = cast("list[object]", content) if isinstance(content, (list, tuple)) else []
    tensors = [(_plain("embeds", item, name), True) for item in items if isinstance(item, Tensor)]
    if not tensors or len(tensors) != len(items):
        raise CorruptFileError(f"{name} holds a {type(content).__name__}; a tensor, or a list of them, was expected.")
    return tensors


def _open(source: Source, name: str | None, *, shapes_only: bool) -> TensorFile:
    if isinstance(source, Mapping):
        name = name or "state dict"
        file = TensorFile(_flatten(source, name), _text_metadata(source), name)
        return TensorFile(_without_numbers(file.tensors), file.metadata, name) if shapes_only else file
    path = Path(source)
    name = name or path.name
    head = _first_bytes(path)
    size = path.stat().st_size
    if head[:4] == b"PK\x03\x04":
        tensors, metadata = _read_zip_pickle(path, name, size), dict[str, str]()
    elif _claims_safetensors(head, size):
        header, metadata = _read_header(path, name, size)
        if shapes_only:
            return TensorFile(header, metadata, name)
        tensors = _read_safetensors(path, name)
    elif head[:1] == b"\x80":
        tensors, metadata = _read_legacy_pickle(path, name), dict[str, str]()
    else:
        raise CorruptFileError(_not_weights(head, size, name))
    return TensorFile(_without_numbers(tensors) if shapes_only else tensors, metadata, name)


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        candidates = sorted(p.name for p in path.iterdir() if p.suffix in {".safetensors", ".bin", ".pt", ".pth"})
        inside = f"It holds {', '.join(candidates[:5])}: choose one." if candidates else "It holds no file of weights."
        raise InvalidInputError(f"{path} is a folder, a file of weights was expected. {inside}")
    if not path.exists():
        where = "its folder does not exist either" if not path.parent.is_dir() else "its folder exists"
        raise FileNotFoundError(f"{path} does not exist ({where}): check the path and the spelling.")
    if not path.is_file():
        raise InvalidInputError(f"{path} is neither a file nor a folder: choose a .safetensors or .bin file.")
    with path.open("rb") as file:
        return file.read(64)


def _not_weights(head: bytes, size: int, name: str) -> str:
    if size == 0:
        return f"{name} is empty (0 bytes): the download failed; download it again."
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, what, advice in NOT_WEIGHTS:
        if start.startswith(magic):
            return f"{name} is not a file of weights but {what}: {advice}."
    return f"{name} ({size} bytes) does not begin like a safetensors or a PyTorch file: {_DAMAGED}."


# --- safetensors -------------------------------------------------------------------------------------------------


def _claims_safetensors(head: bytes, size: int) -> bool:
    """8 bytes of header length, little endian, then JSON. A length beyond the file still counts: it is truncated."""
    length = int.from_bytes(head[:8], "little")
    return size >= 10 and head[8:9] == b"{" and 2 <= length <= MAX_HEADER_BYTES


def _read_header(path: Path, name: str, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise CorruptFileError(
                f"{name} is truncated: it has {size:,} bytes, its header alone {8 + length:,}; download it again."
            )
        raw = file.read(length)
    try:
        header: object = json.loads(raw)
    except (ValueError, RecursionError):
        raise CorruptFileError(f"{name} has an unreadable safetensors header: {_DAMAGED}.") from None
    if not isinstance(header, dict):
        raise CorruptFileError(f"{name} has a safetensors header that is not a table of tensors: {_DAMAGED}.")
    entries = cast("dict[str, object]", header)
    texts = entries.pop("__metadata__", None)
    metadata = _strings(cast("Mapping[object, object]", texts)) if isinstance(texts, dict) else {}
    tensors: dict[str, Tensor] = {}
    end_of_data = 0
    for key, entry in entries.items():
        tensors[key], end = _meta_tensor(key, entry, name)
        end_of_data = max(end_of_data, end)
    expected = 8 + length + end_of_data
    if size < expected:
        raise CorruptFileError(f"{name} is truncated: {size:,} of {expected:,} bytes are there; download it again.")
    if size > expected:
        raise CorruptFileError(f"{name} has {size - expected:,} bytes more than its header describes: {_DAMAGED}.")
    return tensors, metadata


def _meta_tensor(key: str, entry: object, name: str) -> tuple[Tensor, int]:
    """One header entry as a meta tensor, and where its bytes end."""
    table = cast("dict[str, object]", entry) if isinstance(entry, dict) else {}
    shape, offsets = _naturals(table.get("shape")), _naturals(table.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise CorruptFileError(f"{name}: the header entry of '{key}' has no valid shape and place: {_DAMAGED}.")
    dtype_name = str(table.get("dtype"))
    dtype: object = getattr(torch, SAFETENSORS_DTYPES.get(dtype_name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise CorruptFileError(
            f"{name}: '{key}' is stored as {dtype_name!r}, which this PyTorch cannot read; "
            "use a file in float16, bfloat16 or float32."
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CorruptFileError(f"{name}: '{key}' has another size in bytes than its shape {list(shape)}: {_DAMAGED}.")
    try:
        return torch.empty(shape, dtype=dtype, device="meta"), end
    except (RuntimeError, OverflowError, TypeError):  # 0 × 2^62: no bytes, and yet no tensor
        raise CorruptFileError(f"{name}: '{key}' has the impossible shape {list(shape)}: {_DAMAGED}.") from None


def _naturals(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    naturals = tuple(item for item in items if type(item) is int and item >= 0)
    return naturals if len(naturals) == len(items) <= 16 else None


def _read_safetensors(path: Path, name: str) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            reader = cast(Any, file)
            return {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, RuntimeError, ValueError, TypeError, OverflowError, KeyError, AttributeError) as error:
        raise CorruptFileError(f"{name} cannot be read as safetensors ({_one_line(error)}): {_DAMAGED}.") from error


# --- pickles -----------------------------------------------------------------------------------------------------


def _read_zip_pickle(path: Path, name: str, size: int) -> dict[str, Tensor]:
    _check_zip(path, name, size)
    return _unpickle(path, name, mmap=True)


def _check_zip(path: Path, name: str, size: int) -> None:
    """Raise for a zip that is no plain PyTorch file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError, RuntimeError) as error:
        raise CorruptFileError(f"{name} cannot be read as a PyTorch file ({_one_line(error)}): {_DAMAGED}.") from error
    if not any(member.filename.endswith("data.pkl") for member in members):
        names = ", ".join(member.filename for member in members[:3])
        raise CorruptFileError(f"{name} is a zip archive without PyTorch weights (it holds {names}): unpack it first.")
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise UnsafeFileError(
            f"{name} is a TorchScript program, not a file of weights. Nothing was run. Use a .safetensors version."
        )
    # torch.save stores, never compresses. A compressed member can grow to any size when read.
    if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > size for member in members):
        raise CorruptFileError(f"{name} was compressed again after it was saved: save it anew with torch.save.")


def _read_legacy_pickle(path: Path, name: str) -> dict[str, Tensor]:
    _check_tar(path, name)
    return _unpickle(path, name, mmap=False)


def _check_tar(path: Path, name: str) -> None:
    try:
        # Before 2.6, torch's reader of its oldest format, a tar, ran code even with weights_only (CVE-2025-32434).
        is_tar = tarfile.is_tarfile(path)
    except Exception:
        is_tar = True
    if is_tar:
        raise UnsafeFileError(
            f"{name} is a tar archive in PyTorch's format of before 2017, which cannot be opened without running what "
            "is in it. Nothing was run; use a .safetensors version of the file."
        )


def _load_pickle(path: Path, name: str, *, mmap: bool) -> object:
    try:
        if mmap and path.suffix.lower() != ".safetensors":
            return cast(object, torch.load(str(path), map_location="cpu", weights_only=True, mmap=True))
        # by path, newer torch hands a pickle named .safetensors to the safetensors reader
        with path.open("rb") as file:
            return cast(object, torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged pickle fails in any way there is
        raise _unpickling_error(error, path, name) from None


def _unpickle(path: Path, name: str, *, mmap: bool) -> dict[str, Tensor]:
    content = _load_pickle(path, name, mmap=mmap)
    if isinstance(content, Tensor):
        raise CorruptFileError(f"{name} holds one single tensor, a table of named weights was expected.")
    if not isinstance(content, Mapping):
        raise CorruptFileError(f"{name} holds a {type(content).__name__}, a table of named weights was expected.")
    tensors = _flatten(cast("Mapping[object, object]", content), name)
    declared, size = sum(t.numel() * t.element_size() for t in tensors.values()), path.stat().st_size
    # Views may share numbers (tied weights), but a view repeated without end would keep any reader busy for ever.
    if declared > MAX_SHARING * size:
        raise CorruptFileError(f"{name} declares {declared:,} bytes of weights and has {size:,}: {_DAMAGED}.")
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CorruptFileError(f"{name} holds shapes without numbers (meta tensors): it must be saved anew.")
    return tensors


def _unpickling_error(error: Exception, path: Path, name: str) -> UnsafeFileError | CorruptFileError:
    refused = _REFUSED_GLOBAL.search(str(error)) if isinstance(error, (pickle.UnpicklingError, RuntimeError)) else None
    called = refused[1] if refused is not None else _foreign_global(path)
    if called is not None:
        return UnsafeFileError(
            f"{name} carries code: opening it would call '{called}', which a file of weights never needs. Nothing "
            "was run. Use a .safetensors version, or have its author save plain tensors."
        )
    return CorruptFileError(f"{name} cannot be read as a PyTorch file ({_one_line(error)}): {_DAMAGED}.")


def _foreign_global(path: Path) -> str | None:
    """What a bare pickle would import that is not torch's own: torch refuses its protocols 4 and 5 before it looks."""
    strings: list[str] = []
    with path.open("rb") as file:
        if file.read(1) != b"\x80":
            return None
        file.seek(0)
        try:
            for opcode, argument, _ in pickletools.genops(file):  # parses, runs nothing
                if isinstance(argument, str) and "UNICODE" in opcode.name:
                    strings.append(argument)
                named = str(argument).split() if opcode.name in {"GLOBAL", "INST"} else strings[-2:]
                if opcode.name in {"GLOBAL", "INST", "STACK_GLOBAL"} and named[0] not in {
                    "torch",
                    "torch._utils",
                    "collections",
                }:
                    return ".".join(named)
        except Exception:  # a damaged pickle fails in any way there is
            return None
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]


# --- mappings ----------------------------------------------------------------------------------------------------


def _flatten(mapping: Mapping[Any, object], name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for visited, (key, value) in enumerate(_leaves(mapping, "", 0, name)):
        if visited >= MAX_ENTRIES:
            raise CorruptFileError(f"{name} has over {MAX_ENTRIES:,} entries, far more than any model: {_DAMAGED}.")
        if isinstance(value, Tensor):
            tensors[key] = _plain(key, value, name)
    return tensors


def _leaves(mapping: Mapping[Any, object], prefix: str, depth: int, name: str) -> Iterator[tuple[str, object]]:
    if depth > MAX_DEPTH:
        raise CorruptFileError(f"{name} is nested more than {MAX_DEPTH} levels deep: it is not a table of weights.")
    for key, value in mapping.items():
        if not isinstance(key, (str, int)):
            yield "", None  # counted, so that a tree of such keys cannot go on for ever
        elif isinstance(value, Mapping):
            yield "", None
            yield from _leaves(cast("Mapping[Any, object]", value), f"{prefix}{key}.", depth + 1, name)
        else:
            yield f"{prefix}{key}", value


def _plain(key: str, tensor: Tensor, name: str) -> Tensor:
    """The tensor itself, without gradient."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        raise CorruptFileError(f"{name}: '{key}' is a sparse, nested or quantised tensor, plain weights were expected.")
    return tensor.detach()


def _without_numbers(tensors: StateDict) -> dict[str, Tensor]:
    return {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items()}


def _text_metadata(mapping: Mapping[str, object]) -> dict[str, str]:
    texts = mapping.get("__metadata__")
    return _strings(cast("Mapping[object, object]", texts)) if isinstance(texts, Mapping) else {}


def _strings(mapping: Mapping[object, object]) -> dict[str, str]:
    return {key: value for key, value in mapping.items() if isinstance(key, str) and isinstance(value, str)}
