"""A training's config: TOML, overrides, and what a typo is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipadapter_core.cli import main
from ipadapter_core.cli_train import EXAMPLES
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.training import RunConfig, load_config, parse_config, write_config
from ipadapter_core.training.config import KEYS


def test_a_file_and_overrides_on_top(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\nbase = "sd15"\n[train]\nlr = 1\nsteps = 5\n[watch]\nsample_prompts = ["a", "b"]\n')
    config = load_config(
        file, ["train.steps=7", "data.path=/else/where", "watch.timesteps=[1, 2]", "data.buckets=true"]
    )
    assert config.model.base == str(tmp_path / "sd15"), "paths in a file are relative to the file"
    assert (config.train.lr, config.train.steps) == (1.0, 7)
    assert config.data.path == "/else/where"
    assert config.watch.timesteps == (1, 2)
    assert config.watch.sample_prompts == ("a", "b")
    assert config.data.buckets is True


def test_written_configs_are_read_back(tmp_path: Path) -> None:
    config = parse_config(
        {"model": {"base": "/m"}, "train": {"lr": 3e-5, "ema": 0}, "data": {"path": 'quo"te'}}, "here"
    )
    write_config(config, tmp_path / "a.toml")
    back = load_config(tmp_path / "a.toml")
    assert back.train == config.train
    assert back.data.path == str(tmp_path / 'quo"te')


def test_defaults_are_the_originals() -> None:
    config = RunConfig()
    assert (config.loss.drop_image, config.loss.drop_text, config.loss.drop_both) == (0.05, 0.05, 0.05)
    assert (config.train.lr, config.train.weight_decay, config.train.batch) == (1e-4, 0.01, 8)
    assert sum(map(len, KEYS.values())) > 50


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"stesp": 5}}, r"\[train\] has no key 'stesp'; did you mean 'steps'\?"),
        ({"train": {"resolution": 5}}, r"belongs below \[data\]"),
        ({"trian": {}}, r"no section \[trian\]; did you mean 'train'"),
        ({"steps": 3}, r"'steps' belongs below \[train\]"),
        ({"train": {"steps": "many"}}, "train.steps is 'many'; a value of type int"),
        ({"train": {"steps": True}}, "type int"),
        (
            {"train": {"optimizer": "adam"}},
            "choose one of adamw, adamw8bit, prodigy, adafactor, muon; did you mean 'adamw'",
        ),
        ({"train": {"steps": 0}}, "must be at least 1"),
        ({"loss": {"drop_image": 0.6, "drop_text": 0.6}}, "must not pass 1"),
        ({"loss": {"drop_image": float("nan")}}, "must lie in 0..1"),
        ({"data": {"variants": 3}}, "needs data.augment"),
        ({"train": {"device": "cpu", "precision": "fp16"}}, "fp16 does not run on a CPU"),
        ({"watch": {"timesteps": [1000]}}, "0..999"),
        ({"train": 3}, "should be a section"),
    ],
)
def test_mistakes_name_what_was_meant(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_config(values, "run.toml")


@pytest.mark.parametrize("override", ["train.steps", "steps=3", "train.step=3"])
def test_wrong_overrides(tmp_path: Path, override: str) -> None:
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(InvalidInputError, match=r"section.key=value|did you mean 'steps'"):
        load_config(tmp_path / "run.toml", [override])


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_valid_and_printed(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--example", name]) == 0
    (tmp_path / "run.toml").write_text(capsys.readouterr().out)
    config = load_config(tmp_path / "run.toml")
    if name.endswith("-lora"):
        assert config.lora.wanted
    else:
        assert config.adapter.family == name.split("-", 1)[1]
        assert config.output.name == f"ip-adapter-{name}"


def test_the_command_names_a_typo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[train]\nstesp = 3\n")
    assert main(["train", str(tmp_path / "run.toml")]) == 1
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert main(["train"]) == 1
    assert "--example" in capsys.readouterr().err


def test_broken_toml(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[train\n")
    with pytest.raises(InvalidInputError, match="not valid TOML"):
        load_config(tmp_path / "run.toml")
