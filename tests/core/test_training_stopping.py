"""Trainings that are interrupted: by signals at any place, by a terminal that closes, by memory that runs out."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ipadapter_core.commands.cli import main
from ipadapter_core.training import RunConfig, TrainingFailed, cache, log, train, write_config
from ipadapter_core.training.adapter_trainee import AdapterStep
from ipadapter_core.training.collection import Sample
from ipadapter_core.training.encode import TargetEncoders
from ipadapter_core.training.lora_trainee import LoRAStep
from ipadapter_core.training.samples import changes, digests
from ipadapter_core.training.stopping import asked_to_stop
from ipadapter_core.training.tensor_files import TensorReader
from ipadapter_core.training.watch import Validator
from tiny_training import picture, save_model, save_pictures, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


Config = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """Configs of one run in any folder, and such a run that nothing happened to."""
    root = tmp_path_factory.mktemp("whole")
    pictures = save_pictures(root / "pictures", 4)

    def config(out: Path, **changes: Any) -> RunConfig:
        more: dict[str, Any] = {"data__cache": str(root / "cache"), "train__steps": 4, "train__accumulate": 2}
        return tiny_config(model, pictures, out, **more, **changes)

    train(config(root / "run"))
    return config, root / "run"


def weights(out: Path) -> bytes:
    file = TensorReader(out / "ip-adapter.safetensors")
    return b"".join(file.read(name).numpy().tobytes() for name in sorted(file.names()))


# --- memory -------------------------------------------------------------------------------------------------------------------

ERRORS = [
    MemoryError("no room"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_step_without_memory_saves_what_was_learned(
    whole: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config, undisturbed = whole
    calls, original = [0], AdapterStep.forward

    def failing(self: AdapterStep, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 8:  # amid the fourth step, which no state is due before
            raise error
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterStep, "forward", failing)
        with pytest.raises(TrainingFailed, match=r"memory ran out after step 3 .*; step 3 is saved") as caught:
            train(config(tmp_path))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "state-00000003").is_dir()
    train(config(tmp_path))
    assert weights(tmp_path) == weights(undisturbed)


def test_an_update_without_memory_is_not_saved(
    whole: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some weights may be of the new step and others not."""
    config, undisturbed = whole
    calls, original = [0], torch.optim.AdamW.step

    def failing(self: torch.optim.AdamW, *args: Any) -> Any:
        calls[0] += 1
        found = original(self, *args)
        if calls[0] == 4:
            raise MemoryError
        return found

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", failing)
        with pytest.raises(TrainingFailed, match=r"after step 3 .*the newest saved state is from before it"):
            train(config(tmp_path))
    assert not (tmp_path / "state-00000003").exists()
    train(config(tmp_path))
    assert weights(tmp_path) == weights(undisturbed)


def test_looks_without_memory_cost_no_training(
    whole: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, undisturbed = whole

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(Validator, "validate", failing)
    monkeypatch.setattr(Validator, "sheet", failing)
    monkeypatch.setattr(log, "draw_losses", failing)
    watched = config(tmp_path, watch__validate_every=2, watch__sample_every=2, watch__plot=True)
    assert train(watched).step == 4
    said = capsys.readouterr().err
    assert said.count("no validation at step") == 3
    assert said.count("no sample sheet at step") == 2
    assert said.count("loss.png could not be drawn (MemoryError: no room)") == 1
    assert weights(tmp_path) == weights(undisturbed)


def test_a_lora_without_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = save_pictures(tmp_path / "pictures", 2)
    config = tiny_config(
        model, pictures, tmp_path / "run", adapter__family="base", lora__rank=2, train__steps=2, watch__validate_every=1,
        watch__validation=1,
    )  # fmt: skip
    write_config(config, tmp_path / "run.toml")

    def failing(*args: Any) -> Any:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Validator, "validate", failing)
        patch.setattr(LoRAStep, "forward", failing)
        assert main(["train", str(tmp_path / "run.toml")]) == 1
    said = capsys.readouterr().err
    assert said.count("ipadapter: memory ran out after step 0 (MemoryError: no room); step 0 is saved") == 1
    assert "Traceback" not in said
    assert main(["train", str(tmp_path / "run.toml")]) == 0


