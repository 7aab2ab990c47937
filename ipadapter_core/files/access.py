"""What a text from somebody else may name: a file name, and a place below folders that the owner chose.

Graphs and clients of a server are such texts. Nothing here opens a file.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath

from ..errors import InvalidInputError, quoted
from .text import check_length

Allowed = Callable[[str], str | Path]
"""Gives a path back that may be read, and raises InvalidInputError for any other."""

MAX_NAME = 100
"""Most characters of a file name; the trainer appends steps and extensions to it."""

MAX_NAME_BYTES = 180
"""Most bytes of a file name in UTF-8: most file systems stop at 255, and extensions come behind it."""

MAX_PATH = 1000
"""Most characters of a path."""

# no name on Windows, a pattern elsewhere, or another place: "/", "\\", a drive, a stream
_FORBIDDEN = '/\\:*?"<>|[]'
# parts of emoji and of Persian words, which Unicode counts among the invisible characters that can forge a name
_JOINERS = frozenset(map(chr, (0x200C, 0x200D, *range(0xE0020, 0xE0080))))
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\.|$)", re.IGNORECASE)


def plain_name(name: str, what: str = "name") -> str:
    """The name, if every system can keep a file of that name and no program reads more into it.

    Letters of any script, emoji and spaces inside are fine. Raises InvalidInputError that says what is wrong with it.
    """
    problem = _problem(name)
    if problem:
        raise InvalidInputError(f"{what} is {quoted(name)}, {problem}; it must be a plain file name such as my-adapter")
    return name


def plain_path(path: str, what: str) -> str:
    """A relative path of plain names, with ``/`` between them. Raises InvalidInputError as ``plain_name`` does."""
    check_length(path, what, MAX_PATH)
    parts = path.replace("\\", "/").split("/")
    return "/".join(plain_name(part, what) for part in parts)


def _problem(name: str) -> str:
    if not name.strip():
        return "which is empty"
    if len(name) > MAX_NAME:
        return f"which has {len(name):,} characters and may have {MAX_NAME}"
    hidden = next(
        (c for c in name if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in _JOINERS), ""
    )
    if hidden:
        return f"which has the control character U+{ord(hidden):04X}"
    found = next((c for c in _FORBIDDEN if c in name), "")
    if found:
        return f"which has the character {found}"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"which takes {len(name.encode())} bytes and may take {MAX_NAME_BYTES}"
    if name[0] in "-." or name[0].isspace():
        return "which begins with a dash, a dot or a space"
    if name[-1] == "." or name[-1].isspace():
        return "which ends in a dot or a space"
    return "which Windows keeps for a device" if _DEVICES.match(name) else ""


def check_local(path: str, what: str) -> str:
    """The text, if it can only be a path on this machine. Raises InvalidInputError for addresses, commands and odd characters."""
    check_length(path, what, MAX_PATH)
    if "://" in path or path.lstrip().lower().startswith("pipe:"):
        raise InvalidInputError(
            f"{what} is {quoted(path)}; only files of this machine can be read, no addresses and no commands"
        )
    odd = next((c for c in path if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), "")
    if odd:
        raise InvalidInputError(f"{what} is {quoted(path)}, which has the control character U+{ord(odd):04X}")
    return path


class Places:
    """Folders that may be used, and whether a path stays in them. The folders are looked at once."""

    def __init__(self, roots: Iterable[str | Path], hint: str = "") -> None:
        """``hint`` ends the messages: how there can be more folders."""
        named = [os.path.abspath(root) for root in roots]
        self._real = [os.path.realpath(root) for root in named]
        self._named, self._hint = [*named, *self._real], hint

    def check(self, path: str | Path, what: str) -> Path:
        """The path, absolute, if it lies below a folder that may be used and all its links lead to one, too.

        ``..`` is refused whatever it would come to. What is not below a folder by its name is not looked at on the disk:
        on Windows, looking at the name of a share sends the user's credentials to it. Raises InvalidInputError.
        """
        refused = InvalidInputError(f"{what} {quoted(path)} lies outside of the folders that may be used{self._hint}")
        if ".." in PurePath(str(path).replace("\\", "/")).parts or "\0" in str(path):
            raise refused
        absolute = os.path.abspath(path)
        if not any(_within(absolute, place) for place in self._named):
            raise refused
        try:
            target = os.path.realpath(absolute)
        except (OSError, ValueError):  # a name too long for the system
            raise refused from None
        if not any(_within(target, place) for place in self._real):
            raise InvalidInputError(
                f"{what} {quoted(path)} leads by a link out of the folders that may be used{self._hint}"
            )
        return Path(absolute)


def _within(path: str, folder: str) -> bool:
    path, folder = os.path.normcase(path), os.path.normcase(folder)
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def listed_folders(text: str) -> list[str]:
    """Folders of a text with one a line; empty lines and those that begin with ``#`` say nothing."""
    lines = (line.strip() for line in text.splitlines())
    return [os.path.expanduser(line) for line in lines if line and not line.startswith("#")]
