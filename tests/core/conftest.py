"""One thread: several tests fork, which OpenMP's threads do not survive, and tensors this small gain nothing from more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # how fast the machine is today is no property of the code
settings.load_profile("untimed")

MUON = (
    "test_the_worlds_unet_is_trained_by_the_same_loop",
    "test_a_resumed_run_draws_the_same_pairs",
    "test_one_command_trains_from_nothing_and_measures",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave Muon's own cases out where torch has none (before 2.9); that the trainer says so is tested everywhere."""
    if not hasattr(torch.optim, "Muon"):
        for item in items:
            if "muon" in item.name or item.name in MUON:
                item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} has no Muon"))
