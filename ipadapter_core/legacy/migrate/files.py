"""Where workflows are found: text files in any encoding, and pictures and weights that ComfyUI wrote them into.

Nothing is decoded but the texts: chunks are walked by their lengths, and no text may be larger than a text file.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...errors import AdapterError, CorruptFileError, InvalidInputError, quoted
from ...files.text import MAX_BYTES, parse_json, read_bytes, regular_file
from .graph import Json, is_row, table

PNG = b"\x89PNG\r\n\x1a\n"
NAMES = ("workflow", "prompt")
"""What ComfyUI calls the two formats in the files that it writes; the first says more."""

Text = bytes | Json
"""A text as it lies in a file, or as a table where it lay in one."""

_OTHERS: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyp", "a video or a picture of a kind"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),
    (0, b"fLaC", "a sound"),
    (0, b"OggS", "a sound"),
    (0, b"ID3", "a sound"),
    (0, b"GIF8", "a GIF"),
    (0, b"PK\x03\x04", "an archive"),
)


def read_graph(path: str | os.PathLike[str]) -> object:
    """The JSON value of a workflow file, or of the workflow that a PNG, WebP, JPEG, .latent or .safetensors file carries.

    Raises FileNotFoundError, and InvalidInputError or CorruptFileError in one sentence.
    """
    path = regular_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
            found = dict(_texts(file, head, path)) if _carrier(head) else None
    except OSError as error:
        raise InvalidInputError(f"{quoted(path)} cannot be read ({error.strerror}): mend its permissions") from error
    if found is not None:
        return _from_texts(found, path)
    for offset, sign, what in _OTHERS:
        if head[offset:].startswith(sign):
            raise InvalidInputError(
                f"{quoted(path)} is {what} that no workflow is read from: drop it onto ComfyUI and save the workflow as JSON"
            )
    try:
        return parse_json(read_bytes(path), str(path), constants=True)
    except CorruptFileError as error:
        raise CorruptFileError(
            f"{quoted(path)} is no JSON file and no picture with a workflow in it: {error}"
        ) from None


def _from_texts(found: dict[str, Text], path: Path) -> object:
    wrong: AdapterError | None = None
    for name in NAMES:
        if name in found:
            text = found[name]
            try:
                value = parse_json(text, f"{path}: {name}", constants=True) if isinstance(text, bytes) else text
            except CorruptFileError as error:
                wrong = wrong or error
                continue
            if table(value):
                return value
    if wrong is not None:
        raise wrong
    told = "settings of another program, but" if "parameters" in found else ""
    raise InvalidInputError(
        f"{quoted(path)} carries {told or 'nothing:'} no workflow of ComfyUI; pictures lose it when they are edited or sent as messages"
    )


def _carrier(head: bytes) -> bool:
    return (
        head.startswith((PNG, b"\xff\xd8\xff"))
        or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
        or _weights_header(head) is not None
    )


def _weights_header(head: bytes) -> int | None:
    """Bytes of the JSON that a safetensors file begins with."""
    if len(head) < 10 or head[8:9] != b"{" or head[9:10] not in b'"} \n\t\r':
        return None
    return int.from_bytes(head[:8], "little")


def _texts(file: BinaryIO, head: bytes, path: Path) -> Iterator[tuple[str, Text]]:
    """Texts of a file by name."""
    size = path.stat().st_size
    if head.startswith(PNG):
        chunks = _png_chunks(file, size)
    elif head.startswith(b"RIFF"):
        chunks = _webp_chunks(file, size)
    elif head.startswith(b"\xff\xd8"):
        chunks = _jpeg_chunks(file, size)
    else:
        length = _weights_header(head) or 0
        file.seek(8)
        header = table(parse_json(_part(file, length, size, path), str(path), constants=True))
        for name, text in table(header.get("__metadata__")).items():
            if name in NAMES and isinstance(text, str):
                yield name, text.encode("utf-8", "surrogatepass")
        return
    for kind, length in chunks:
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            yield from _png_text(kind, _part(file, length, size, path))
        elif kind in (b"eXIf", b"EXIF", b"\xff\xe1"):
            yield from _exif_texts(_part(file, length, size, path))


def _part(file: BinaryIO, length: int, size: int, path: Path) -> bytes:
    if length > MAX_BYTES or length > size:
        raise CorruptFileError(
            f"{quoted(path)} says that a text in it has {length:,} bytes, more than a workflow or this file can have"
        )
    return file.read(length)


# --- chunks: the kind and the length of each, with the file at its content ---------------------------------------------

MOST_CHUNKS = 100_000


def _png_chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    at = 8
    for _ in range(MOST_CHUNKS):
        file.seek(at)
        header = file.read(8)
        if len(header) < 8 or at >= size:
            return
        length = int.from_bytes(header[:4], "big")
        yield header[4:], length
        at += 12 + length


def _webp_chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    at = 12
    for _ in range(MOST_CHUNKS):
        file.seek(at)
        header = file.read(8)
        if len(header) < 8 or at >= size:
            return
        length = int.from_bytes(header[4:], "little")
        yield header[:4], length
        at += 8 + length + length % 2


def _jpeg_chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    at = 2
    for _ in range(MOST_CHUNKS):
        file.seek(at)
        header = file.read(4)
        if len(header) < 4 or header[0] != 0xFF or header[1] == 0xDA or at >= size:
            return
        length = max(int.from_bytes(header[2:], "big") - 2, 0)
        yield header[:2], length
        at += 4 + length


# --- texts in chunks --------------------------------------------------------------------------------------------------


def _png_text(kind: bytes, content: bytes) -> Iterator[tuple[str, Text]]:
    keyword, _, rest = content.partition(b"\0")
    name = keyword.decode("latin-1").lower()
    if name not in (*NAMES, "parameters"):
        return
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    elif packed:
        rest = rest[1:]
    if packed:
        unpacker = zlib.decompressobj()
        try:
            rest = unpacker.decompress(rest, MAX_BYTES)
        except zlib.error as error:
            raise CorruptFileError(f"the text {name} in the picture is damaged ({error})") from None
        if unpacker.unconsumed_tail:
            raise CorruptFileError(
                f"the text {name} in the picture unpacks to over {MAX_BYTES:,} bytes, as no workflow does"
            )
    if kind != b"iTXt":
        rest = _utf8(rest)
    yield name, rest


def _utf8(text: bytes) -> bytes:
    """A text that should be Latin-1 and is UTF-8 in most programs' files."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1").encode()
    return text


