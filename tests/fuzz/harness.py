"""Runs cases in a process with limits, judges what they did, and makes failures smaller.

The process that runs them is a fork of this one, so a crash or an endless loop costs one case; a new one takes its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.kinds import KINDS, MARKER, Case, Kind, stored
from ipadapter_core.errors import AdapterError

MOST_SECONDS = 5.0
MOST_MEGABYTES = 2048
MOST_MESSAGE = 600
KILLED_AFTER = 25
"""Seconds of processor time after which a case is ended."""
STUCK_AFTER = 240
"""Seconds of any time with next to no processor time in them, as of a pipe that is waited for; what computes on a busy machine is slow."""
IDLE = 0.01
"""Share of a processor that is next to none."""

GOOD = ("refused", "loaded")
BAD = ("foreign", "silent", "message", "memory", "slow", "stuck", "code", "crash")


@dataclass
class Outcome:
    """What a case did."""

    verdict: str
    detail: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0


def judge(kind: Kind, case: Case, folder: Path) -> Outcome:
    """Write a case's files, use them, and say what came of it."""
    main = folder / case.main
    for name, raw in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    torch.manual_seed(0)
    started = time.process_time()
    before = _peak_from_now()
    verdict, detail = "loaded", ""
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            kind.use(folder, main)
    except (AdapterError, FileNotFoundError) as error:
        text = str(error)
        verdict, detail = "refused", text
        if isinstance(error, FileNotFoundError) and error.errno is not None:
            verdict, detail = "foreign", _told(error)
        elif not text.isprintable() or not text or len(text) >= MOST_MESSAGE:
            verdict, detail = "message", f"{_told(error)} ({len(text)} characters)"
    except MemoryError as error:
        verdict, detail = "memory", _told(error)
    except AssertionError as error:
        verdict, detail = "silent", _told(error)
    except BaseException as error:
        allocation = "allocate memory" in str(error) or "Unable to allocate" in str(error)
        verdict, detail = "memory" if allocation else "foreign", _told(error)
    seconds, megabytes = time.process_time() - started, _peak() - before
    if verdict == "loaded" and case.refused:
        verdict, detail = "silent", "it must be refused and loaded"
    if seconds > MOST_SECONDS:
        verdict, detail = "slow", f"{seconds:.1f} s; {verdict} {detail}"
    if megabytes > MOST_MEGABYTES:
        verdict, detail = "memory", f"{megabytes:.0f} MB; {verdict} {detail}"
    if Path(os.environ[MARKER]).exists():
        verdict, detail = "code", "code in a file ran"
    return Outcome(verdict, detail, seconds, megabytes)


def _told(error: BaseException) -> str:
    """The exception and the deepest place of this package that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "ipadapter_core" in f.filename]
    place = (
        f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "outside the package"
    )
    return f"{type(error).__name__} at {place}: {ascii(str(error))[:300]}"


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def _processor_time(pid: int) -> float:
    """Seconds that a process has computed."""
    parts = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def _peak_from_now() -> float:
    """Megabytes now; the peak is counted from here on.

    Free memory that the allocator still holds (a forked heap can have hundreds of megabytes) is given back first: a case that
    filled it would not show.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


# --- the process -------------------------------------------------------------------------------------------------


def make(seed: int, kind: Kind, number: int, keep: Iterable[int] | None = None) -> Case:
    """The case of a seed, a kind and a number, with all of its changes or some."""
    return kind.make(Random(f"{seed}/{kind.name}/{number}"), None if keep is None else frozenset(keep))


def _serve(connection: Connection, scratch: str) -> None:
    faulthandler.disable()  # pytest's would fill the screen at every planted crash
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent
    room = int(_status("VmSize") + 3 * MOST_MEGABYTES) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    while True:
        message = connection.recv()
        if message is None:
            return
        folder = Path(tempfile.mkdtemp(dir=scratch))
        marker = folder / "code-ran"
        os.environ[MARKER] = str(marker)
        signal.setitimer(signal.ITIMER_PROF, KILLED_AFTER)
        try:
            name, case = message
            outcome = judge(KINDS[name], case, folder)
        except BaseException as error:  # of the harness itself
            outcome = Outcome("harness", _told(error))
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect() if outcome.megabytes > 200 else None
        connection.send(outcome)


class Runner:
    """Judges cases, one after another, in a process that is replaced when it dies or is old."""

    def __init__(self, per_process: int = 400) -> None:
        self.per_process = per_process
        self.scratch = tempfile.mkdtemp(prefix="fuzz-")
        self.process: Any = None
        self.connection: Any = None
        self.served = 0

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.scratch), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch may have threads: it has one
            self.process.start()
        theirs.close()
        self.served = 0

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None

    def run(self, kind: str, case: Case) -> Outcome:
        if self.process is None or self.served >= self.per_process:
            self._stop()
            self._start()
        self.served += 1
        self.connection.send((kind, case))
        try:
            before = _processor_time(self.process.pid)
            while not self.connection.poll(STUCK_AFTER):
                now = _processor_time(self.process.pid)
                if now - before < STUCK_AFTER * IDLE:
                    self._stop()
                    return Outcome("stuck", f"nothing after {STUCK_AFTER} s")
                before = now
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            died = -(self.process.exitcode or 0)
            name = signal.Signals(died).name if died else f"exit {self.process.exitcode}"
            slow = died == signal.SIGPROF
            outcome = Outcome("slow" if slow else "crash", f"over {KILLED_AFTER} s" if slow else name)
        self._stop()
        return outcome

    def close(self) -> None:
        self._stop()
        shutil.rmtree(self.scratch, ignore_errors=True)


