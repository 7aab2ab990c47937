"""What can go wrong on the way from a file and a picture to a patched model, one class per cause."""

from __future__ import annotations

from pathlib import PurePath

QUOTED = 80
"""Characters of somebody's text that a message repeats at most."""


def quoted(value: object, limit: int = QUOTED) -> str:
    """Somebody's text as a message may show it: in quotes, on one line, control characters escaped, cut at ``limit``.

    Names, keys and widget texts come from files and graphs of strangers; whole, they would forge lines of a log or fill it.
    """
    return f"'{one_line(value, limit)}'"


def one_line(value: object, limit: int = QUOTED) -> str:
    """As ``quoted``, without quotes: for names that a sentence begins with, and in lists. Paths are cut at their beginning."""
    try:
        text = value if isinstance(value, str) else str(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a very long {type(value).__name__}"
    if isinstance(value, PurePath) and len(text) > limit:
        return f"…{_printable(text[-limit:])[-limit:]}"  # what names the file is at the end
    return f"{_printable(text[:limit])[:limit]}{'…' if len(text) > limit else ''}"


def reason(error: BaseException, limit: int = 2 * QUOTED) -> str:
    """What a foreign exception says, as one short line to put in brackets behind our own sentence."""
    text = f"{type(error).__name__}: {error}"[: 10 * limit]
    return _printable(" ".join(text.split()))[:limit]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a device's, or torch's on the CPU, whose error is a RuntimeError like any other."""
    if isinstance(error, MemoryError):
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class AdapterError(ValueError):
    """Base of every error this package raises on purpose; says what was seen, what was expected, what to do."""


class UnknownFormatError(AdapterError):
    """The tensors are readable, but they are not (or not only) an IP-Adapter of a family that can be loaded."""


class UnsafeFileError(AdapterError):
    """A pickle that would run code when opened; nothing in it was run."""


class CorruptFileError(AdapterError):
    """The file is truncated, damaged, not a file of tensors, incomplete, or holds NaN or infinite weights."""


class IncompatibleAdapterError(AdapterError):
    """The adapter does not fit the model it is applied to."""


class IncompatibleEncoderError(AdapterError):
    """The adapter was trained on features of another image encoder than the one given."""


class InvalidInputError(AdapterError):
    """A value from the user that cannot be used: an empty batch, an image of 0 pixels, an unknown option."""