EXIF_POINTER = 0x8769
_SIZES = {1: 1, 2: 1, 7: 1}
"""Bytes of a value of the types that texts have: BYTE, ASCII, UNDEFINED."""


def _exif_texts(block: bytes) -> Iterator[tuple[str, Text]]:
    """``workflow:{…}`` and ``prompt:{…}``, as ComfyUI writes them into any entries, and tables that hold both."""
    block = block.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 8:
        return
    todo, seen = [struct.unpack_from(order + "I", block, 4)[0]], set[int]()
    while todo:
        at = todo.pop()
        if at in seen or at + 2 > len(block):
            continue
        seen.add(at)
        (count,) = struct.unpack_from(order + "H", block, at)
        for entry in range(min(count, (len(block) - at - 2) // 12)):
            tag, kind, length = struct.unpack_from(order + "HHI", block, at + 2 + 12 * entry)
            (value,) = struct.unpack_from(order + "I", block, at + 10 + 12 * entry)
            if tag == EXIF_POINTER:
                todo.append(value)
            elif kind in _SIZES and 8 < length <= len(block) - value:
                yield from _named_text(block[value : value + length], order)


def _named_text(content: bytes, order: str) -> Iterator[tuple[str, Text]]:
    if content.startswith(b"UNICODE\0"):  # a user comment; in which order of bytes, programs disagree
        rest = content[8:]
        utf16 = "utf-16-le" if rest[1:2] == b"\0" else "utf-16-be"
        content = rest.decode(utf16, "replace").encode() if b"\0" in rest[:4] else rest
    else:
        content = content.removeprefix(b"ASCII\0\0\0")
    content = content.strip(b"\0 ")
    named = re.match(rb"(workflow|prompt)\s*:\s*(?=\{)", content, re.IGNORECASE)
    if named:
        yield named[1].decode().lower(), _utf8(content[named.end() :])
    elif content.startswith(b"{"):
        try:
            value = table(parse_json(_utf8(content), "the entry", constants=True))
        except CorruptFileError:
            return
        if is_row(value.get("nodes")):
            yield "workflow", value
        for name in NAMES:
            text = value.get(name)
            if table(text):
                yield name, table(text)
            elif isinstance(text, str):
                yield name, text.encode("utf-8", "surrogatepass")
