"""A training's config: TOML, overrides, and what a typo is told."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipadapter_core.commands.cli import main
from ipadapter_core.commands.train import EXAMPLES
from ipadapter_core.errors import AdapterError, InvalidInputError
from ipadapter_core.training import Outcome, RunConfig, load_config, parse_config, write_config
from ipadapter_core.training.config import _SHARES, KEYS, PATHS, parse_overrides


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


def test_older_names_of_settings_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('[output]\nspelling = "generic"\n')
    assert load_config(tmp_path / "x.toml").output.key_format == "generic"
    assert load_config(tmp_path / "x.toml", ["output.spelling=diffusers"]).output.key_format == "diffusers"
    with pytest.raises(InvalidInputError, match="did you mean 'kohya'"):
        parse_config({"output": {"spelling": "koya"}}, "here")


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
    assert main(["train"]) == 2
    assert "--example" in capsys.readouterr().err


def test_broken_toml(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[train\n")
    with pytest.raises(InvalidInputError, match="not valid TOML"):
        load_config(tmp_path / "run.toml")


# --- texts of Windows, of strangers and of other encodings -------------------------------------------------------------------

TOML = '[train]\nsteps = 7\n[output]\nname = "café 猫"\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_configs_of_windows_are_read(tmp_path: Path, encoding: str, line_end: str) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(TOML.replace("\n", line_end).encode(encoding))
    config = load_config(file)
    assert (config.train.steps, config.output.name) == (7, "café 猫")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[output]\nname = "café"\n'.encode("cp1252"), "is not UTF-8.*code page such as cp1252.*save it again as UTF-8"),
        (b'[model]\nbase = "C:\\Users\\me\\sd15"', "in 'single quotes', or with / instead of"),
        (b'[model]\nbase = "D:\\models"', "in 'single quotes', or with / instead of"),
        (b'[model]\nbase = "C:\\temp\\new"', "which no folder is called; .* in 'single quotes'"),
        (b'[data]\npath = "\\\\server\\new"', "which no folder is called; .* in 'single quotes'"),
        (b"x = " + b"[" * 200_000, "nested too deeply"),
        (b"x = " + b"{a=" * 60_000, "nested too deeply"),
        (b"[train]\nsteps = " + b"9" * 5000, "not valid TOML"),
        (b"[train]\nsteps = 0x" + b"f" * 5000, "train.steps is a number of more than 64 bits"),
        (b"[train]\nlr = 0x" + b"f" * 5000, "train.lr is a number of more than 64 bits"),
        (b"[train]\noptimizer = 0x" + b"f" * 5000, "a number of more than 64 bits; choose one of"),
        (b"[train]\nlr = [0x" + b"f" * 5000 + b"]", "train.lr is a list"),
        (b"[train]\nlr = 1e400", "train.lr is inf; it must be at most 10,000"),
        (b"[train]\nlr = nan", "train.lr is nan; it must be at least 0"),
        (b"train = 0x" + b"f" * 5000, r"train should be a section \[train\]"),
        (b"a." * 100_000 + b"a = 1", "dots before its ="),
        (b"[" + b"a." * 100_000 + b"a]", "dots before its ="),
        (b'["' + b"s" * 100_000 + b'"]', r"there is no section \[s{80}…\]"),
        (b'[train]\n"a\\u001b[2J\\n" = 1', r"has no key 'a\\x1b\[2J\\n'"),
        (b"[train]\n" + b"s" * 100_000 + b" = 1", "has no key 's{80}…'"),
        (b"[output]\nname = 5", "type str"),
        (b"[output]\nname = 2024-01-01", "type str"),
        (b'[output]\nname = "' + b"n" * 200_000 + b'"', "at most 100,000 can be used"),
        (b"#" * (2**20 + 1), "far more than the 1,048,576"),
        (b"[watch]\ntimesteps = [" + b"1," * 2000 + b"]", "it may have 1000"),
        (b'[model]\nbase = "a\\u0000b"', "NUL"),
        (b'[model]\nbase = {a = 1}', "list or a section"),
        (b"\x00" * 100, "TOML"),
    ],
)  # fmt: skip
def test_what_is_no_config_is_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(AdapterError, match=message) as caught:
        load_config(tmp_path / "run.toml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_places_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "no plain file"),
        (tmp_path, "is a folder"),
        (Path("/dev/zero"), "no plain"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            load_config(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_config(tmp_path / "none.toml")


def test_home_is_a_tilde_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in PATHS:
        section, key = name.split(".")
        (tmp_path / "run.toml").write_text(f'[{section}]\n{key} = "~/x"\n')
        assert load_config("~/run.toml").as_dict()[section][key] == str(tmp_path / "x")
        assert parse_overrides([f"{name}=~/x"], RunConfig()).as_dict()[section][key] == str(tmp_path / "x")
    remote = parse_overrides(["data.path=pipe:cat ~/x.tar"], RunConfig())
    assert remote.data.path == "pipe:cat ~/x.tar"


def test_texts_that_look_like_numbers_stay_texts() -> None:
    config = parse_overrides(["output.name=2024-01-01", "output.trigger=5", "data.caption_key=true"], RunConfig())
    assert (config.output.name, config.output.trigger, config.data.caption_key) == ("2024-01-01", "5", "true")
    for override in (
        "train.steps=" + "9" * 5000,
        "train.steps=" + "[" * 5000,
        "train.lr=inf",
        "x" * 10_000,
        "a" * 2_000_000,
    ):
        with pytest.raises(InvalidInputError) as caught:
            parse_overrides([override], RunConfig())
        assert len(str(caught.value)) < 400


TEXTS = ['"', "\\", "a\nb\r\n\tc", "😀 猫 é", "\x00\x01\x1f\x7f\x80\x9f", "\u2028\ufeff\ufffe", "'''", '"""', "#", "{}[]=", "\\ud83d", ""]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back(tmp_path: Path, text: str) -> None:
    config = parse_config({"output": {"name": text, "trigger": text}, "watch": {"sample_prompts": [text, "x"]}}, "here")
    write_config(config, tmp_path / "a.toml")
    assert load_config(tmp_path / "a.toml") == config


