"""Short texts that steer something: entries between commas and lines, numbers, ``place: factor``.

They come from graphs of strangers. Each is read once from left to right, with limits on its length and entries, so that
no text costs more than its length; no regular expression sees it before it is cut into short words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import InvalidInputError
from .files.text import check_length

LONGEST = 10_000
"""Characters of a text that names places; a block vector of 58 numbers has 400."""

MOST = 500
"""Entries of a text that names places."""

LONGEST_LIST = 1_000_000
"""Characters of a list of numbers, such as one weight per frame."""

MOST_NUMBERS = 100_000
"""Numbers of such a list; animations have up to 10,000 frames."""

MOST_DIGITS = 100
"""Characters of one number; a double has at most 24."""

_NUMERIC = frozenset("0123456789+-.eE")

# what input methods, chats and web pages write in place of ASCII: full-width forms, other commas, signs and blanks
_LOOK_ALIKES = zip("\u3001\uff64\u060c\u2212\u3000\u00a0", ",,,-  ", strict=True)
_INVISIBLE = (0xFEFF, 0x200B, 0x200C, 0x200D, 0x2060)
_AS_ASCII: dict[int, int | str | None] = {
    **{0xFF01 + i: 0x21 + i for i in range(94)},
    **{ord(seen): meant for seen, meant in _LOOK_ALIKES},
    **dict.fromkeys(_INVISIBLE),
}


def plain(text: str, what: str, limit: int = LONGEST) -> str:
    """The text with full-width and invisible characters as ASCII. Raises InvalidInputError if it is longer than ``limit``."""
    return check_length(text, what, limit).translate(_AS_ASCII)


def entries(text: str, what: str, limit: int = LONGEST, most: int = MOST) -> list[str]:
    """What stands between commas and line ends, without blanks, empty ones and ``#`` comments.

    Raises InvalidInputError for more than ``limit`` characters or ``most`` entries; ``what`` is the text's name.
    """
    lines = (line.split("#", 1)[0] for line in plain(text, what, limit).splitlines())
    return at_most([entry for line in lines for part in line.split(",") if (entry := part.strip())], what, most)


def at_most(found: list[str], what: str, most: int = MOST) -> list[str]:
    """The entries, if there are at most ``most``. Raises InvalidInputError."""
    if len(found) > most:
        raise InvalidInputError(f"{what} has {len(found):,} entries; at most {most:,} can be used")
    return found


def number(text: str) -> float | None:
    """A finite decimal number such as ``0.5``, ``-1`` or ``2e-3``; None for anything else."""
    text = text.strip()
    if not 0 < len(text) <= MOST_DIGITS or not _NUMERIC.issuperset(text):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def halves(entry: str) -> tuple[str, str] | None:
    """What stands before and behind the last ``:`` or ``=`` of an entry; None without one."""
    at = max(entry.rfind(":"), entry.rfind("="))
    return None if at < 0 else (entry[:at].strip(), entry[at + 1 :].strip())


def some(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: the first few and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
