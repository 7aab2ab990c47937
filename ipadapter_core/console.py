"""What every command needs of the terminal: texts that its encoding lacks, paths with ~, readers that go away."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path


def show_everything() -> None:
    """Let the standard streams escape what their encoding cannot show (a code page, ascii, a file name that is no UTF-8)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def forget_output() -> None:
    """Send the rest of standard output nowhere: its reader is gone, and Python would complain of that as it ends."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # no real file, as in tests and notebooks
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def complain(text: str) -> None:
    """A line on standard error, unless the terminal is closed."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def file_argument(text: str) -> Path:
    """An argument that is a path. Shells leave `~` in `--out=~/x`, and those of Windows everywhere."""
    return Path(os.path.expanduser(text))
