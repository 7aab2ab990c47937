"""What ``torch.save`` writes, read as data: a pickle is a program, and this reader knows only the few words that tensors need.

Nothing is imported and nothing is called, whatever a file says: every name it uses stands for one of the functions below, or the
file is refused. The result holds dictionaries, lists, numbers, texts and ``StoredView``, which says where in the file a tensor
lies; its bytes are read by state_dict.py. Memory and time follow the bytes of the file, not the numbers in it.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeGuard, cast

import torch

from ..errors import AdapterError, CorruptFileError, UnsafeFileError, one_line, quoted, reason
from ..narrowing import is_list, is_row

MAX_PICKLE_BYTES = 64 * 2**20
"""Most bytes of a pickle without its tensors. The pickle of a full checkpoint has under a megabyte."""

MAX_OPCODES = 500_000
"""Most steps of a pickle. A tensor takes about thirty."""

MAX_DIRECTORY_BYTES = 8 * 2**20
"""Most bytes of a zip archive's list of members. A member takes about a hundred."""

DAMAGED = "it is damaged or was not downloaded completely; download it again"
MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization, before every pickle of the format of before 1.6

_TYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    # of quantised tensors, which are named and refused
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
}


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file: where they begin and how many they are."""

    begin: int
    count: int


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers that tensors of a pickle are views of: their name in the file, their type, how many there are."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, slots=True)
class StoredView:
    """A tensor as a pickle describes it; offset and stride count numbers."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def bytes_shown(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class NoTensor:
    """A tensor that a file of weights cannot hold, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class Pickled:
    """The content of a file, and where the storages lie that it names."""

    content: object
    places: dict[str, Place]


def read_zip(file: BinaryIO, name: str, size: int) -> Pickled:
    """What a zip of ``torch.save`` holds. Raises UnsafeFileError, CorruptFileError."""
    try:
        with zipfile.ZipFile(_Sparing(file)) as archive:
            members = archive.infolist()
    except AdapterError as error:
        raise CorruptFileError(f"{name} {error}") from None
    except Exception as error:  # zipfile lets through what struct, codecs and seek() raise
        raise CorruptFileError(f"{name} cannot be read as a PyTorch file ({reason(error)}): {DAMAGED}.") from error
    pickles = [member for member in members if member.filename.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        names = ", ".join(one_line(member.filename) for member in members[:3])
        raise CorruptFileError(f"{name} is a zip archive without PyTorch weights (it holds {names}): unpack it first.")
    prefix = pickles[0].filename.removesuffix("data.pkl")
    named = {member.filename: member for member in members}
    if f"{prefix}constants.pkl" in named:
        raise UnsafeFileError(
            f"{name} is a TorchScript program, not a file of weights. Nothing was run. Use a .safetensors version."
        )
    # torch.save stores, never compresses. A compressed member can grow to any size when read.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CorruptFileError(f"{name} was compressed again after it was saved: save it anew with torch.save.")
    if len(named) < len(members) or sum(member.file_size for member in members) > size:
        raise CorruptFileError(f"{name} says that it holds more than its {size:,} bytes: {DAMAGED}.")
    order = named.get(f"{prefix}byteorder")
    if order is not None and _bytes_of(file, _place(file, order, name, size), 16) != b"little":
        raise CorruptFileError(f"{name} was saved on a big-endian computer: save it anew on another.")
    pickled = _bytes_of(file, _place(file, pickles[0], name, size), MAX_PICKLE_BYTES)
    reader = _Reader(io.BytesIO(pickled), name)
    content = reader.read()
    places: dict[str, Place] = {}
    for storage in reader.storages.values():
        member = named.get(f"{prefix}data/{storage.key}")
        place = None if member is None else _place(file, member, name, size)
        if place is None or place.count != storage.count * storage.dtype.itemsize:
            raise CorruptFileError(
                f"{name} lacks numbers of its tensors (those called {quoted(storage.key)}): {DAMAGED}."
            )
        places[storage.key] = place
    return Pickled(content, places)


def read_legacy(file: BinaryIO, name: str, size: int) -> Pickled:
    """What ``torch.save`` wrote before 1.6: five pickles, then the numbers. Raises UnsafeFileError, CorruptFileError."""
    file.seek(0)
    buffer = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    if _Reader(buffer, name).read() != MAGIC:
        raise CorruptFileError(f"{name} is a pickle, but not one of torch.save: {DAMAGED}.")
    for _ in ("version", "sizes of numbers"):
        _Reader(buffer, name).read()
    reader = _Reader(buffer, name)
    content = reader.read()
    keys = _Reader(buffer, name).read()
    places: dict[str, Place] = {}
    at = buffer.tell()
    for key in keys if is_list(keys) else []:
        storage = reader.storages.get(str(key)) if isinstance(key, (str, int)) else None
        said = int.from_bytes(_bytes_of(file, Place(at, 8), 8), "little", signed=True)
        if storage is None or said != storage.count:
            raise CorruptFileError(f"{name} contradicts itself about the sizes of its tensors: {DAMAGED}.")
        places[storage.key] = Place(at + 8, said * storage.dtype.itemsize)
        at += 8 + places[storage.key].count
    if at > size or len(places) < len(reader.storages):
        raise CorruptFileError(f"{name} is truncated: {size:,} of at least {at:,} bytes are there; download it again.")
    return Pickled(content, places)


class _Sparing:
    """A file for zipfile that refuses a long list of members: zipfile reads the whole list at once, however long it claims to be."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY_BYTES:
            raise CorruptFileError(f"lists more members than any file of weights has: {DAMAGED}.")
        return self._read(count if count >= 0 else MAX_DIRECTORY_BYTES)


