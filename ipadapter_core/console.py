"""What every command needs of the terminal: texts that its encoding lacks, paths with ~, readers that go away."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
    """An argument that is a path. Shells leave ``~`` in ``--out=~/x``, and those of Windows everywhere."""
    return Path(os.path.expanduser(text))


class progress_bar:
    """A tqdm bar on stderr as the ``(done, total)`` callback of this package."""

    def __init__(self, name: str, total: int) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(total=total, desc=name, file=sys.stderr, disable=None)

    def __enter__(self) -> Callable[[int, int], None]:
        return self._report

    def _report(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