# --- signals ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asks", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("command", ["train", "cache"])
def test_a_signal_while_caching_is_one_sentence_and_keeps_what_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asks: signal.Signals,
    command: str,
) -> None:  # fmt: skip
    pictures = save_pictures(tmp_path / "pictures", 6)
    config = tiny_config(
        model, pictures, tmp_path / "run", data__cache=str(tmp_path / "cache"), data__encode_batch=1, train__steps=1
    )
    write_config(config, tmp_path / "run.toml")
    monkeypatch.setattr(cache, "SHARD", 2)
    calls, original, handlers = [0], TargetEncoders.latents, signal.getsignal(asks)

    def asking(self: TargetEncoders, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            os.kill(os.getpid(), asks)
        return original(self, *args)

    monkeypatch.setattr(TargetEncoders, "latents", asking)
    assert main([command, str(tmp_path / "run.toml")]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"interrupted by {asks.name}; ")
    assert "the same command goes on" in said
    assert signal.getsignal(asks) is handlers
    assert len(list((tmp_path / "cache").glob("*/shard-*.json"))) == 2, "the neutral features and one of two pictures"
    calls[0] = 10
    assert main([command, str(tmp_path / "run.toml")]) == 0
    assert calls[0] == 14, "the other four are encoded"


def test_what_a_process_was_told_to_outlive_it_outlives() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with asked_to_stop() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked(), "nohup"
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_to_all_processes_leaves_the_workers_alone(whole: tuple[Config, Path], tmp_path: Path) -> None:
    """As service managers and Slurm send it: without its workers the main process could not finish its step."""
    config, undisturbed = whole
    child = os.fork()
    if child == 0:
        os.setsid()
        calls, original = [0], AdapterStep.forward

        def asking(self: AdapterStep, *args: Any) -> Any:
            calls[0] += 1
            if calls[0] == 5:
                os.killpg(0, signal.SIGTERM)
            return original(self, *args)

        AdapterStep.forward = asking  # type: ignore[method-assign]
        outcome = train(config(tmp_path, data__workers=1))
        os._exit(7 if outcome.stopped and outcome.step == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert (tmp_path / "state-00000003").is_dir()
    train(config(tmp_path))
    assert weights(tmp_path) == weights(undisturbed)


def test_a_closed_terminal_costs_nothing(whole: tuple[Config, Path], tmp_path: Path) -> None:
    """It sends SIGHUP, and from then on every line that is written to it is an error."""
    config, undisturbed = whole
    write_config(config(tmp_path), tmp_path / "run.toml")
    reading, writing = os.pipe()
    child, terminal = pty.fork()
    if child == 0:
        original, calls = AdapterStep.forward, [0]

        def waiting(self: AdapterStep, *args: Any) -> Any:
            calls[0] += 1
            if calls[0] == 5:
                os.write(writing, b"x")
                with contextlib.suppress(OSError):  # as soon as the terminal is closed
                    while os.write(1, b"."):
                        time.sleep(0.01)
            return original(self, *args)

        AdapterStep.forward = waiting  # type: ignore[method-assign]
        os._exit(main(["train", str(tmp_path / "run.toml")]))
    os.read(reading, 1)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert (tmp_path / "state-00000003").is_dir()
    train(config(tmp_path))
    assert weights(tmp_path) == weights(undisturbed)


# --- other pictures -----------------------------------------------------------------------------------------------------------


def test_other_pictures_are_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = save_pictures(tmp_path / "pictures", 6)
    shutil.copytree(pictures, tmp_path / "moved")

    def run(data: Path, steps: int, **changes: Any) -> str:
        capsys.readouterr()
        more: dict[str, Any] = {"watch__validation": 0, "output__state_every": 1, "train__steps": steps, **changes}
        assert train(tiny_config(model, data, tmp_path / "run", **more)).step == steps
        return capsys.readouterr().err

    run(pictures, 1)
    assert "pictures and captions are not" not in run(tmp_path / "moved", 2), "the same ones at another place"
    (tmp_path / "moved/subject0/0.txt").write_text("another caption")
    picture(90).save(tmp_path / "moved/subject0/1.png")
    (tmp_path / "moved/subject1/2.png").unlink()
    for number in (7, 8, 9):
        picture(number).save(tmp_path / f"moved/subject1/{number}.png")
    said = run(tmp_path / "moved", 3)
    assert (
        "pictures and captions are not those of the state: 3 added, 1 removed, 2 changed; the training goes on" in said
    )
    assert "pictures and captions are not" not in run(tmp_path / "moved", 4), "said once"


def test_digests_of_pictures() -> None:
    def sample(name: str, key: str, caption: str = "") -> Sample:
        return Sample(name, key, caption, (1, 1))

    one = [sample("a", "1", "x"), sample("b", "2", "\udcff"), sample("c", "3")]
    assert changes(digests(one), digests(one[::-1])) == ""
    assert changes(digests([]), digests([])) == ""
    assert "3 added;" in changes(digests([]), digests(one))
    assert "3 removed;" in changes(digests(one), digests([]))
    assert "1 changed;" in changes(digests(one), digests([sample("a", "1", "y"), *one[1:]]))
    assert "another kind" in changes(torch.zeros(3), digests(one))
