"""States that runs go on from: no pickle, whole or not used, and the same bits."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ipadapter_core.commands.cli import main
from ipadapter_core.errors import CorruptFileError, InvalidInputError
from ipadapter_core.training import RunConfig, train, write_config
from ipadapter_core.training.cache import Cache
from ipadapter_core.training.optimizers import build_average, build_optimizer, build_schedule
from ipadapter_core.training.saved_state import Training, load_random, save_random, save_tree
from ipadapter_core.training.state import RunFolder, read_state, write_note
from ipadapter_core.training.tensor_files import TensorReader, write_tensors
from tiny_training import save_model, save_pictures, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def begun(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[..., RunConfig]]:
    """A run of four steps with states after the second and the fourth, and its config for any folder and length."""
    root = tmp_path_factory.mktemp("begun")
    pictures = save_pictures(root / "pictures", 4)

    def config(out: Path, steps: int = 6) -> RunConfig:
        return tiny_config(model, pictures, out, data__cache=str(root / "cache"), train__steps=steps)

    train(config(root / "run", 4))
    return root / "run", config


def weights(out: Path) -> bytes:
    """The numbers of a finished run's file, without its metadata, which say how long it was to be."""
    file = TensorReader(out / "ip-adapter.safetensors")
    return b"".join(file.read(name).numpy().tobytes() for name in sorted(file.names()))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# --- no pickle ------------------------------------------------------------------------------------------------------------


