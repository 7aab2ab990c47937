"""The demo's adapters are trained by the trainer's loop: freshly drawn pairs, resumable, a file that the world loads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from ipadapter_core import load_adapter
from ipadapter_core.demo import train_adapters
from ipadapter_core.demo.measure import measure
from ipadapter_core.demo.pictures import Pictures
from ipadapter_core.demo.world import FOLDER
from ipadapter_core.training.config import RunConfig, parse_overrides
from ipadapter_core.training.log import curves
from tiny_training import six_discs

SETTINGS = train_adapters.settings


@pytest.fixture
def pictures() -> Pictures:
    return six_discs()


def quick(work: Path, steps: int, family: str = "base") -> RunConfig:
    config = SETTINGS(family, work, steps, 2, 1e-3, "muon")
    changes = ["output.state_every=1", "watch.log_every=1", "watch.sample_steps=1", "watch.validation=1"]
    return parse_overrides([*changes, "train.warmup=0", 'train.schedule="constant"'], config)


def test_a_resumed_run_draws_the_same_pairs(pictures: Pictures, tmp_path: Path) -> None:
    whole = train_adapters.train_adapter(quick(tmp_path / "whole", 2), pictures, FOLDER)
    train_adapters.train_adapter(quick(tmp_path / "halves", 1), pictures, FOLDER)
    halves = train_adapters.train_adapter(quick(tmp_path / "halves", 2), pictures, FOLDER)
    adapter = load_adapter(whole)
    for key, value in adapter.module.checkpoint_state().items():
        assert torch.equal(value, load_adapter(halves).module.checkpoint_state()[key]), key
    assert adapter.metadata["trained_by"] == "ipadapter_core.demo.train_adapters"
    assert adapter.metadata["steps"] == "2"
    assert adapter.spec.token_dim == load_adapter(FOLDER / "adapters/ip-adapter-base.safetensors").spec.token_dim
    with Image.open(tmp_path / "whole/adapter-base/sheet.png") as sheet:
        assert sheet.size == (2 * 68 - 4, 3 * 68 - 4)


def test_one_command_trains_from_nothing_and_measures(
    pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_adapters, "load_pictures", lambda folder: pictures)
    monkeypatch.setattr(train_adapters, "settings", lambda family, work, *rest: quick(work, 2, family))
    monkeypatch.setattr(train_adapters, "measure", partial(measure, strengths=()))
    train_adapters.main(["plus", "--pictures", "none", "--work", str(tmp_path), "--sampling-steps", "1"])
    assert "right of 72" in capsys.readouterr().out
    folder = tmp_path / "adapter-plus"
    assert load_adapter(folder / "ip-adapter-plus.safetensors").spec.num_tokens == 16
    assert set(json.loads((folder / "figures.json").read_text())["right_reference_of_72"]) == {"0.0", "1.0"}
    assert set(curves(folder / "progress.jsonl")) == {"loss", "validation", "image_gain"}, "one picture has no other's"
    assert (folder / "loss.png").is_file()
