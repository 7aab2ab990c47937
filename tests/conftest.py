"""Under ``pytest -n`` every worker, and the servers it starts, get their share of the cores; what takes longest comes first."""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))  # read when torch is imported

ORDER = ("workflows", "web", "host", "fuzz", "core")
"""Folders with files of minutes before those with files of seconds, which fill what is left at the end."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # by their number of tests, which says little


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(
            key=lambda item: ORDER.index(item.path.parent.name) if item.path.parent.name in ORDER else len(ORDER)
        )