class Marks:
    """Opened as a pickle, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_no_pickle_is_written_or_read(
    begun: tuple[Path, Callable[..., RunConfig]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = begun
    assert {path.suffix for path in run.glob("state-*/*")} == {".json", ".safetensors"}
    train(config(tmp_path / "whole"))
    shutil.copytree(run, tmp_path / "run")
    newest = sorted((tmp_path / "run").glob("state-*"))[-1]
    mark = tmp_path / "mark"
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "scheduler.bin", "scaler.pt"):
        (newest / name).write_bytes(pickle.dumps(Marks(mark)))
    pickle.loads(pickle.dumps(Marks(tmp_path / "works")))
    assert (tmp_path / "works").exists()

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle is opened")

    for owner, names in ((torch, ("load", "save")), (pickle, ("load", "loads", "dump", "Unpickler"))):
        for name in names:
            monkeypatch.setattr(owner, name, never)
    assert train(config(tmp_path / "run")).step == 6
    assert not mark.exists()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_the_training_rooms_open_no_pickle() -> None:
    import ipadapter_core.training

    rooms = list(Path(ipadapter_core.training.__file__).parent.glob("*.py"))
    assert len(rooms) > 20
    for word in (
        "torch.load",
        "torch.save",
        "import pickle",
        ".save_state(",
        ".load_state(",
        "register_for_checkpointing",
    ):
        assert [path.name for path in rooms if word in path.read_text(encoding="utf-8")] == []


def test_states_of_older_versions_are_refused_unopened(
    begun: tuple[Path, Callable[..., RunConfig]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = begun
    old = tmp_path / "run/state-00000004"
    old.mkdir(parents=True)
    mark = tmp_path / "mark"
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"):
        (old / name).write_bytes(pickle.dumps(Marks(mark)))
    (old / "run.json").write_text(json.dumps({"config": config(tmp_path / "run").as_dict(), "step": 4, "processes": 1}))
    write_config(config(tmp_path / "run"), tmp_path / "run.toml")
    assert main(["train", str(tmp_path / "run.toml")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ipadapter: ")]
    assert len(said) == 1
    assert "saved by an older version, as pickles" in said[0]
    assert "choose another output.folder" in said[0]
    assert not mark.exists()
    assert len(list(old.iterdir())) == 4, "and it is left as it is"


# --- the same bits ----------------------------------------------------------------------------------------------------------


def parts(optimizer: str, memory: torch.memory_format) -> tuple[nn.Module, Training]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Flatten(), nn.Linear(80, 18), nn.Linear(18, 18)).to(
        memory_format=memory
    )
    nn.init.zeros_(net[2].weight)  # Prodigy keeps one number for what begins as zeros
    config = RunConfig().train
    config = type(config)(optimizer=optimizer, lr=1e-2, warmup=2, steps=9, schedule="cosine")  # type: ignore[arg-type]
    made = build_optimizer(config, [{"params": list(net.parameters()), "lr": 1e-2}])
    schedule, average = build_schedule(config, made), build_average(config, net)
    return net, Training(net, average, made, schedule, torch.amp.GradScaler("cpu", init_scale=8.0))


def step(net: nn.Module, training: Training, number: int) -> None:
    images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(number))
    hidden = net[2](net[1](net[0](images)))  # type: ignore[index]
    # the last layer gets its first gradient late
    (net[3](hidden) if number > 3 else hidden).square().mean().backward()  # type: ignore[index]
    training.optimizer.step()
    assert isinstance(training.average, torch.optim.swa_utils.AveragedModel)
    training.average.update_parameters(net)
    training.schedule.step()
    training.optimizer.zero_grad()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "adafactor", "muon"])
@pytest.mark.parametrize("saved_after", [0, 1, 3, 5])
def test_every_optimizer_comes_back(
    tmp_path: Path, optimizer: str, saved_after: int, memory: torch.memory_format
) -> None:
    net, training = parts(optimizer, memory)
    for number in range(saved_after):
        step(net, training, number)
    training.save(tmp_path, {"step": saved_after})
    other, loaded = parts(optimizer, memory)
    assert loaded.load(tmp_path) == {"step": saved_after}
    assert same(loaded.tree()["optimizer"]["state"], training.tree()["optimizer"]["state"])
    for number in range(saved_after, 7):
        step(net, training, number)
        step(other, loaded, number)
    assert same(loaded.tree(), training.tree())


def test_random_generators_come_back(tmp_path: Path) -> None:
    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    random.gauss(0, 1), np.random.randn()  # each keeps the second of two numbers for the next call
    save_random(tmp_path, 1)
    wanted = draws()
    draws()
    load_random(tmp_path, 1)
    assert draws() == wanted
    before = torch.get_rng_state()
    load_random(tmp_path, 0)
    assert torch.equal(torch.get_rng_state(), before), "a process that was not there keeps its own"


def test_a_state_of_other_tensors_is_refused(tmp_path: Path) -> None:
    net, training = parts("adamw", torch.contiguous_format)
    step(net, training, 0)
    tree = {**training.tree(), "counts": {}}

    def refused(changed: Any, match: str) -> None:
        save_tree(tmp_path / "training.safetensors", changed)
        with pytest.raises(InvalidInputError, match=match):
            parts("adamw", torch.contiguous_format)[1].load(tmp_path)

    weight = tree["weights"]["2.weight"]
    refused({**tree, "weights": {**tree["weights"], "2.weight": weight[:3]}}, r"weights/2\.weight is .*\[3, 80\]")
    refused({**tree, "weights": {**tree["weights"], "2.weight": weight.double()}}, r"float64")
    refused({**tree, "weights": {**tree["weights"], "5.weight": weight}}, r"weights has '5\.weight' too")
    refused({**tree, "weights": {"2.weight": weight}}, r"weights lacks '0\.weight'")
    refused({**tree, "weights": 3}, "lacks a table")
    refused({**tree, "average": None}, "lacks a table")
    groups = tree["optimizer"]["param_groups"]
    refused({**tree, "optimizer": {**tree["optimizer"], "param_groups": groups * 2}}, "has 2 entries, not 1")
    for lr in (float("nan"), float("inf"), "fast", None, True):
        broken = [{**groups[0], "lr": lr}]
        refused({**tree, "optimizer": {**tree["optimizer"], "param_groups": broken}}, r"param_groups/0/lr is")
    state = {**tree["optimizer"]["state"], 0: {"step": torch.tensor(1.0)}}
    refused({**tree, "optimizer": {**tree["optimizer"], "state": state}}, "state/0 lacks 'exp_avg'")
    with pytest.raises(InvalidInputError, match="does not fit this run"):
        parts("adafactor", torch.contiguous_format)[1].load(tmp_path)


# --- damage -----------------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def note(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage inside a note whose checksum is right."""

    def act(path: Path) -> None:
        values = json.loads(path.read_text())
        del values["checksum"]
        change(values)
        write_note(path.parent, values)

    return act


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "tensors cut": ("training.safetensors", cut),
    "one bit": ("training.safetensors", flip),
    "no tensors": ("training.safetensors", Path.unlink),
    "empty tensors": ("training.safetensors", lambda path: path.write_bytes(b"")),
    "a folder": ("training.safetensors", folder_instead),
    "random cut": ("random-0.safetensors", cut),
    "no random": ("random-0.safetensors", Path.unlink),
    "no note": ("run.json", Path.unlink),
    "note cut": ("run.json", cut),
    "note list": ("run.json", lambda path: path.write_text("[]")),
    "note number": ("run.json", lambda path: path.write_text("3")),
    "note deep": ("run.json", lambda path: path.write_text("[" * 100_000)),
    "note NaN": ("run.json", lambda path: path.write_text('{"step": NaN}')),
    "note bytes": ("run.json", lambda path: path.write_bytes(b"\xff\xfe\x00\xd8")),
    "note folder": ("run.json", folder_instead),
    "other rate": ("run.json", lambda path: path.write_text(path.read_text().replace("0.001", "0.002"))),
    "no config": ("run.json", note(lambda values: values.pop("config"))),
    "config list": ("run.json", note(lambda values: values.update(config=[1]))),
    "config of lists": ("run.json", note(lambda values: values.update(config={"train": [1]}))),
    "no files": ("run.json", note(lambda values: values.update(files=[]))),
    "files elsewhere": ("run.json", note(lambda values: values["files"].update({"../../x": "0"}))),
    "no processes": ("run.json", note(lambda values: values.pop("processes"))),
    "other step": ("run.json", note(lambda values: values.update(step=3))),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_put_aside_for_the_one_before(begun: tuple[Path, Any], tmp_path: Path, damage: str) -> None:
    name, act = DAMAGES[damage]
    shutil.copytree(begun[0], tmp_path / "run")
    folder = RunFolder(begun[1](tmp_path / "run").output)
    act(tmp_path / "run/state-00000004" / name)
    found, problems = folder.newest()
    assert found is not None
    assert found.step == 2
    assert len(problems) == 1
    assert "state-00000004" in problems[0]
    assert "\n" not in problems[0]
    assert (tmp_path / "run/state-00000004.damaged").is_dir()
    assert [number for number, _ in folder.states()] == [2]
    act(tmp_path / "run/state-00000002" / name)
    with pytest.raises(CorruptFileError, match=r"no state in .* is whole .*start anew"):
        folder.newest()
    assert (tmp_path / "run/state-00000002").is_dir(), "the last one stays where it is"


