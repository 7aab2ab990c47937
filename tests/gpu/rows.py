"""What every section prints, a row per line, and how things are timed, counted and compared on a GPU or a CPU."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROW = "ROW "
"""Before the JSON of a row, so that what libraries print is none."""


@dataclass(frozen=True)
class Row:
    """A figure: its upper bound where it has one, and ``why`` where it could not be taken."""

    name: str
    value: float | None
    unit: str
    bound: float | None = None
    passed: bool | None = None
    why: str = ""


def show(name: str, value: float, unit: str, bound: float | None = None) -> None:
    """Print a figure; with a bound it passes up to there."""
    passed = None if bound is None else bool(value <= bound)  # a NaN does not
    _print(Row(name, float(value), unit, bound, passed))


def holds(name: str, truth: bool) -> None:
    """Print whether something is so."""
    _print(Row(name, float(truth), "holds", None, bool(truth)))


def without(name: str, why: str) -> None:
    """Print why there is no figure."""
    _print(Row(name, None, "", None, None, why))


def attempt(name: str, part: Callable[[], object]) -> None:
    """Run a part of a section; an error is a row that did not pass, and the other parts go on."""
    try:
        part()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        _print(Row(name, None, "", None, False, text[:300]))
        import traceback

        traceback.print_exc()


def _print(row: Row) -> None:
    print(ROW + json.dumps(asdict(row)), flush=True)


def cuda() -> bool:
    return torch.cuda.is_available()


def wait() -> None:
    """Until the device has done what it was asked."""
    if cuda():
        torch.cuda.synchronize()


def apart(found: Tensor, expected: Tensor) -> float:
    """Root of the mean square of the difference, relative to what is expected."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def rounding(dtype: torch.dtype) -> float:
    """How far numbers of a type that went through a few dozen layers may be from float32's, relative."""
    return {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}.get(dtype, 0.2)


def seconds(calls: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Shortest of a few runs of each call, in turns; each timed run follows an untimed one of the same call."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            wait()
            start = time.perf_counter()
            call()
            wait()
            taken[name].append(time.perf_counter() - start)
    return {name: min(found) for name, found in taken.items()}


SYNCHRONISING = {
    "aten._local_scalar_dense",
    "aten.item",
    "aten.nonzero",
    "aten.equal",
    "aten.is_nonzero",
    "aten.masked_select",
}


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Count:
    """Of one call: kernels (on a CPU aten operations, views included), their milliseconds, and waits for the device."""

    kernels: int
    milliseconds: float
    waits: int


KERNELS = "kernels" if torch.cuda.is_available() else "operations"
KERNELS_PER_SITE = 4 if torch.cuda.is_available() else 12
"""What one adapter may add at one attention. By hand 2 kernels were counted; 12 operations are what ``tests/core`` allows."""


def count(call: Callable[[], object]) -> Count:
    """Count one call, after one that is not counted."""
    call()
    if not cuda():
        with torch.no_grad(), _Operations() as counted:
            call()
        seen = counted.seen
        return Count(sum(seen.values()), 0.0, sum(seen[name] for name in SYNCHRONISING))
    wait()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    wait()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        call()
        wait()
    device = torch.autograd.DeviceType.CUDA
    kernels = [e for e in profiled.events() if e.device_type == device and not e.name.startswith(("Mem", "mem"))]
    spent = sum(e.time_range.elapsed_us() for e in kernels) / 1000
    return Count(len(kernels), spent, sum("synchronizing CUDA operation" in str(w.message) for w in said))


def show_counts(name: str, plain: Count, ours: Count, sites: int, steps: int = 1) -> None:
    """Rows of what something adds to a call: kernels per site and step, and waits for the device."""
    show(f"{name}: {KERNELS} added per site", (ours.kernels - plain.kernels) / sites / steps, KERNELS, KERNELS_PER_SITE)
    if cuda():
        show(f"{name}: GPU time of added kernels", (ours.milliseconds - plain.milliseconds) / steps, "ms a step")
    show(f"{name}: synchronisations added", ours.waits - plain.waits, f"in {steps} steps", 0)


def peak(call: Callable[[], object]) -> float | None:
    """MB at most that were allocated on the device during a call; None without one."""
    if not cuda():
        return None
    wait()
    torch.cuda.reset_peak_memory_stats()
    call()
    wait()
    return torch.cuda.max_memory_allocated() / 1e6


def show_memory(name: str, plain: float | None, ours: float | None, bound: float | None = None) -> None:
    """A row of what is allocated more than without it."""
    if plain is None or ours is None:
        without(name, "needs CUDA")
    else:
        show(name, ours - plain, "MB", bound)


def set_toy(toy: bool) -> None:
    """Tiny tensors are computed fastest by one thread; and no library is to talk of casts that are meant."""
    import logging

    if toy:
        torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
