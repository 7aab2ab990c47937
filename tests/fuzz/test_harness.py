"""The fuzzer's figures can be believed: every kind of failure that is planted is seen, seeds repeat, undamaged inputs load."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from random import Random

import pytest

from fuzz import harness
from fuzz.harness import Runner, fuzz, make, save_failures
from fuzz.kinds import KINDS, MARKER, Case, Keep, Kind
from ipadapter_core.errors import CorruptFileError


def planted(folder: Path, main: Path) -> None:
    """Does what its input says."""
    match main.read_text():
        case "foreign":
            raise KeyError("no error of ours")
        case "lines":
            raise CorruptFileError("two\nlines")
        case "endless":
            raise CorruptFileError("x" * 700)
        case "file":
            (folder / "missing").open()
        case "refused":
            raise CorruptFileError("a sentence")
        case "slow":
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass
        case "loop":
            while True:
                pass
        case "stuck":
            os.mkfifo(folder / "pipe")
            (folder / "pipe").open()
        case "memory":
            assert len(bytearray(80 * 2**20)) > 0
            b"x" * (80 * 2**20)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "code":
            Path(os.environ[MARKER]).touch()
        case _:
            pass


def plant(rng: Random, keep: Keep) -> Case:
    word = rng.choice(("foreign", "fine", "fine"))
    changes = rng.choice((1, 2, 3))
    if keep is not None and 0 not in keep:
        word = "fine"
    return Case({"a.txt": word.encode()}, "a.txt", changes=changes)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setitem(KINDS, "planted", Kind("planted", plant, planted))
    monkeypatch.setattr(harness, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(harness, "KILLED_AFTER", 1)
    monkeypatch.setattr(harness, "STUCK_AFTER", 2)
    monkeypatch.setattr(harness, "MOST_MEGABYTES", 50)
    return Runner()


PLANTED = {
    "fine": "loaded", "refused": "refused", "foreign": "foreign", "lines": "message", "endless": "message", "file": "foreign",
    "slow": "slow", "loop": "slow", "stuck": "stuck", "memory": "memory", "crash": "crash", "code": "code",
}  # fmt: skip


@pytest.mark.parametrize("word", PLANTED)
def test_every_failure_that_is_planted_is_seen(runner: Runner, word: str) -> None:
    case = Case({"a.txt": word.encode()}, "a.txt")
    assert runner.run("planted", case).verdict == PLANTED[word]
    assert runner.run("planted", Case({"a.txt": b"fine"}, "a.txt")).verdict == "loaded", "the next case has a process"
    runner.close()


def test_memory_is_seen_where_the_allocator_holds_free_memory(runner: Runner) -> None:
    blocks, apart = [], []
    for _ in range(2000):  # 200 MB of a heap whose end stays in use, so that free() gives nothing back
        blocks.append(b"x" * 100_000)
        apart.append(bytes(600))
    del apart[:-50]
    blocks.clear()
    assert runner.run("planted", Case({"a.txt": b"memory"}, "a.txt")).verdict == "memory"
    runner.close()


def test_what_must_be_refused_and_loads_is_silent(runner: Runner) -> None:
    assert runner.run("planted", Case({"a.txt": b"fine"}, "a.txt", refused=True)).verdict == "silent"
    runner.close()


def test_a_planted_exception_is_counted_made_smaller_and_kept(runner: Runner, tmp_path: Path) -> None:
    results = fuzz(3, ["planted"], cases=30)
    assert results.counts["planted"]["foreign"] == len(results.failures) > 3
    assert results.counts["planted"]["loaded"] == 30 - len(results.failures)
    (path,) = save_failures(results, tmp_path)
    kept = json.loads(path.read_text())
    assert kept["detail"].startswith("KeyError")
    assert kept["changes"] == [0], "the change that counts is left"
    assert f"{'planted':12}{30:8}" in results.table()
    runner.close()


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_repeat_and_differ(kind: str) -> None:
    cases = [[make(seed, KINDS[kind], number).files for number in range(6)] for seed in (1, 1, 2)]
    assert cases[0] == cases[1]
    assert cases[0] != cases[2]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"code"}))
def test_undamaged_inputs_load(kind: str) -> None:
    """Without it, a fuzzer whose every input is refused would look like a sound product."""
    runner, loaded = Runner(), 0
    cases = [case for case in (make(5, KINDS[kind], number, ()) for number in range(12)) if not case.refused]
    for case in cases:
        loaded += runner.run(kind, case).verdict == "loaded"
    runner.close()
    assert loaded >= len(cases) / 2
