"""One thread: several tests fork, which OpenMP's threads do not survive, and tensors this small gain nothing from more."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave Muon's own cases out where torch has none (before 2.9); that the trainer says so is tested everywhere."""
    if not hasattr(torch.optim, "Muon"):
        for item in items:
            if "muon" in item.name:
                item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} has no Muon"))
