"""Tensors on disk as safetensors, written in one stream and read by place: never mapped, and each read is checked.

A mapped file that another program cuts off ends the process that reads it (SIGBUS). Here that is an error like any other.
Format: https://github.com/huggingface/safetensors, README "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import CorruptFileError, quoted, reason
from ..files.state_dict import MAX_HEADER_BYTES, SAFETENSORS_DTYPES
from ..files.text import as_table, parse_json, regular_file
from ..narrowing import is_table

_NAMES = {dtype: name for name, text in SAFETENSORS_DTYPES.items() if (dtype := getattr(torch, text, None)) is not None}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor after another: nothing is held in memory twice. Raises OSError."""
    # the largest numbers first, as safetensors' own writer does: so every tensor lies at a multiple of its item size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(bytes_of(tensors[name].detach().cpu().contiguous()))


class TensorReader:
    """A safetensors file, open for reading by place. Raises CorruptFileError for one that is damaged, FileNotFoundError.

    A file that is replaced is read to its end as it was; one that is changed in place gives an error or other numbers,
    which only a checksum can tell.
    """

    def __init__(self, path: Path) -> None:
        self.path = regular_file(path)
        try:
            self._file = self.path.open("rb", buffering=0)
            size = os.fstat(self._file.fileno()).st_size
            length = int.from_bytes(self._file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise self._damaged("it is cut off, or no safetensors file")
            text = self._file.read(length)
        except OSError as error:
            raise self._damaged(reason(error)) from error
        header = parse_json(text, path)
        if not is_table(header):
            raise self._damaged("its header is no table")
        texts = header.pop("__metadata__", {})
        self.metadata: Mapping[str, Any] = as_table(texts)
        self._start = 8 + length
        self._places = {name: self._place(name, entry, size - self._start) for name, entry in header.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        return list(self._places)

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor. Raises CorruptFileError if there is none of that name."""
        if name not in self._places:
            raise self._damaged(f"it lacks the tensor {quoted(name)}")
        dtype, shape, _ = self._places[name]
        return dtype, shape

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own. Raises CorruptFileError."""
        dtype, shape = self.describe(name)
        try:
            tensor = torch.empty(shape, dtype=dtype)
        except (RuntimeError, OverflowError, TypeError):  # no bytes, and yet no tensor: 0 x 2^63
            raise self._damaged(f"the tensor {quoted(name)} has an impossible shape") from None
        self._fill(bytes_of(tensor), self._start + self._places[name][2], name)
        return tensor

    def close(self) -> None:
        self._file.close()

    def _fill(self, buffer: memoryview, offset: int, name: str) -> None:
        done = 0
        try:
            while done < len(buffer):
                # by place where the system can: forked workers share the position in a file
                if hasattr(os, "preadv"):
                    count = os.preadv(self._file.fileno(), [buffer[done:]], offset + done)
                else:
                    self._file.seek(offset + done)
                    count = self._file.readinto(buffer[done:]) or 0
                if count == 0:
                    raise self._damaged(f"it ends before the tensor {quoted(name)} does")
                done += count
        except OSError as error:
            raise self._damaged(reason(error)) from error

    def _place(self, name: str, entry: Any, room: int) -> tuple[torch.dtype, tuple[int, ...], int]:
        """Dtype, shape, and where the bytes begin."""
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            whole = all(type(one) is int and one >= 0 for one in (*shape, begin, end)) and len(shape) <= 16
            if whole and end - begin == math.prod(shape) * dtype.itemsize and end <= room:
                return dtype, shape, begin
        except (KeyError, TypeError, ValueError):
            pass
        raise self._damaged(f"its entry of the tensor {quoted(name)} says nothing sensible")

    def _damaged(self, why: str) -> CorruptFileError:
        return CorruptFileError(f"{quoted(self.path)} is damaged: {why}")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))
