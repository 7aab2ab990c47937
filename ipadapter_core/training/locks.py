"""Locks between runs: on a file, held by a process, gone with it however it ends."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path, busy: Callable[[], None]) -> Generator[None]:
    """Hold ``folder/.lock``. If another process does, ``busy`` is called, and unless it raises, that process is waited for.

    Where the system or the disk knows no such locks, or the folder cannot be written, nothing is held.
    """
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        if (folder / ".lock").is_fifo():
            raise OSError("opening a pipe would wait for ever")
        file = (folder / ".lock").open("ab")
    except (ImportError, OSError):
        yield
        return
    with file:
        try:
            try:
                # not flock, which forked workers inherit: they may outlive a killed run by seconds
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                busy()
                fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