texts = st.text()
numbers = st.floats(1e-12, 1e4)


@settings(max_examples=150, deadline=None)
@given(
    st.builds(dict, name=texts, trigger=texts), st.lists(texts, max_size=3), numbers, st.integers(1 - 2**63, 2**63 - 1)
)
def test_every_config_comes_back(names: dict[str, str], prompts: list[str], number: float, seed: int) -> None:
    values = {
        "output": names,
        "watch": {"sample_prompts": prompts},
        "train": {"lr": number, "weight_decay": number, "seed": seed},
    }
    config = parse_config(values, "here")
    with tempfile.TemporaryDirectory() as folder:
        write_config(config, Path(folder) / "a.toml")
        assert load_config(Path(folder) / "a.toml") == config


def test_file_names_that_are_no_unicode_come_back_and_halves_of_characters_are_refused(tmp_path: Path) -> None:
    strange = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    config = parse_config({"model": {"base": strange}}, "here")
    write_config(config, tmp_path / "a.toml")
    assert load_config(tmp_path / "a.toml").model.base == strange
    for values in (
        {"output": {"name": "\ud83d"}},
        {"watch": {"sample_prompts": ["a\udcff"]}},
        {"model": {"base": "\ud83d"}},
    ):
        with pytest.raises(InvalidInputError, match="half a character"):
            parse_config(values, "here")


def test_every_number_has_limits() -> None:
    for section, keys in KEYS.items():
        for key, kind in keys.items():
            if kind in (int, float) and f"{section}.{key}" not in _SHARES:
                for value in (10**18, -(10**18), 10**400, *([float("inf"), float("nan")] if kind is float else [])):
                    seed = (section, key) == ("train", "seed") and abs(value) < 2**63
                    if not seed:
                        with pytest.raises(InvalidInputError):
                            parse_config({section: {key: value}}, "here")
    with pytest.raises(InvalidInputError, match=r"data\.workers is 1000000000000; it must be at most 1,024"):
        parse_config({"data": {"workers": 10**12}}, "here")
    base = RunConfig()
    with pytest.raises(InvalidInputError, match=r"train\.lr is inf"):
        write_config(replace(base, train=replace(base.train, lr=float("inf"))), Path("/nowhere"))


# --- the command -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "cache"])
def test_overrides_may_stand_behind_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "run.toml").write_text("")
    seen: list[RunConfig] = []
    monkeypatch.setattr(
        "ipadapter_core.training.train", lambda config, **_: seen.append(config) or Outcome(1, Path("x"), False)
    )
    monkeypatch.setattr("ipadapter_core.training.build_cache", lambda config, **_: seen.append(config))
    file = str(tmp_path / "run.toml")
    for arguments in (
        [file, "--json", "data.path=x", "train.steps=3"], [file, "data.path=x", "--json", "train.steps=3"],
        ["--json", file, "data.path=x", "train.steps=3"], [file, "data.path=x", "train.steps=3", "--json"],
    ):  # fmt: skip
        assert main([command, *arguments]) == 0
    assert len(seen) == 4
    assert {(config.data.path, config.train.steps) for config in seen} == {("x", 3)}
    for wrong in ([command, file, "--jsn", "data.path=x"], ["inspect", "a", "b"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_written_to_new_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.toml"
    assert main(["train", "--example", name, "--out", str(out)]) == 0
    assert load_config(out)
    assert main(["train", "--example", name]) == 0
    assert out.read_bytes().decode("utf-8") in capsys.readouterr().out
    out.write_text("mine")
    assert main(["train", "--example", name, "--out", str(out)]) == 1
    assert out.read_text() == "mine"
    assert main(["train", "--example", name, "--out", str(tmp_path / "none/run.toml")]) == 1
    said = capsys.readouterr().err
    assert "exists and is left as it is" in said
    assert "choose a folder that exists" in said
    assert main(["train", str(out), "--out", "x"]) == 2
