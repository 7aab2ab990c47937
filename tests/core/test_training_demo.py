"""The demo's adapters are trained by the trainer's loop: freshly drawn pairs, resumable, a file that the world loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ipadapter_core import load_adapter
from ipadapter_core.demo import train_adapters
from ipadapter_core.demo.pictures import Pictures
from ipadapter_core.demo.world import FOLDER
from tiny_training import six_discs


@pytest.fixture
def pictures() -> Pictures:
    return six_discs()


def test_a_resumed_run_draws_the_same_pairs(
    pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_adapters.settings

    def quick(*args: Any) -> object:
        from ipadapter_core.training.config import parse_overrides

        changes = ["output.state_every=1", "watch.log_every=1", "watch.sample_steps=1", "train.ignore_memory=true"]
        return parse_overrides([*changes, "train.warmup=0", 'train.schedule="constant"'], original(*args))

    monkeypatch.setattr(train_adapters, "settings", quick)
    whole = train_adapters.train_adapter("base", pictures, FOLDER, tmp_path / "whole", 2, 2)
    train_adapters.train_adapter("base", pictures, FOLDER, tmp_path / "halves", 1, 2)
    halves = train_adapters.train_adapter("base", pictures, FOLDER, tmp_path / "halves", 2, 2)
    adapter = load_adapter(whole)
    for key, value in adapter.module.checkpoint_state().items():
        assert torch.equal(value, load_adapter(halves).module.checkpoint_state()[key]), key
    assert adapter.metadata["trained_by"] == "ipadapter_core.demo.train_adapters"
    assert adapter.metadata["steps"] == "2"
    assert adapter.spec.token_dim == load_adapter(FOLDER / "adapters/ip-adapter-base.safetensors").spec.token_dim
    with Image.open(tmp_path / "whole/adapter-base/sheet.png") as sheet:
        assert sheet.size == (2 * 68 - 4, 3 * 68 - 4)