# --- many --------------------------------------------------------------------------------------------------------


@dataclass
class Failure:
    kind: str
    seed: int
    number: int
    verdict: str
    detail: str
    note: str
    changes: list[int] | None
    main: str
    refused: bool
    files: dict[str, str] = field(default_factory=dict[str, str], repr=False)

    @property
    def sort(self) -> tuple[str, ...]:
        """What makes two failures one: kind, verdict, exception and place."""
        return self.kind, self.verdict, _sort(self.detail)


@dataclass
class Results:
    counts: dict[str, Counter[str]] = field(default_factory=dict[str, "Counter[str]"])
    failures: list[Failure] = field(default_factory=list[Failure])
    seconds: float = 0.0

    def table(self) -> str:
        """One row per kind, one column per verdict, and the sum."""
        columns = [*GOOD, *BAD, "harness"]
        rows = [f"{'kind':12}{'cases':>8}" + "".join(f"{c:>9}" for c in columns)]
        total: Counter[str] = Counter()
        for kind, counts in sorted(self.counts.items()):
            total += counts
            rows.append(f"{kind:12}{sum(counts.values()):8}" + "".join(f"{counts[c]:9}" for c in columns))
        rows.append(f"{'all':12}{sum(total.values()):8}" + "".join(f"{total[c]:9}" for c in columns))
        return "\n".join(rows)

    def facts(self) -> dict[str, Any]:
        """As JSON, without the files."""
        failures = [{k: v for k, v in asdict(f).items() if k != "files"} for f in self.failures]
        return {"seconds": self.seconds, "counts": {k: dict(c) for k, c in self.counts.items()}, "failures": failures}


def _sort(detail: str) -> str:
    """The exception and its place, without what it says."""
    return detail.split(": ")[0]


def smaller(
    runner: Runner, seed: int, kind: Kind, number: int, case: Case, outcome: Outcome
) -> tuple[Case, Outcome, list[int]]:
    """The same failure with fewer changes, and of a text with fewer characters."""
    kept = list(range(case.changes))

    def fails_alike(other: Case) -> Outcome | None:
        found = runner.run(kind.name, other)
        same = found.verdict == outcome.verdict and _sort(found.detail) == _sort(outcome.detail)
        return (
            found
            if same or (found.verdict == outcome.verdict and outcome.verdict in ("slow", "memory", "crash"))
            else None
        )

    if outcome.verdict in ("stuck", "slow"):
        return case, outcome, kept
    for drop in range(case.changes):
        rest = [n for n in kept if n != drop]
        with contextlib.suppress(Exception):
            other = make(seed, kind, number, rest)
            found = fails_alike(other)
            if found is not None:
                kept, case, outcome = rest, other, found
    raw = case.files.get(case.main)
    if raw is not None and kind.name in ("texts", "configs", "overrides", "workflows", "lists"):
        step, tries = max(1, len(raw) // 2), 0
        while step >= 1 and tries < 60:
            at = 0
            while at < len(raw) and tries < 60:
                other = Case(
                    {**case.files, case.main: raw[:at] + raw[at + step :]}, case.main, case.refused, note=case.note
                )
                tries += 1
                found = fails_alike(other)
                if found is not None:
                    raw, case, outcome = other.files[case.main], other, found
                else:
                    at += step
            step //= 2
    return case, outcome, kept


def fuzz(
    seed: int,
    kinds: Iterable[str],
    *,
    cases: int | None = None,
    seconds: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Results:
    """Run numbered cases of the kinds in turn until there were enough or the time is over.

    Which cases there are depends on the seed alone, not on the time.
    """
    chosen = [KINDS[name] for name in kinds]
    turns = [kind for kind in chosen for _ in range(kind.share)]
    Random(seed).shuffle(turns)
    results, runner = Results({kind.name: Counter() for kind in chosen}), Runner()
    numbers: Counter[str] = Counter()
    known: set[tuple[str, ...]] = set()
    for kind in chosen:  # seeds are made once, before the fork
        make(seed, kind, 0)
    started = time.monotonic()
    done = 0
    try:
        while (cases is None or done < cases) and (seconds is None or time.monotonic() - started < seconds):
            kind = turns[done % len(turns)]
            number = numbers[kind.name]
            numbers[kind.name] += 1
            done += 1
            case = make(seed, kind, number)
            outcome = runner.run(kind.name, case)
            results.counts[kind.name][outcome.verdict] += 1
            if outcome.verdict in GOOD:
                continue
            failure = Failure(
                kind.name, seed, number, outcome.verdict, outcome.detail, case.note, None, case.main, case.refused
            )
            if failure.sort not in known:
                known.add(failure.sort)
                case, outcome, failure.changes = smaller(runner, seed, kind, number, case, outcome)
                failure.detail, failure.files = outcome.detail, stored(case)
                if say is not None:
                    say(f"{failure.verdict}: {kind.name} {number} ({case.note}): {failure.detail}")
            results.failures.append(failure)
    finally:
        runner.close()
        results.seconds = time.monotonic() - started
    return results


def save_failures(results: Results, folder: Path) -> list[Path]:
    """One JSON file per failure of a new sort, with its input, for ``--repeat``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for failure in results.failures:
        if failure.files:
            path = folder / f"{failure.kind}-{failure.seed}-{failure.number}.json"
            path.write_text(json.dumps(asdict(failure), indent=1))
            paths.append(path)
    return paths
