"""Files of weights, opened safely: raw bytes in, flat ``{key: tensor}`` out, whatever the container.

The first bytes of a file decide how it is read, not its extension. Nothing here knows what an adapter is.

Tensors are read into memory of their own. A mapped file would cost as much once its weights are used, and whoever truncates it
meanwhile (a download that starts again, a trainer that writes) kills the whole process.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from ..errors import CorruptFileError, InvalidInputError, UnsafeFileError, one_line, quoted
from ..narrowing import is_list, is_mapping, is_row, is_table
from .pickles import DAMAGED, NoTensor, Pickled, Place, StoredView, read_legacy, read_zip
from .text import as_table, regular_file

StateDict = Mapping[str, Tensor]
Source = str | os.PathLike[str] | Mapping[str, object]

MAX_DEPTH = 8
MAX_ENTRIES = 50_000
"""Most levels and entries of tables: a pickle of a kilobyte can hold a cycle, or a tree of 10^14 leaves. Full checkpoints with their
averages have five thousand entries; to look at fifty thousand takes a second."""

LONGEST_KEY = 1000
"""Most characters in the name of a tensor."""

MAX_SHARING = 4
"""The tensors of a pickle are views and may overlap: together they may have so many times the bytes of their file."""

MAX_HEADER_BYTES = 32 * 2**20
"""Most bytes of the JSON in a safetensors file. The specification allows 100 MB; read by Python they could become gigabytes, and those of the
largest models with all their training metadata have one."""

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


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The tensors of one file under flat keys, its text metadata, and the name to use in messages (one line)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    name: str = "state dict"


def open_state_dict(source: Source, *, name: str | None = None) -> TensorFile:
    """Open a file of weights, or take a mapping, as flat keys: ``{"image_proj": {"x": t}}`` becomes ``image_proj.x``.

    ``.safetensors``, ``.sft``, ``.bin``, ``.pt``, ``.pth``, ``.ckpt``; the content decides, not the extension. Tensors are read into
    memory, on the CPU, in the file's dtype; a mapping's are taken as they are. Values that are not tensors are left out.
    Pickles are read as data, see pickles.py.

    Raises FileNotFoundError; InvalidInputError for what is no plain file; UnsafeFileError for a pickle that carries code;
    CorruptFileError for anything that is not a readable file of tensors.
    """
    return _open(source, name, _in_memory)


def describe_state_dict(source: Source, *, name: str | None = None) -> TensorFile:
    """Like ``open_state_dict``, with every tensor on the meta device: keys, shapes and dtypes, no numbers.

    Of a file only the header is read, or the pickle without its tensors. Raises the same errors.
    """
    return _open(source, name, _on_meta)


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like safetensors. Raises FileNotFoundError; InvalidInputError for what is no plain file."""
    with _opened(Path(path)) as file:
        return file.read(9)[8:9] == b"{"


