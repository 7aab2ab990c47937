"""Trainings in child processes: that die, by SIGKILL, at a chosen place; and that are two."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any


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
    from ipadapter_core.training import saved_state
    from ipadapter_core.training import state as state_module

    owners: dict[str, tuple[Any, str]] = {
        "forward": (step, "forward"),
        "before the rename": (state_module.RunFolder, "finish"),
        "amid the state's files": (saved_state, "write_tensors"),
        "after a sync": (state_module, "_sync"),
        "old state gone": (shutil, "rmtree"),
        "adapter file": (state_module.RunFolder, "save_result"),
    }
    owner, name = owners[place]
    original, calls = getattr(owner, name), [0]

    def last(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            if place == "amid the state's files":
                args[0].write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    return lambda: setattr(owner, name, last)


def two_processes(work: Callable[[int], object]) -> list[int]:
    """`work(rank)` in two forked processes that find each other as under torchrun; their wait statuses."""
    from accelerate.state import AcceleratorState

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: list[int] = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            try:
                work(rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]