def test_a_run_goes_on_from_the_state_before_to_the_same_bits(
    begun: tuple[Path, Callable[..., RunConfig]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = begun
    train(config(tmp_path / "whole"))
    shutil.copytree(run, tmp_path / "run")
    flip(tmp_path / "run/state-00000004/training.safetensors")
    assert train(config(tmp_path / "run")).step == 6
    said = capsys.readouterr().err
    assert (
        "state-00000004 cannot be used ('training.safetensors' is damaged: it is not what was saved): it was put aside"
        in said
    )
    assert "going on after step 2" in said
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    read_state(4, tmp_path / "run/state-00000004").verify()


# --- files of tensors ---------------------------------------------------------------------------------------------------------


TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0, 4),
    "one": torch.tensor(7), "bytes": torch.arange(5, dtype=torch.uint8), "view": torch.arange(6.0).reshape(2, 3).T,
    "yes": torch.tensor([True, False]),
}  # fmt: skip


def read_all(file: TensorReader) -> dict[str, Tensor]:
    return {key: file.read(key) for key in file.names()}


def test_tensor_files_are_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_tensors(tmp_path / "ours", TENSORS, {"text": "é\n"})
    assert same(load_file(tmp_path / "ours"), {key: value.contiguous() for key, value in TENSORS.items()})
    save_file({key: value.contiguous() for key, value in TENSORS.items()}, tmp_path / "theirs")
    for name in ("ours", "theirs"):
        file = TensorReader(tmp_path / name)
        assert same(read_all(file), {key: TENSORS[key] for key in file.names()})
        assert set(file.names()) == set(TENSORS)
    assert TensorReader(tmp_path / "ours").metadata == {"text": "é\n"}


