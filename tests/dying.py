"""Trainings that die: in a child process, by SIGKILL, at a chosen place."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def dies(work: Callable[[], object]) -> int:
    """Run in a child of this process that may be killed; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as quiet:
                os.dup2(quiet.fileno(), 1)
                os.dup2(quiet.fileno(), 2)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_at(step: type, place: str, count: int) -> Callable[[], None]:
    """Patch one function so that its count-th call is the last thing the process does; `step` is the module that learns."""
    from ipadapter_core.training import state as state_module

    owners: dict[str, tuple[Any, str]] = {
        "forward": (step, "forward"),
        "before the rename": (state_module.RunFolder, "finish"),
        "amid the state's files": (torch, "save"),
        "after a sync": (state_module, "_sync"),
        "old state gone": (shutil, "rmtree"),
        "adapter file": (state_module.RunFolder, "save_adapter"),
    }
    owner, name = owners[place]
    original, calls = getattr(owner, name), [0]

    def last(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            if place == "amid the state's files":
                Path(args[1] if isinstance(args[1], (str, Path)) else args[1].name).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    return lambda: setattr(owner, name, last)
