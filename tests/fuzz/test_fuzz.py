"""A short run of the fuzzer, the same cases every time; by hand it runs long: ``python tests/fuzz/run.py --seconds 900 --seed 2``."""

from __future__ import annotations

from fuzz.harness import fuzz
from fuzz.kinds import KINDS


def test_nothing_foreign_silent_large_or_slow() -> None:
    results = fuzz(1, KINDS, cases=1200)
    told = [f"{f.verdict}: {f.kind} {f.number} ({f.note}): {f.detail}" for f in results.failures if f.files]
    assert not told, "\n".join((results.table(), *told))