def test_a_tensor_file_that_changes_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, TENSORS)
    file, content = TensorReader(path), path.read_bytes()
    with path.open("r+b") as open_file:
        open_file.truncate(len(content) - 3)
    with pytest.raises(CorruptFileError, match="it ends before the tensor"):
        read_all(file)
    with pytest.raises(CorruptFileError, match="lacks the tensor 'x'"):
        file.read("x")
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    entry = header["a"]

    def refused(value: Any, data: bytes = bytes(8)) -> None:
        text = json.dumps(value).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        with pytest.raises(CorruptFileError):
            read_all(TensorReader(path))

    for changes in (
        {"dtype": "F99"}, {"dtype": []}, {"dtype": "F64"}, {"shape": [3]}, {"shape": [-2]}, {"shape": 2}, {"shape": [2.0]},
        {"shape": [2**70]}, {"shape": [0, 2**63], "data_offsets": [0, 0]}, {"data_offsets": [4, 12]}, {"data_offsets": [0]},
        {"data_offsets": "ab"}, {"data_offsets": [8, 0]},
    ):  # fmt: skip
        refused({"a": {**entry, **changes}})
    refused(header, bytes(4))
    refused([])
    refused({"a": 1})
    for content in (
        b"",
        b"abc",
        bytes(8),
        (2**60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"\xff\xff",
    ):
        path.write_bytes(content)
        with pytest.raises(CorruptFileError):
            TensorReader(path)


# --- what former versions wrote ---------------------------------------------------------------------------------------------


FORMER = Path(__file__).with_name("former_training")
"""State and cache of a training of two steps, written by commit 5264ba6; its model and pictures are those of tiny_training."""


def test_a_state_of_a_former_version_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    shutil.copytree(FORMER / "state-00000002", out / "state-00000002")
    model, pictures = save_model(tmp_path / "model"), save_pictures(tmp_path / "pictures")
    outcome = train(tiny_config(model, pictures, out, train__steps=2))
    assert "going on after step 2" in capsys.readouterr().err
    saved = load_file(FORMER / "state-00000002/training.safetensors")
    finished = load_file(outcome.file)
    assert len(finished) > 8
    for name, tensor in finished.items():
        assert torch.equal(tensor, saved[f"/average/module.{name}"]), "no step was made, so the file is the average"
    assert train(tiny_config(model, pictures, out, train__steps=3)).step == 3


def test_a_cache_of_a_former_version_is_read() -> None:
    (folder,) = (FORMER / "cache").iterdir()
    settings = json.loads((folder / "settings.json").read_text())
    cache = Cache(FORMER / "cache", {key: value for key, value in settings.items() if key != "checksums"})
    assert cache.folder == folder, "the same settings have the same name"
    cache.refresh()
    samples = cache.known()
    assert sorted(samples) == [f"subject{number // 2}/{number}.png" for number in range(6)]
    for sample in samples.values():
        assert sample.size == (40, 48)
        assert cache.read(f"{sample.key}.latents").shape == (1, 4, 16, 16)
        assert cache.read(f"{sample.key}.features").shape == (1, 12)
