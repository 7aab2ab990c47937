"""Texts that people and other programs wrote: captions, lists, configs, workflows. The one reader of them.

Windows writes UTF-8 with a byte order mark and UTF-16; editors of other countries write their code pages. A mark is
honoured, UTF-8 is tried, and anything else is an error that says so: decoded wrongly, a caption would train rubbish.
"""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import Any

from ..errors import AdapterError, CorruptFileError, InvalidInputError, quoted, reason
from ..narrowing import is_table

MAX_BYTES = 64 * 2**20
"""Most bytes of a text file. The largest lists of pictures that people train from have a tenth of that."""

MAX_DEPTH = 200
"""Most levels of brackets in a JSON text. Python's reader fails with an exception of its own a little above that."""

MAX_DIGITS = 400
"""Most digits of one number. The largest double has 309, and Python refuses to read integers of 4,300."""

# the longer marks first: that of UTF-32 begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class NotUnicodeError(CorruptFileError):
    """A text in some code page: its bytes are neither UTF-8 nor marked as UTF-16 or UTF-32."""


def decode_text(content: bytes, name: str | Path, encoding: str = "") -> str:
    """The text in ``content``, without byte order marks, lines ending in a line feed.

    UTF-8, and UTF-16 or UTF-32 with a mark; UTF-16 without one is told by its zero bytes. ``encoding`` names the code page
    of texts that are none of these (``cp1252``, ``shift_jis``). ``name`` is the file's, for messages.

    Raises NotUnicodeError where the bytes are not what they should be, InvalidInputError for an unknown encoding.
    """
    for mark, marked in _MARKS:
        if content.startswith(mark):
            return _decoded(content, marked, name)
    guess = _without_mark(content)
    if guess:
        return _decoded(content, guess, name)
    try:
        return _clean(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        if encoding:
            return _decoded(content, encoding, name)
        raise NotUnicodeError(
            f"{quoted(name)} is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}), so it was written in a code "
            "page such as cp1252 or Shift-JIS; save it again as UTF-8"
        ) from None


def read_text(path: str | os.PathLike[str], encoding: str = "") -> str:
    """The text in a file, decoded as ``decode_text`` does.

    Raises FileNotFoundError, InvalidInputError for what is no plain file, CorruptFileError for what is no text or has over
    64 MiB.
    """
    return decode_text(read_bytes(path), Path(path), encoding)


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> bytes:
    """The bytes of a plain file of at most ``limit`` bytes; folders, pipes and devices are refused before they are opened.

    Raises as ``read_text`` does.
    """
    path = regular_file(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # as much as is there: asked for the limit, Python would set aside that much
            content = file.read(min(limit, max(size, 2**16)) + 1) if size <= limit else b""
    except OSError as error:
        raise InvalidInputError(f"{quoted(path)} cannot be read ({error.strerror}): mend its permissions") from error
    if max(size, len(content)) > limit:
        raise CorruptFileError(
            f"{quoted(path)} has {max(size, len(content)):,} bytes, far more than the {limit:,} that such a file may have"
        )
    return content


def regular_file(path: str | os.PathLike[str]) -> Path:
    """The path, if a plain file is there. Reading a pipe or a device could hang for ever.

    Raises FileNotFoundError and InvalidInputError in one sentence, for names that no system allows too.
    """
    path = Path(path)
    if "\0" in str(path):  # before Python 3.14 that is simply no file
        raise InvalidInputError(f"{quoted(path)} is no name of a file: it has a NUL character")
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise InvalidInputError(f"{quoted(path)} is a folder; a file was expected")
        there = path.exists() or path.is_symlink()
    except AdapterError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # too long, NUL, a loop of links (RuntimeError before Python 3.13)
        raise InvalidInputError(f"{quoted(path)} is no name of a file ({reason(error)})") from None
    if there:
        raise InvalidInputError(
            f"{quoted(path)} is no plain file (a pipe, a device, or a link to nothing); a file was expected"
        )
    raise FileNotFoundError(f"{quoted(path)} does not exist: check the path and the spelling")


def parse_json(text: str | bytes, name: str | Path, *, constants: bool = False) -> Any:
    """The value of a JSON text; of bytes in any encoding that ``decode_text`` reads.

    ``NaN`` and ``Infinity`` are no JSON; ``constants`` lets them through, for tables that were written with empty cells and
    for the prompts in ComfyUI's pictures. Raises CorruptFileError.
    """
    text = text if isinstance(text, str) else decode_text(text, name)
    if _deepest(text) > MAX_DEPTH:
        raise CorruptFileError(f"{quoted(name)} is nested more than {MAX_DEPTH} levels deep, which no real file is")
    try:
        return json.loads(text, parse_int=_integer, parse_constant=float if constants else _no_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{quoted(name)} is not valid JSON ({reason(error)})") from None


def as_table(value: object) -> dict[str, object]:
    """A JSON value, if it is a table; else an empty one."""
    return value if is_table(value) else {}


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises as ``read_text`` and ``parse_json`` do."""
    return parse_json(read_text(path), Path(path))


def check_length(text: str, what: str, limit: int) -> str:
    """The text, if it has at most ``limit`` characters. Raises InvalidInputError."""
    if len(text) > limit:
        raise InvalidInputError(f"{what} has {len(text):,} characters; at most {limit:,} can be used")
    return text


def _decoded(content: bytes, encoding: str, name: str | Path) -> str:
    try:
        return _clean(content.decode(encoding))
    except UnicodeDecodeError as error:
        raise NotUnicodeError(
            f"{quoted(name)} is damaged or in another encoding: it is no {encoding} at byte {error.start}; save it as UTF-8"
        ) from None
    except LookupError:
        raise InvalidInputError(
            f"there is no encoding {quoted(encoding)}; names are such as cp1252, shift_jis, gb18030"
        ) from None


def _clean(text: str) -> str:
    """The text without byte order marks (programs that append marked texts leave several), lines ending in a line feed."""
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _without_mark(content: bytes) -> str:
    """UTF-16 without a mark, told by a zero in every other byte of what it begins with; "" if it is something else."""
    head = content[:64]
    if len(head) < 4 or len(content) % 2 or b"\0" not in head:
        return ""
    odd, even = head[1::2].count(0) / len(head[1::2]), head[::2].count(0) / len(head[::2])
    if odd > 0.4 and even < 0.1:
        return "utf-16-le"
    return "utf-16-be" if even > 0.4 and odd < 0.1 else ""


def _deepest(text: str) -> int:
    """Levels of brackets, counted without building anything; brackets inside strings do not count."""
    deepest = depth = 0
    inside = escaped = False
    for c in text if max(text.count("["), text.count("{")) > MAX_DEPTH else "":
        if inside:
            inside, escaped = escaped or c != '"', not escaped and c == "\\"
        elif c == '"':
            inside = True
        elif c in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in "]}":
            depth -= 1
    return deepest


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