class StoredTensors:
    """A file of weights, or a mapping, whose tensors are read one at a time: for models that should not lie in memory whole.

    ``described`` is what ``describe_state_dict`` gives. Raises what ``open_state_dict`` raises, ``read`` CorruptFileError.
    """

    def __init__(self, source: Source, *, name: str | None = None) -> None:
        self._source = source
        self._before = None if isinstance(source, Mapping) else _stamp(Path(source))
        self._stored: dict[str, _Stored] = {}

        def remember(file: BinaryIO, stored: Mapping[str, _Stored], name: str) -> dict[str, Tensor]:
            self._stored.update(stored)
            return _on_meta(file, stored, name)

        self.described = _open(source, name, remember)

    def read(self, key: str) -> Tensor:
        return self.read_some((key,))[key]

    def read_some(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors, the file opened once."""
        if isinstance(self._source, Mapping):
            return {key: self.described.tensors[key] for key in keys}
        with _opened(Path(self._source)) as file:
            if _stamp(Path(self._source)) != self._before:
                raise CorruptFileError(f"{self.described.name} was changed while it was read: load it again.")
            return _in_memory(file, {key: self._stored[key] for key in keys}, self.described.name)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except (OSError, ValueError):  # _opened says it better
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def open_tensors(source: str | os.PathLike[str]) -> list[tuple[Tensor, bool]]:
    """The tensors of a pickle that holds one, or a list of some (each with True): what ``.ipadpt`` files are.

    Raises what ``open_state_dict`` raises.
    """
    path = Path(source)
    name = one_line(path.name, LONGEST_NAME)
    with _opened(path) as file:
        size = path.stat().st_size
        head = file.read(_HEAD)
        pickled = _read_pickled(file, head, size, name)
        if pickled is None:
            raise CorruptFileError(_not_weights(head, size, name))
        content = pickled.content
        items = content if is_row(content) else [content]
        views = [item for item in items if isinstance(item, (StoredView, NoTensor))]
        if not views or len(views) != len(items) or len(views) > MAX_ENTRIES:
            raise CorruptFileError(
                f"{name} holds a {_kind(pickled.content)}; a tensor, or a list of them, was expected."
            )
        keyed = {f"embeds {number}": _whole(f"embeds {number}", view, name) for number, view in enumerate(views)}
        tensors = _in_memory(file, _placed(keyed, pickled, size, name), name)
    return [(tensor, content is not items[0]) for tensor in tensors.values()]


_HEAD = 64
LONGEST_NAME = 200
"""Characters of a file's name in messages; a family may be told by its end (FaceID Plus v2)."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """The place of a tensor's numbers in a file, and the type, shape and stride in which it shows them."""

    place: Place
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    offset: int = 0


_Load = Callable[[BinaryIO, Mapping[str, _Stored], str], dict[str, Tensor]]


def _open(source: Source, name: str | None, load: _Load) -> TensorFile:
    if isinstance(source, Mapping):
        name = one_line(name or "state dict", LONGEST_NAME)
        tensors = {key: _plain(key, value, name) for key, value in _leaves(source, name) if isinstance(value, Tensor)}
        return TensorFile(_without_numbers(tensors) if load is _on_meta else tensors, _text_metadata(source), name)
    path = Path(source)
    name = one_line(name or path.name, LONGEST_NAME)
    with _opened(path) as file:
        size = path.stat().st_size
        head = file.read(_HEAD)
        metadata: dict[str, str] = {}
        pickled = _read_pickled(file, head, size, name)
        if pickled is not None:
            stored = _pickled_tensors(pickled, size, name)
        elif _claims_safetensors(head, size):
            stored, metadata = _read_header(file, head, name, size)
        else:
            raise CorruptFileError(_not_weights(head, size, name))
        return TensorFile(load(file, stored, name), metadata, name)


def _opened(path: Path) -> BinaryIO:
    try:
        return regular_file(path).open("rb")
    except FileNotFoundError:
        where = "its folder does not exist either" if not path.parent.is_dir() else "its folder exists"
        raise FileNotFoundError(
            f"{one_line(path, LONGEST_NAME)} does not exist ({where}): check the path and the spelling."
        ) from None
    except InvalidInputError:
        if not os.path.isdir(path):
            raise
        names = sorted(one_line(p.name) for p in path.iterdir() if p.suffix in {".safetensors", ".bin", ".pt", ".pth"})
        inside = f"It holds {', '.join(names[:5])}: choose one." if names else "It holds no file of weights."
        raise InvalidInputError(f"{quoted(path)} is a folder, a file of weights was expected. {inside}") from None
    except OSError as error:
        raise InvalidInputError(f"{quoted(path)} cannot be read ({error.strerror}): mend its permissions") from error


def _read_pickled(file: BinaryIO, head: bytes, size: int, name: str) -> Pickled | None:
    """What a pickle holds; None if the file is none."""
    if head[:4] == b"PK\x03\x04":
        return read_zip(file, name, size)
    if _claims_safetensors(head, size):
        return None
    file.seek(0)
    if file.read(262)[257:] == b"ustar":
        raise UnsafeFileError(
            f"{name} is a tar archive in PyTorch's format of before 2017, which cannot be opened without running what "
            "is in it. Nothing was run; use a .safetensors version of the file."
        )
    return read_legacy(file, name, size) if head[:1] == b"\x80" else None


def _not_weights(head: bytes, size: int, name: str) -> str:
    if size == 0:
        return f"{name} is empty (0 bytes): the download failed; download it again."
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, what, advice in NOT_WEIGHTS:
        if start.startswith(magic):
            return f"{name} is not a file of weights but {what}: {advice}."
    return f"{name} ({size} bytes) does not begin like a safetensors or a PyTorch file: {DAMAGED}."


# --- safetensors -------------------------------------------------------------------------------------------------


def _claims_safetensors(head: bytes, size: int) -> bool:
    """8 bytes of header length, little endian, then JSON. A length beyond the file still counts: it is truncated."""
    length = int.from_bytes(head[:8], "little")
    return size >= 10 and head[8:9] == b"{" and 2 <= length <= 2**47


def _read_header(file: BinaryIO, head: bytes, name: str, size: int) -> tuple[dict[str, _Stored], dict[str, str]]:
    """Where every tensor lies, and the metadata. Tensors fill the file without gap or overlap, as the format demands."""
    length = int.from_bytes(head[:8], "little")
    if 8 + length > size:
        raise CorruptFileError(
            f"{name} is truncated: it has {size:,} bytes, its header alone {8 + length:,}; download it again."
        )
    if length > MAX_HEADER_BYTES:
        raise CorruptFileError(f"{name} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read.")
    try:
        header: object = json.loads(
            head[8 : 8 + length] + file.read(max(0, 8 + length - len(head))), object_pairs_hook=_Objects()
        )
    except (ValueError, RecursionError):
        raise CorruptFileError(f"{name} has an unreadable safetensors header: {DAMAGED}.") from None
    if not is_table(header):
        raise CorruptFileError(f"{name} has a safetensors header that is not a table of tensors: {DAMAGED}.")
    texts = header.pop("__metadata__", None)
    metadata = _strings(texts) if is_mapping(texts) else {}
    stored = {_checked_key(key, name): _stored(key, entry, name) for key, entry in header.items()}
    at = 0
    for key, tensor in sorted(stored.items(), key=lambda item: (item[1].place.begin, item[1].place.count)):
        if tensor.place.begin != at:
            raise CorruptFileError(f"{name}: {quoted(key)} does not begin where another tensor ends: {DAMAGED}.")
        at += tensor.place.count
    expected = 8 + length + at
    if size < expected:
        raise CorruptFileError(f"{name} is truncated: {size:,} of {expected:,} bytes are there; download it again.")
    if size > expected:
        raise CorruptFileError(f"{name} has {size - expected:,} bytes more than its header describes: {DAMAGED}.")
    return {key: _moved(tensor, 8 + length) for key, tensor in stored.items()}, metadata


class _Objects:
    """Makes the tables of a header, and refuses a key that is there twice (which one counts?) and more than any file has."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        self.count += 1
        table = dict(pairs)
        if self.count > MAX_ENTRIES or len(table) < len(pairs):
            raise ValueError("too many entries, or two of one name")
        return table


def _moved(tensor: _Stored, by: int) -> _Stored:
    return _Stored(Place(tensor.place.begin + by, tensor.place.count), tensor.dtype, tensor.shape)


def _stored(key: str, entry: object, name: str) -> _Stored:
    """One header entry: where its bytes lie behind the header."""
    table = as_table(entry)
    shape, offsets = _naturals(table.get("shape")), _naturals(table.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise CorruptFileError(f"{name}: the header entry of {quoted(key)} has no valid shape and place: {DAMAGED}.")
    dtype_name = table.get("dtype")
    dtype: object = (
        getattr(torch, SAFETENSORS_DTYPES.get(dtype_name, ""), None) if isinstance(dtype_name, str) else None
    )
    if not isinstance(dtype, torch.dtype):
        raise CorruptFileError(
            f"{name}: {quoted(key)} is stored as {quoted(dtype_name) if isinstance(dtype_name, str) else 'something'}, which "
            "this PyTorch cannot read; use a file in float16, bfloat16 or float32."
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CorruptFileError(
            f"{name}: {quoted(key)} has another size in bytes than its shape {one_line(list(shape))}: {DAMAGED}."
        )
    if max((*shape, 0)) >= 2**62 or math.prod(n for n in shape if n) >= 2**62:  # 0 × 2^62: no bytes, and yet no tensor
        raise CorruptFileError(f"{name}: {quoted(key)} has the impossible shape {one_line(list(shape))}: {DAMAGED}.")
    return _Stored(Place(begin, end - begin), dtype, shape)


def _naturals(value: object) -> tuple[int, ...] | None:
    if not is_list(value):
        return None
    naturals = tuple(item for item in value[:17] if type(item) is int and item >= 0)
    return naturals if len(naturals) == len(value) <= 16 else None


# --- pickles -----------------------------------------------------------------------------------------------------


def _pickled_tensors(pickled: Pickled, size: int, name: str) -> dict[str, _Stored]:
    content = pickled.content
    if isinstance(content, (StoredView, NoTensor)):
        raise CorruptFileError(f"{name} holds one single tensor, a table of named weights was expected.")
    if not is_mapping(content):
        raise CorruptFileError(f"{name} holds a {_kind(content)}, a table of named weights was expected.")
    leaves = _leaves(content, name)
    views = {key: _whole(key, leaf, name) for key, leaf in leaves if isinstance(leaf, (StoredView, NoTensor))}
    return _placed(views, pickled, size, name)


def _kind(content: object) -> str:
    name = type(content).__name__
    return name if isinstance(content, (list, tuple, dict, str, int, float)) else "single object"


def _whole(key: str, view: StoredView | NoTensor, name: str) -> StoredView:
    if isinstance(view, NoTensor):
        raise CorruptFileError(f"{name}: {quoted(key)} {view.why}; it must be saved anew.")
    return view


def _placed(views: Mapping[str, StoredView], pickled: Pickled, size: int, name: str) -> dict[str, _Stored]:
    declared = sum(view.bytes_shown for view in views.values())
    # Views may share numbers (tied weights), but a view repeated without end would keep any reader busy for ever.
    if declared > MAX_SHARING * size:
        raise CorruptFileError(f"{name} declares {declared:,} bytes of weights and has {size:,}: {DAMAGED}.")
    return {
        key: _Stored(pickled.places[view.storage.key], view.dtype, view.shape, view.stride, view.offset)
        for key, view in views.items()
    }


# --- numbers -----------------------------------------------------------------------------------------------------


def _in_memory(file: BinaryIO, stored: Mapping[str, _Stored], name: str) -> dict[str, Tensor]:
    """Every tensor, read from the file; those that share bytes there share them here."""
    read: dict[Place, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        place = tensor.place
        data = read.get(place)
        if data is None:
            data = read[place] = _bytes_at(file, place, name)
        count = place.count // tensor.dtype.itemsize
        numbers = (
            data[: count * tensor.dtype.itemsize].view(tensor.dtype) if count else torch.empty(0, dtype=tensor.dtype)
        )
        if tensor.stride is None:
            tensors[key] = numbers.view(tensor.shape)
        else:
            tensors[key] = numbers.as_strided(tensor.shape, tensor.stride, tensor.offset)
    return tensors


def _on_meta(file: BinaryIO, stored: Mapping[str, _Stored], name: str) -> dict[str, Tensor]:
    return {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in stored.items()}


def _bytes_at(file: BinaryIO, place: Place, name: str) -> Tensor:
    if not place.count:
        return torch.empty(0, dtype=torch.uint8)
    memory = bytearray(place.count)
    rest = memoryview(memory)
    file.seek(place.begin)
    while len(rest):
        count = cast(Any, file).readinto(rest)
        if not count:
            raise CorruptFileError(
                f"{name} became shorter while it was read: wait until it is whole, then load it again."
            )
        rest = rest[count:]
    return torch.frombuffer(memory, dtype=torch.uint8)


# --- mappings ----------------------------------------------------------------------------------------------------


def _leaves(mapping: Mapping[Any, object], name: str) -> Iterator[tuple[str, object]]:
    """The values of nested tables under flat keys. Entries whose key is neither a text nor a number are left out."""
    for visited, (key, value) in enumerate(_nodes(mapping, "", 0, name)):
        if visited >= MAX_ENTRIES:
            raise CorruptFileError(f"{name} has over {MAX_ENTRIES:,} entries, far more than any model: {DAMAGED}.")
        if isinstance(value, (Tensor, StoredView, NoTensor)):
            yield _checked_key(key, name), value


def _nodes(mapping: Mapping[Any, object], prefix: str, depth: int, name: str) -> Iterator[tuple[str, object]]:
    if depth > MAX_DEPTH:
        raise CorruptFileError(f"{name} is nested more than {MAX_DEPTH} levels deep: it is not a table of weights.")
    for key, value in mapping.items():
        if not isinstance(key, (str, int)):
            yield "", None  # counted, so that a tree of such keys cannot go on for ever
        elif is_mapping(value):
            yield "", None
            yield from _nodes(value, f"{prefix}{key}.", depth + 1, name)
        else:
            yield f"{prefix}{key}", value


def _checked_key(key: str, name: str) -> str:
    """The name of a tensor, if it is one line of text: it is shown in messages, reports and logs, and written into files."""
    if len(key) > LONGEST_KEY or (not (key.isascii() and key.isprintable()) and any(map(_breaks_text, key))):
        raise CorruptFileError(f"{name} holds a tensor whose name is no line of text, {quoted(key)}: {DAMAGED}.")
    return key


def _breaks_text(character: str) -> bool:
    """Control characters, line ends and halves of surrogate pairs."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _plain(key: str, tensor: Tensor, name: str) -> Tensor:
    """The tensor itself, without gradient."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        raise CorruptFileError(
            f"{name}: {quoted(key)} is a sparse, nested or quantised tensor, plain weights were expected."
        )
    return tensor.detach()


def _without_numbers(tensors: StateDict) -> dict[str, Tensor]:
    return {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items()}


def _text_metadata(mapping: Mapping[str, object]) -> dict[str, str]:
    texts = mapping.get("__metadata__")
    return _strings(texts) if is_mapping(texts) else {}


def _strings(mapping: Mapping[object, object]) -> dict[str, str]:
    return {
        _text(key): _text(value) for key, value in mapping.items() if isinstance(key, str) and isinstance(value, str)
    }


def _text(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can write and no file of ours could."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
