"""Where the processes of a run meet, also when torchrun starts them again after one has died, and how they part.

torchrun keeps one store for all attempts of a run, and the addresses of dead processes stay in it. torch reads them in
the next attempt and then connects to nothing, in 4 of 14 restarts (2.13, two processes on one machine; see also
github.com/pytorch/pytorch/issues/135712). So the processes of an attempt first agree on a name that none before them
had, and meet below it. torchrun's count of restarts is no such name: every machine counts for itself.
"""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Generator
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

SCHEME = "ipadapter"
_registered: list[str] = []


def init_method() -> str | None:
    """What to hand to torch's ``init_process_group``; None where its own way is right."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None  # rank 0 brings a store of its own, which knows nobody yet
    if not _registered:
        from torch.distributed import register_rendezvous_handler

        register_rendezvous_handler(SCHEME, _meet)
        _registered.append(SCHEME)
    return f"{SCHEME}://"


def _meet(url: str, timeout: timedelta, **others: object) -> Generator[tuple[Store, int, int], None, None]:
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    for store, rank, world in rendezvous("env://", timeout=timeout):
        store.set_timeout(timeout)
        yield PrefixStore(agree_on_name(store, rank, world, timeout), store), rank, world


def agree_on_name(store: Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name that all ``world`` processes get, and that none who used the store before had. Raises TimeoutError.

    Every answer lies below a name that the one who asks has just made up: nothing old can be taken for it.
    """
    mine = uuid.uuid4().hex
    if rank != 0:
        store.set(f"{SCHEME}/here/{rank}", mine)
        name: str = store.get(f"{SCHEME}/{mine}").decode()
        store.set(f"{SCHEME}/{name}/{rank}", "")
        return name
    missing, end = set(range(1, world)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"{SCHEME}/here/{other}"]):  # or one of the dead, who does not answer; then again
                store.set(f"{SCHEME}/{store.get(f'{SCHEME}/here/{other}').decode()}", mine)
        missing = {other for other in missing if not store.check([f"{SCHEME}/{mine}/{other}"])}
        if missing and time.monotonic() > end:
            raise TimeoutError(
                f"processes {sorted(missing)} of {world} did not come within {timeout}; see their output"
            )
        time.sleep(0.01)
    return mine


def part() -> None:
    """Leave the other processes at the end of a command: threads that still listen for them abort Python as it ends."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
