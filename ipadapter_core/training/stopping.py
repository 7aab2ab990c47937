"""How a run is asked to end: Ctrl-C, a system that shuts down, a terminal that closes, a parent that is gone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

STOP_WITH_PARENT = "IPADAPTER_STOP_WITH_PARENT"
"""Set in the environment of a child process: it saves and ends when the process that started it is gone."""

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last is Windows' Ctrl-Break, which replaces two others there


def _signals() -> list[int]:
    """What asks to end here, but for what the process was started to outlive (nohup)."""
    known = [int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)]
    return [one for one in known if one in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(one) != signal.SIG_IGN]


@contextmanager
def asked_to_stop() -> Generator[Callable[[], bool]]:
    """While inside, these signals only leave a note; a second Ctrl-C is a Ctrl-C."""
    asked = threading.Event()

    def note(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with _handled_by(note):
        yield asked.is_set


@contextmanager
def interruptible(what: str) -> Generator[None]:
    """While inside, these signals raise KeyboardInterrupt with a sentence: ``what`` is kept of the work, and how to go on."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(f"interrupted by {signal.Signals(number).name}; {what}")

    with _handled_by(interrupt):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Generator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _signals()}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)


def leave_signals_to_parent(number: int = 0) -> None:
    """For worker processes: a signal to the whole group (a closed terminal, a service manager) is the main process's affair."""
    for name in _NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def orphan_watch() -> Callable[[], bool]:
    """Tells whether the process that started this one is gone, where it asked for that."""
    if os.name != "posix" or not os.environ.get(STOP_WITH_PARENT):
        return lambda: False
    parent = os.getppid()
    return lambda: os.getppid() != parent
