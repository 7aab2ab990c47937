"""Trainings that strangers start: what they may set, read and replace, and what their process sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ipadapter_core.errors import AdapterError, InvalidInputError, UnsafeFileError
from ipadapter_core.model_folders import load_pipeline
from ipadapter_core.training import RunConfig, parse_config
from ipadapter_core.training.config import KEYS, DataConfig, load_config
from ipadapter_core.training.job import CHILD, ROOT, environment, run_job
from ipadapter_core.training.limits import AT_MOST, FROM_GRAPHS, check_limits, graph_settings
from ipadapter_core.training.loop import TrainingFailed
from ipadapter_core.training.results import EARLIER_RUNS, RECORD, publish, set_aside
from ipadapter_core.training.sources import open_source
from tiny_training import SIDE


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), "red").save(path)
    return path


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_say_how_it_learns() -> None:
    text = 'loss.min_snr=5\ntrain.checkpointing=true\n\nwatch.sample_prompts=["a", "b"]\ndata.buckets=true\noutput.dtype=float32'
    config = graph_settings(text, RunConfig())
    assert (config.loss.min_snr, config.train.checkpointing, config.watch.sample_prompts) == (5, True, ("a", "b"))


@pytest.mark.parametrize(
    "line",
    [
        "data.path=pipe:touch mark; true .tar", "data.path=/etc", " data . path =x", "data.cache=/tmp", "data.kind=huggingface",
        "data.roots=[]", "data.workers=64", "data.shuffle=1000000", "output.folder=/tmp", "output.name=../../victim", "model.base=/x",
        "model.config=/x", "model.image_encoder=/x", "adapter.start_from=/x", "adapter.family=plus", "lora.start_from=/x",
        "train.shard=true",
    ],
)  # fmt: skip
def test_settings_name_no_place(line: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot be set from a graph"):
        graph_settings(line, RunConfig())


def test_a_new_setting_is_closed_until_somebody_opens_it() -> None:
    """Every string, and whatever else is not on the list, is out; what is on it exists."""
    known = {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}
    listed = {f"{section}.{key}" for section, keys in FROM_GRAPHS.items() for key in keys}
    texts = {name for name in known & listed if KEYS[name.split(".")[0]][name.split(".")[1]] is str}
    assert texts == {"data.caption_key", "data.caption_encoding", "lora.targets", "output.trigger"}
    assert listed <= known
    assert set(AT_MOST) <= known


@pytest.mark.parametrize(
    "line",
    [
        *(f"{name}={int(most) + 1}" for name, most in AT_MOST.items() if name not in ("data.workers", "train.seed", "train.lr", "train.clip", "loss.min_snr", "watch.guidance", "lora.alpha", "lora.rank", "lora.factor")),
        "train.lr=inf", "train.lr=1e9", "train.weight_decay=nan", "loss.min_snr=1e300", f"train.seed={10**400}", "x" * 20_001,
        f"watch.sample_prompts={['x'] * 17}", f"watch.timesteps={list(range(100))}", f'output.trigger="{"x" * 10_001}"',
        f"train.steps={'9' * 5000}", f"train.steps={'[' * 9000}", "lora.rank=1025",
    ],
)  # fmt: skip
def test_numbers_and_texts_have_limits(line: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        graph_settings(line, RunConfig())
    assert len(str(error.value)) < 500


def test_limits_hold_for_what_nodes_set_too() -> None:
    check_limits(RunConfig())
    with pytest.raises(InvalidInputError, match=r"train.steps is 2000000; from a graph it may be 1,000,000 at most"):
        check_limits(parse_config({"train": {"steps": 2_000_000}}, "this node"))


# --- what it reads ---------------------------------------------------------------------------------------------------


def graph_data(path: Path | str, root: Path) -> DataConfig:
    return DataConfig(path=str(path), roots=(str(root),), min_side=1)


def read_all(config: DataConfig) -> list[bytes]:
    """Pictures whose captions can be read; what cannot be used is an error here, and named in a run."""
    source = open_source(config)
    found: list[bytes] = []
    for record in source:
        found.append(source.read(record.name))
        if record.problem:
            raise InvalidInputError(record.problem)
    if not found:
        raise InvalidInputError("; ".join(source.notes))
    return found


def test_folders_and_lists_inside_are_read(tmp_path: Path) -> None:
    picture(tmp_path / "in/sub/a.png").with_suffix(".txt").write_text("a")
    (tmp_path / "in/list.json").write_text(json.dumps([{"image_file": "sub/a.png", "text": "a"}]))
    assert len(read_all(graph_data(tmp_path / "in", tmp_path / "in"))) == 1
    assert len(read_all(graph_data(tmp_path / "in/list.json", tmp_path / "in"))) == 1


def test_nothing_outside_is_read(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    secret = picture(tmp_path / "secret.png")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "more").mkdir()
    picture(tmp_path / "more/c.png")
    (tmp_path / "shard-0.tar").write_bytes(b"")
    cases: list[Path | str] = [tmp_path, secret, "/", inside / "..", f"{inside}/{{.,x}}{{.,y}}/shard-0.tar", "relative"]
    cases += ["pipe:cat x.tar", "http://127.0.0.1:1/x.tar", f"file://{inside}/x.tar", f"{inside}\0.tar"]
    for number, entry in enumerate(("../secret.png", str(secret), "sub/../../secret.png", "link/secret.png")):
        file = inside / f"{number}.json"
        file.write_text(json.dumps([{"image_file": entry, "text": ""}]))
        cases.append(file)
        beside = inside / f"{number}b.json"
        beside.write_text(json.dumps([{"image_file": "own.png", "text": "", "reference_file": entry}]))
        cases.append(beside)
    picture(inside / "own.png")
    (inside / "link").symlink_to(tmp_path)
    for name, target in (
        ("pictures/a.png", secret),
        ("captions/b.txt", tmp_path / "secret.txt"),
        ("tars/x.tar", tmp_path / "shard-0.tar"),
        ("folders/x", tmp_path / "more"),
    ):
        link = inside / name
        link.parent.mkdir(parents=True)
        link.symlink_to(target)
        cases.append(link.parent)
    picture(inside / "captions/b.png")
    for case in cases:
        with pytest.raises(InvalidInputError, match=r"outside|by a link|control character|no addresses") as error:
            print(case, read_all(graph_data(case, inside)))
        assert len(str(error.value)) < 300, case


def test_metadata_is_read_and_saved_datasets_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "in/set"
    picture(folder / "a.png")
    mark = tmp_path / "ran"
    for name in ("set.py", "imagefolder.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a"}))
    assert len(read_all(graph_data(folder, tmp_path / "in"))) == 1
    (folder / "metadata.jsonl").unlink()
    (tmp_path / "metadata.jsonl").write_text("{}")
    (folder / "metadata.jsonl").symlink_to(tmp_path / "metadata.jsonl")
    with pytest.raises(InvalidInputError, match="by a link"):
        read_all(graph_data(folder, tmp_path / "in"))
    (folder / "metadata.jsonl").unlink()
    (folder / "state.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="is a saved dataset"):
        read_all(graph_data(folder, tmp_path / "in"))
    assert not mark.exists()


def test_patterns_with_braces_stay_small(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="more than 1,000,000 shards"):
        open_source(DataConfig(path=f"{tmp_path}/" + "{1..9}" * 12 + ".tar"))
    (tmp_path.parent / "there.tar").touch()
    with pytest.raises(InvalidInputError, match="outside"):  # and does not say whether it is there
        open_source(graph_data(f"{tmp_path}/{{.,x}}{{.,y}}/there.tar", tmp_path))


def test_messages_repeat_nothing_of_a_list(tmp_path: Path) -> None:
    for content in (
        [{"key": "api-key-SECRET"}],
        ["api-key-SECRET"],
        [{"image_file": "a.png", "text": {"SECRET": 1}}],
        {"SECRET": 1},
    ):
        (tmp_path / "x.json").write_text(json.dumps(content))
        told = ""
        try:
            told = "".join(record.problem for record in open_source(DataConfig(path=str(tmp_path / "x.json"))))
        except AdapterError as error:
            told = str(error)
        assert told
        assert "SECRET" not in told


# --- what it replaces ------------------------------------------------------------------------------------------------


def test_a_run_replaces_its_own_result_and_nobody_elses(tmp_path: Path) -> None:
    folder, target, result = tmp_path / "run", tmp_path / "out/mine.safetensors", tmp_path / "result"
    folder.mkdir()
    for content in (b"1", b"2"):
        result.write_bytes(content)
        assert publish(result, target, folder) == target
        assert target.read_bytes() == content
    target.write_bytes(b"somebody's")
    result.write_bytes(b"3")
    second = target.with_name("mine-2.safetensors")
    assert publish(result, target, folder) == second
    result.write_bytes(b"4")
    assert publish(result, target, folder) == second, "and keeps that name"
    assert (target.read_bytes(), second.read_bytes()) == (b"somebody's", b"4")
    assert publish(result, target, tmp_path / "run") == second
    other = tmp_path / "other"
    other.mkdir()
    assert publish(result, target, other).name == "mine-3.safetensors"
    assert sorted(path.name for path in target.parent.iterdir()) == [f"mine{n}.safetensors" for n in ("-2", "-3", "")]


@pytest.mark.parametrize(
    "note",
    [b"", b"[]", b"\xff", b'{"file": 1}', b'{"file": "../victim", "sha256": ""}', b'{"file": "victim", "sha256": ""}'],
)
def test_forged_notes_open_nothing(tmp_path: Path, note: bytes) -> None:
    folder, target, result = tmp_path / "run", tmp_path / "out/mine.safetensors", tmp_path / "result"
    for path in (folder, target.parent):
        path.mkdir()
    result.write_bytes(b"1")
    (folder / RECORD).write_bytes(note)
    for victim in (tmp_path / "victim", target.parent / "victim"):
        victim.write_bytes(b"old")
    assert publish(result, target, folder) == target
    assert (tmp_path / "victim").read_bytes() == (target.parent / "victim").read_bytes() == b"old"


def test_starting_over_deletes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert set_aside(folder) is None
    for number in range(1, EARLIER_RUNS + 1):
        folder.mkdir()
        assert set_aside(folder) is None, "nothing was learned there"
        (folder / "state-00000001").mkdir()
        (folder / "cache").write_text(str(number))
        assert set_aside(folder) == tmp_path / f"run.earlier-{number}"
        assert not folder.exists()
    assert (tmp_path / "run.earlier-1/cache").read_text() == "1"
    (folder / "state-00000001").mkdir(parents=True)
    with pytest.raises(InvalidInputError, match="5 earlier runs of 'run' lie aside already"):
        set_aside(folder)
    assert folder.exists()


# --- its process -----------------------------------------------------------------------------------------------------


def test_no_module_is_looked_for_in_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of a server uploads torch.py and its like into the folder of a run that it then starts."""
    folder, mark = tmp_path / "run", tmp_path / "ran"
    folder.mkdir()
    for name in (
        "torch",
        "ipadapter_core",
        "sitecustomize",
        "usercustomize",
        "json",
        "argparse",
        "accelerate",
        "tomllib",
    ):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r})")
    for name in ("job.toml", "pyvenv.cfg", "matplotlibrc", "setup.cfg", "train.log"):
        (folder / name).write_text("[model]\nbase = 'elsewhere'\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "run"]))
    config = parse_config(
        {"output": {"folder": str(folder)}, "train": {"device": "cpu"}, "data": {"path": "none"}}, "here"
    )
    with pytest.raises(TrainingFailed) as error:
        run_job(config, python=sys.executable, on_event=lambda event: None, check=lambda: None)
    assert "\n" not in str(error.value), "one sentence of ours, not a traceback"
    assert "elsewhere" not in str(error.value)
    assert not mark.exists()


def test_the_child_finds_this_core_and_torch() -> None:
    code = "import sys, json, runpy; sys.argv=['child', '--help']\n"
    code += f"try: runpy.run_path({str(CHILD)!r}, run_name='__main__')\n"
    code += "except SystemExit: pass\n"
    code += "import ipadapter_core, torch; print(json.dumps([sys.path, ipadapter_core.__file__, torch.__file__]))"
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    path, core, found = json.loads(done.stdout.splitlines()[-1])
    assert Path(core).parent == ROOT / "ipadapter_core"
    assert found == torch.__file__
    assert path[0] == str(ROOT)
    assert str(CHILD.parent) not in path
    assert "" not in path


def test_the_environment_is_reduced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "http_proxy",
        "HTTPS_PROXY",
        "LD_PRELOAD",
        "PYTHONSTARTUP",
        "GITHUB_TOKEN",
    ):
        monkeypatch.setenv(name, "secret")
    for name in ("PATH", "HOME", "CUDA_VISIBLE_DEVICES", "HF_HOME", "LD_LIBRARY_PATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "kept")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "beside", str(tmp_path)]))
    passed = environment()
    assert "secret" not in passed.values()
    assert [
        passed[name]
        for name in ("PATH", "HOME", "CUDA_VISIBLE_DEVICES", "HF_HOME", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    ] == ["kept"] * 6
    assert (passed["PYTHONPATH"], passed["PYTHONSAFEPATH"]) == (str(tmp_path), "1")


def test_a_relative_folder_is_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there were two: below this process's working directory and below the child's."""
    monkeypatch.chdir(tmp_path)
    config = parse_config({"output": {"folder": "runs/a"}, "train": {"device": "cpu"}}, "here")
    before = set(ROOT.iterdir())
    with pytest.raises(TrainingFailed):
        run_job(config, python=sys.executable, on_event=lambda event: None, check=lambda: None)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_dir()) == [
        "runs",
        "runs/a",
    ]
    assert {path.name for path in set(ROOT.iterdir()) - before} <= {"__pycache__"}


def test_files_may_name_relative_paths(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[output]\nfolder = "out"\n[data]\npath = "pipe:cat x.tar"\ncache = "/abs"\n')
    config = load_config(tmp_path / "run.toml")
    assert (config.output.folder, config.data.path, config.data.cache) == (
        str(tmp_path / "out"),
        "pipe:cat x.tar",
        "/abs",
    )


@pytest.mark.parametrize(
    ("index", "file"),
    [
        ({"_class_name": ["pipe", "Pipe"]}, "pipe.py"), ({"_class_name": ["pipe", "Pipe"]}, ""), ({"_class_name": "P"}, "unet/diffusers.py"),
        ({"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]}, ""), ({"unet": [["x"], "y"]}, ""),
    ],
)  # fmt: skip
def test_folders_of_models_that_bring_code_are_refused(tmp_path: Path, index: dict[str, object], file: str) -> None:
    """Some versions of diffusers import files that model_index.json names."""
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    if file:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsafeFileError, match="brings code of its own"):
        load_pipeline(tmp_path)
    assert not (tmp_path / "ran").exists()