def _place(file: BinaryIO, member: zipfile.ZipInfo, name: str, size: int) -> Place:
    """Where a member's bytes lie. The member's own header precedes them, and only that header tells its length."""
    inside = 0 <= member.header_offset < size
    head = _bytes_of(file, Place(member.header_offset, 30), 30) if inside else b""
    begin = member.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if head[:4] != b"PK\x03\x04" or member.compress_size != member.file_size or begin + member.file_size > size:
        raise CorruptFileError(f"{name} has a member that does not lie inside it: {DAMAGED}.")
    return Place(begin, member.file_size)


def _bytes_of(file: BinaryIO, place: Place, limit: int) -> bytes:
    file.seek(place.begin)
    return file.read(min(place.count, limit))


# --- the machine -------------------------------------------------------------------------------------------------

_MARK = object()
_OPAQUE = object()
"""Stands for values that are neither tensors nor what holds them: bytes, sets, devices."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that a pickle imports."""

    name: str


class _Reader:
    """One pickle, step by step (pickletools knows the steps of all protocols)."""

    def __init__(self, file: io.BytesIO, name: str) -> None:
        self.file, self.name = file, name
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.storages: dict[str, Storage] = {}

    def read(self) -> object:
        """The value. Raises UnsafeFileError, CorruptFileError."""
        try:
            return self._read()
        except AdapterError:
            raise
        except Exception as error:  # a damaged pickle fails in any way there is
            raise CorruptFileError(
                f"{self.name} cannot be read as a PyTorch file ({reason(error)}): {DAMAGED}."
            ) from None

    def _read(self) -> object:
        stack, memo = self.stack, self.memo
        steps = cast("Iterable[tuple[pickletools.OpcodeInfo, Any, int]]", pickletools.genops(self.file))
        for count, (opcode, argument, _) in enumerate(steps):
            if count > MAX_OPCODES:
                raise CorruptFileError(f"{self.name} has more entries than any file of weights: {DAMAGED}.")
            code = opcode.name
            if code in _PUSHES:
                stack.append(argument)
            elif code in _NUMBERS:
                stack.append(self._number(argument))
            elif code in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[argument] = stack[-1]
            elif code in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            elif code == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif code == "STOP":
                return stack[-1]
            else:
                self._step(code, argument)
        raise ValueError("it has no end")

    def _number(self, number: int | float) -> int | float:
        if isinstance(number, int) and number.bit_length() > 128:
            raise CorruptFileError(f"{self.name} holds a number of {number.bit_length():,} bits: {DAMAGED}.")
        return number

    def _step(self, code: str, argument: object) -> None:
        stack = self.stack
        match code:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(code == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack[-int(code[-1]) :] = [tuple(self._last(int(code[-1])))]
            case "LIST":
                stack.append(self._since_mark())
            case "DICT":
                stack.append(_table(_pairs(self._since_mark())))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [(key, value)])
            case "SETITEMS":
                pairs = _pairs(self._since_mark())
                _set(stack[-1], pairs)
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if code == "APPEND" else self._since_mark()
                if is_list(last := stack[-1]):
                    last.extend(items)
            case "GLOBAL":
                self._push_name(*str(argument).split(" ", 1))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                self._push_name(module, name)
            case "REDUCE" | "NEWOBJ":
                arguments, called = stack.pop(), stack.pop()
                stack.append(self._made(called, arguments))
            case "BUILD":  # attributes of what was made; tensors and tables have none that count
                stack.pop()
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8" | "EMPTY_SET":
                stack.append(_OPAQUE)
            case "ADDITEMS":
                self._since_mark()
            case "FROZENSET":
                self._since_mark()
                stack.append(_OPAQUE)
            case "INST" | "OBJ" | "NEWOBJ_EX" | "EXT1" | "EXT2" | "EXT4":
                raise self._unsafe(".".join(str(argument).split(" ", 1)) if code == "INST" else code)
            case _:
                raise ValueError(f"the step {code} is none of torch.save's")

    def _last(self, count: int) -> list[object]:
        if len(self.stack) < count:
            raise IndexError("nothing left")
        return self.stack[-count:]

    def _since_mark(self) -> list[object]:
        """Take what was pushed since the last mark."""
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:  # without one, IndexError ends it
            at -= 1
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def _push_name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        full = f"{module}.{name}"
        kind, _, last = full.rpartition(".")
        known = full in _MADE or full in _CLASSES or (kind == "torch" and _dtype(last) is not None)
        if not known and not (kind in ("torch", "torch.storage") and last in _TYPES):
            raise self._unsafe(full)
        self.stack.append(_Name(full))

    def _unsafe(self, called: str) -> UnsafeFileError:
        return UnsafeFileError(
            f"{self.name} carries code: opening it would call {quoted(called)}, which a file of weights never needs. Nothing "
            "was run. Use a .safetensors version, or have its author save plain tensors."
        )

    def _storage(self, identity: object) -> Storage:
        kind, typed, key, _, count, *view = _several(identity)
        if kind != "storage" or not isinstance(typed, _Name) or type(key) not in (str, int):
            raise ValueError("a storage without name and type")
        if not _is_size(count):
            raise ValueError("a storage of impossible size")
        if view and view[0] is not None:
            raise ValueError("a storage that shows a part of another one")
        storage = Storage(str(key)[:200], _TYPES[typed.name.rpartition(".")[2]], count)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError("a storage of two types or sizes")
        return storage

    def _made(self, called: object, arguments: object) -> object:
        make = _MADE.get(called.name) if isinstance(called, _Name) else None
        if make is None:
            raise ValueError(f"a call of {called.name if isinstance(called, _Name) else type(called).__name__}")
        return make(*_several(arguments))


_NUMBERS = frozenset({"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"})
_PUSHES = frozenset(
    {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)


def _several(value: object) -> Sequence[object]:
    """What a tuple or a list holds. Raises TypeError for anything else."""
    if not is_row(value):
        raise TypeError(f"a {type(value).__name__} in place of several values")
    return value


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**62


def _pairs(items: Sequence[object]) -> list[tuple[object, object]]:
    return list(zip(items[::2], items[1::2], strict=True))


def _set(target: object, pairs: Iterable[tuple[object, object]]) -> None:
    """Entries of a table; keys of other kinds name no weights, and hashing a nest of tuples could take for ever."""
    if isinstance(target, dict):
        cast("dict[object, object]", target).update((k, v) for k, v in pairs if type(k) in (str, int))


def _table(pairs: object = (), /) -> dict[object, object]:
    table: dict[object, object] = {}
    _set(table, ((key, value) for key, value in map(_several, _several(pairs))))
    return table


def _dtype(name: str) -> torch.dtype | None:
    found = getattr(torch, name, None) if name.isidentifier() else None
    return found if isinstance(found, torch.dtype) else None


def _opaque(*_: object) -> object:
    return _OPAQUE


def _view(storage: object, offset: object, shape: object, stride: object, *_: object) -> StoredView:
    return _checked(storage, None, offset, shape, stride)


def _typed_view(
    storage: object, offset: object, shape: object, stride: object, _r: object, _h: object, dtype: object, *_: object
) -> StoredView:
    found = _dtype(dtype.name.rpartition(".")[2]) if isinstance(dtype, _Name) else None
    if found is None or not isinstance(storage, Storage) or storage.dtype.itemsize != 1:
        raise ValueError("a tensor of no type")
    return _checked(storage, found, offset, shape, stride)


def _checked(storage: object, dtype: torch.dtype | None, offset: object, listed: object, steps: object) -> StoredView:
    """A view that lies inside its storage, of its type unless another is said."""
    shape, stride = ([n for n in _several(numbers)[:17] if _is_size(n)] for numbers in (listed, steps))
    whole = (len(shape), len(stride)) == (len(_several(listed)), len(_several(steps)))
    if not whole or len(shape) != len(stride) or len(shape) > 16 or not _is_size(offset):
        raise ValueError("a tensor of impossible shape")
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without numbers")
    dtype = dtype or storage.dtype
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.count * storage.dtype.itemsize // dtype.itemsize:
        raise ValueError("a tensor that is larger than its storage")
    if math.prod(shape) >= 2**62:
        raise ValueError("a tensor of impossible shape")
    return StoredView(storage, dtype, tuple(shape), tuple(stride), offset)


def _parameter(data: object, *_: object) -> object:
    return data


def _of_type(make: object, kind: object, arguments: object, *_: object) -> object:
    """A tensor with attributes of its own."""
    if (
        not isinstance(make, _Name)
        or not isinstance(kind, _Name)
        or kind.name not in _CLASSES
        or make.name not in _MADE
    ):
        raise ValueError("a tensor of a foreign kind")
    return _MADE[make.name](*_several(arguments))


def _no_tensor(why: str) -> Callable[..., object]:
    return lambda *_: NoTensor(why)


_SPARSE = "is a sparse, nested or quantised tensor, plain weights were expected"
_CLASSES = frozenset({"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter"})
_MADE: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _table,
    "collections.Counter": lambda *_: {},
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _typed_view,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_meta_tensor_no_storage": _no_tensor("has a shape and no numbers (meta tensors)"),
    "torch._utils._rebuild_sparse_tensor": _no_tensor(_SPARSE),
    "torch._utils._rebuild_sparse_csr_tensor": _no_tensor(_SPARSE),
    "torch._utils._rebuild_nested_tensor": _no_tensor(_SPARSE),
    "torch._utils._rebuild_qtensor": _no_tensor(_SPARSE),
    "torch.Size": tuple,
    **{
        f"torch.{name}": _opaque
        for name in ("device", "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine")
    },
    "torch.serialization._get_layout": _opaque,
    "_codecs.encode": _opaque,
    **{f"{m}.{n}": _opaque for m in ("builtins", "__builtin__") for n in ("set", "frozenset", "bytearray", "complex")},
}
"""What stands for the functions that torch.save writes into a pickle."""
