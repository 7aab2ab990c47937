"""Whole trainings on a tiny model: losses with and without a cache, resumption after any death, files, guards."""

# pyright: basic, reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from PIL import Image
from torch import Tensor

from dying import dies, kill_at, two_processes
from ipadapter_core import load_adapter
from ipadapter_core.commands.cli import main
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.training import RunConfig, TrainingFailed, dry_run, train, write_config
from ipadapter_core.training import loop as loop_module
from ipadapter_core.training.adapter_trainee import AdapterStep
from ipadapter_core.training.config import OutputConfig
from ipadapter_core.training.frozen import checkpoint_blocks, load_base, load_encoder, onto
from ipadapter_core.training.log import Log, curves
from ipadapter_core.training.state import RunFolder, write_note
from tiny_training import fingerprint, picture, save_model, save_pictures, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"), 9)


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in events(out, "step")]


def state(out: Path, name: str = "ip-adapter") -> dict[str, Tensor]:
    return load_adapter(out / f"{name}.safetensors").module.checkpoint_state()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not torch.equal(a[key], b[key]) for key in a)


# --- the same numbers with and without a cache ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["base", "plus"])
def test_a_cache_changes_no_loss(model: Path, pictures: Path, tmp_path: Path, family: str) -> None:
    more: dict[str, Any] = {
        "adapter__family": family, "adapter__depth": 1, "data__augment": 0.5, "data__variants": 2, "data__pairs": 0.5,
        "data__latents": "sample", "train__steps": 4, "output__state_every": 0, "loss__drop_image": 0.2,
    }  # fmt: skip
    train(tiny_config(model, pictures, tmp_path / "live", **more))
    train(tiny_config(model, pictures, tmp_path / "cached", data__cache=str(tmp_path / "cache"), **more))
    live, cached = losses(tmp_path / "live"), losses(tmp_path / "cached")
    assert len(set(live)) == 4
    # batches of another size in the encoders round differently, in the last bits of float32
    assert cached == pytest.approx(live, rel=1e-5)


def test_what_is_frozen_stays_and_the_file_says_what_it_is(model: Path, pictures: Path, tmp_path: Path) -> None:
    before = load_base(str(model))
    config = tiny_config(model, pictures, tmp_path, output__nested=True, output__dtype="float16", data__workers=1)
    kept: list[AdapterStep] = []
    original = AdapterStep.forward

    def watched(self: AdapterStep, *args: Any) -> Tensor:
        kept.append(self)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterStep, "forward", watched)
        outcome = train(config)
    used = kept[0]._frozen[0]
    for name in ("unet", "vae"):
        assert fingerprint(getattr(used, name)) == fingerprint(getattr(before, name)), name
    assert fingerprint(used.text_encoders[0]) == fingerprint(before.text_encoders[0])
    assert all(name.startswith("adapter.") for name, _ in kept[0].named_parameters())
    assert not any(p.requires_grad for n, p in used.unet.named_parameters() if ".processor." not in n)
    flat, nested = load_adapter(outcome.file), load_adapter(tmp_path / "ip-adapter.bin")
    assert_same(flat.module.checkpoint_state(), nested.module.checkpoint_state())
    assert flat.dtype == torch.float16
    told = flat.metadata
    assert (told["family"], told["feature"], told["unconditional"]) == ("base", "image_embeds", "zero_embeds")
    assert (told["num_tokens"], told["prediction"], told["encoder_size"], told["steps"]) == ("4", "epsilon", "28", "6")
    assert json.loads(told["settings"])["train"]["lr"] == 1e-3
    assert (told["base_files"], json.loads(told["settings"])["model"]["base"]) == (model.name, model.name)
    assert str(tmp_path.parent) not in json.dumps(told), "a file that is shared tells nobody where it was made"
    assert outcome.file.stat().st_size < 2 * 3680 + 10_000, "only the adapter is in it"


def test_the_result_loads_in_diffusers(model: Path, pictures: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    outcome = train(tiny_config(model, pictures, tmp_path, train__steps=2, output__state_every=0))
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name=outcome.file.name)
    encoder = load_encoder(str(model), "")
    features = encoder.encode(torch.randn(2, 3, 28, 28)).image_embeds
    ours = load_adapter(outcome.file)
    theirs = pipeline.unet.encoder_hid_proj.image_projection_layers[0](features)
    torch.testing.assert_close(ours.tokens(features), theirs.reshape(2, 4, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_sdxl_plus_with_other_objectives_and_buckets(sdxl: Path, tmp_path: Path, prediction: str) -> None:
    for number in range(4):
        picture(number, ((40, 40), (64, 32))[number % 2]).save(tmp_path / f"{number}.png")
    config = tiny_config(
        sdxl, tmp_path, tmp_path / "out", model__prediction=prediction, adapter__family="plus", adapter__depth=1,
        adapter__hidden_dim=32, data__buckets=True, data__bucket_step=16, train__steps=3, train__checkpointing=True,
        train__accumulate=2, loss__noise_offset=0.1, loss__min_snr=0.0 if prediction == "flow" else 5.0,
    )  # fmt: skip
    outcome = train(config)
    assert load_adapter(outcome.file).spec.num_tokens == 16
    assert all(0 < loss < 20 for loss in losses(tmp_path / "out"))


def test_checkpointing_acts_and_changes_no_number(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = [0], torch.utils.checkpoint.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    for name, on in (("without", False), ("with", True)):
        train(tiny_config(model, pictures, tmp_path / name, train__checkpointing=on, train__steps=2))
        assert (calls[0] > 0) == on
    unet = load_base(str(model)).unet
    checkpoint_blocks(unet)
    blocks = [part for part in unet.modules() if hasattr(part, "gradient_checkpointing")]
    assert blocks
    assert all(part.gradient_checkpointing and part.training for part in blocks), "diffusers before 0.32 asks for both"
    assert not any(part.training for part in unet.modules() if isinstance(part, torch.nn.Dropout))
    assert_same(state(tmp_path / "with"), state(tmp_path / "without"))


def test_bf16_trains_float32_weights(model: Path, pictures: Path, tmp_path: Path) -> None:
    train(tiny_config(model, pictures, tmp_path / "bf16", train__precision="bf16", train__steps=3))
    train(tiny_config(model, pictures, tmp_path / "fp32", train__steps=3))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.03)
    bits = torch.cat([value.flatten() for value in state(tmp_path / "bf16").values()])
    assert not torch.equal(bits.bfloat16().float(), bits), "the weights are finer than bf16"


# --- death and resumption ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that nothing happened to, and its cache."""
    out = tmp_path_factory.mktemp("uninterrupted")
    train(resumable(model, pictures, out / "run", out / "cache"))
    return out / "run", out / "cache"


def resumable(model: Path, pictures: Path, out: Path, cache: Path) -> RunConfig:
    return tiny_config(
        model,
        pictures,
        out,
        data__cache=str(cache),
        output__save_every=2,
        train__accumulate=2,
        train__schedule="cosine",
    )


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("forward", 1), ("forward", 6), ("forward", 11), ("adapter file", 3), ("amid the state's files", 2),
        ("amid the state's files", 6), ("before the rename", 2), ("after a sync", 9), ("old state gone", 1),
    ],
)  # fmt: skip
def test_killed_and_resumed_is_bit_identical(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path], place: str, count: int
) -> None:
    whole, cache = uninterrupted
    config = resumable(model, pictures, tmp_path, cache)
    arm = kill_at(AdapterStep, place, count)

    def work() -> None:
        arm()
        train(config)

    status = dies(work)
    assert os.WIFSIGNALED(status), f"it was to be killed at {place} {count}, and ended with {status}"
    assert os.WTERMSIG(status) == signal.SIGKILL
    train(config)
    for name in ("ip-adapter", "ip-adapter-00000006", "ip-adapter-00000006-ema", "ip-adapter-00000004"):
        assert_same(state(tmp_path, name), state(whole, name))
    assert losses(tmp_path) == losses(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_the_log_is_that_of_an_undisturbed_run(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path]
) -> None:
    """Also where a state lies between two lines, each a mean over three steps."""
    more: dict[str, Any] = {"data__cache": str(uninterrupted[1]), "watch__log_every": 3}
    train(tiny_config(model, pictures, tmp_path / "whole", **more))
    killed = tiny_config(model, pictures, tmp_path / "killed", **more)
    dies(lambda: (kill_at(AdapterStep, "forward", 3)(), train(killed)))
    train(killed)
    assert len(losses(tmp_path / "whole")) == 2
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_state_is_never_replaced_by_a_half_one(tmp_path: Path) -> None:
    """Saved twice at one step (after a disk that was full), the first is kept and not taken away first."""
    folder = RunFolder(tiny_config(tmp_path, tmp_path, tmp_path / "run").output)
    for content in ("first", "second"):
        folder.unfinished(4).mkdir(parents=True)
        (folder.unfinished(4) / "weights").write_text(content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", lambda a, b, move=os.replace: (check(), move(a, b)))

            def check(content: str = content) -> None:
                assert content == "first" or folder.newest() is not None, "between two renames there is a state"

            folder.finish(4, {"step": 4})
    assert (folder.path / "state-00000004/weights").read_text() == "first"
    assert [path.name for path in folder.path.iterdir()] == ["state-00000004"]


@pytest.mark.parametrize("asks", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_saves_and_goes_on(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path], capsys: pytest.CaptureFixture[str],
    asks: signal.Signals,
) -> None:  # fmt: skip
    before = signal.getsignal(asks)
    whole, cache = uninterrupted
    config = resumable(model, pictures, tmp_path / "run", cache)
    write_config(config, tmp_path / "run.toml")
    calls = [0]
    original = AdapterStep.forward

    def interrupting(self: AdapterStep, *args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 5:
            os.kill(os.getpid(), asks)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterStep, "forward", interrupting)
        assert main(["train", str(tmp_path / "run.toml")]) == 130
    assert "stopped after step 3; the same command goes on from there" in capsys.readouterr().err
    assert (tmp_path / "run/ip-adapter-00000003.safetensors").is_file()
    assert events(tmp_path / "run", "stopped")
    saved = tmp_path / "run/state-00000003"
    noted = json.loads((saved / "run.json").read_text())
    del noted["config"]["train"]["beta2"], noted["checksum"]  # as a version before that key would have left it
    write_note(saved, noted)
    assert main(["train", str(tmp_path / "run.toml"), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["event"] == "done"
    assert lines[-1]["steps"] == 6
    assert_same(state(tmp_path / "run"), state(whole))
    assert signal.getsignal(asks) is before


def test_two_runs_do_not_write_to_one_folder(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(model, pictures, tmp_path / "run", train__steps=1)
    reading, writing = os.pipe()
    other = os.fork()
    if other == 0:
        with RunFolder(config.output).alone():
            os.write(writing, b"locked")
            time.sleep(60)
        os._exit(0)
    os.read(reading, 6)
    with pytest.raises(InvalidInputError, match=r"another training is writing to .*run; wait for it"):
        train(config)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    threading.Timer(0.5, os.kill, (other, signal.SIGKILL)).start()
    assert train(config).step == 1
    assert os.waitpid(other, 0)[1] == signal.SIGKILL, "it waited for the other's end"
    assert "waiting for its end" in capsys.readouterr().err


@pytest.mark.parametrize(("launcher", "code"), [("", 130), ("TORCHELASTIC_RUN_ID", 0)])
def test_a_stop_file_ends_a_run_for_good(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, code: int
) -> None:
    """torchrun starts again what ends with an error, so this is none there."""
    if launcher:
        monkeypatch.setenv(launcher, "1")
    config = tiny_config(model, pictures, tmp_path / "run")
    write_config(config, tmp_path / "run.toml")
    original = AdapterStep.forward

    def asking(self: AdapterStep, *args: Any) -> Tensor:
        (tmp_path / "run/stop").touch()
        return original(self, *args)

    monkeypatch.setattr(AdapterStep, "forward", asking)
    assert main(["train", str(tmp_path / "run.toml")]) == code
    assert events(tmp_path / "run", "stopped")[0]["step"] == 1
    assert not (tmp_path / "run/stop").exists()


def test_other_settings_are_not_mixed_into_a_run(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path]
) -> None:
    whole, cache = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    changed = resumable(model, pictures, run, cache).as_dict()
    changed["train"]["lr"] = 0.5
    from ipadapter_core.training import parse_config

    with pytest.raises(InvalidInputError, match=r"train\.lr: 0\.001 → 0\.5.*another output\.folder"):
        train(parse_config(changed, "here"))
    changed["train"]["lr"], changed["watch"]["validation"] = 1e-3, 1
    with pytest.raises(InvalidInputError, match=r"watch\.validation: 2 → 1"):  # it decides what is trained on
        train(parse_config(changed, "here"))
    changed["watch"]["validation"], changed["watch"]["log_every"], changed["train"]["steps"] = 2, 1, 7
    assert train(parse_config(changed, "here")).step == 7, "a run may be made longer"
    assert [row["step"] for row in events(run, "step")] == list(range(1, 8))
    assert differ(state(run), state(whole))


def test_the_launchers_settings_do_not_replace_the_configs(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # as accelerate's own config file can say
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(resumable(model, pictures, tmp_path, uninterrupted[1]))
    assert_same(state(tmp_path), state(uninterrupted[0]))


# --- disks, bad numbers, old files ------------------------------------------------------------------------------------------


def test_a_full_disk_costs_no_training(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path]
) -> None:
    whole, cache = uninterrupted
    config = resumable(model, pictures, tmp_path, cache)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original, calls = AdapterStep.forward, [0]

    def filling(self: AdapterStep, *args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] in (3, 7):  # from the second step to the third nothing larger than this can be written
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if calls[0] == 3 else limits[0], limits[1]))
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterStep, "forward", filling)
        try:
            train(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(events(tmp_path, "save failed")) >= 2
    assert_same(state(tmp_path), state(whole))
    assert (tmp_path / "state-00000006").is_dir()
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".tmp", ".unfinished")]


def test_a_disk_that_stays_full_is_named_and_loses_nothing(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path]
) -> None:
    whole, cache = uninterrupted
    config = resumable(model, pictures, tmp_path, cache)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original, calls = AdapterStep.forward, [0]

    def filling(self: AdapterStep, *args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 6:  # the third step; the second's state is saved
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterStep, "forward", filling)
        try:
            with pytest.raises(TrainingFailed, match=r"step 6 could not be saved .* goes on after its newest state"):
                train(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00000002"]
    train(config)
    assert_same(state(tmp_path), state(whole))


def test_a_watcher_that_is_gone_ends_no_run(tmp_path: Path) -> None:
    """ComfyUI was closed: the next line of progress has no reader, and what was learned still has to be saved."""
    script = (
        "import sys; from pathlib import Path; from ipadapter_core.training.log import Log\n"
        "log = Log(Path(sys.argv[1]), steps=3, as_json=True)\n"
        "log.event('step', 1, loss=1.0); input()\n"
        "log.event('step', 2, loss=1.0); log.say('a note'); log.event('step', 3, loss=1.0)\n"
    )
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}, **pipes
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert json.loads(child.stdout.readline())["step"] == 1
    child.stdout.close()
    child.stdin.write(b"\n")
    child.stdin.close()
    assert child.wait(60) == 0, child.stderr.read().decode() if child.stderr else ""
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == 3


def test_a_log_that_cannot_be_written_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, make in enumerate((Path.mkdir, os.mkfifo)):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / "progress.jsonl")
        with Log(folder, steps=1) as log:
            log.begin(0)
            log.event("step", 1, loss=1.0)
            log.plot()
        assert "progress.jsonl could not be written" in capsys.readouterr().err
    os.mkfifo(tmp_path / ".lock")
    with RunFolder(RunConfig(output=OutputConfig(folder=str(tmp_path))).output).alone():
        pass


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    lines = [b'{"event": "step", "step": 1, "loss": 2.0}', b"\xff\xfe", b"[]", b"3", b"[" * 100_000, b'{"loss": 1.0}']
    lines += [
        b'{"step": "x", "loss": 1.0}',
        b'{"step": 2, "loss": "nan"}',
        b'{"step": 3, "loss": 1.0}',
        b'{"step": 4, "lo',
    ]
    (tmp_path / "progress.jsonl").write_bytes(b"\n".join(lines))
    assert curves(tmp_path / "progress.jsonl") == {"loss": ([1, 3], [2.0, 1.0])}
    with Log(tmp_path, steps=1, tensorboard=False) as log:
        log.begin(1)
    assert (tmp_path / "progress.jsonl").read_bytes() == lines[0] + b"\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its writer's thread dies
def test_tensorboard_on_a_full_disk_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Log(tmp_path, steps=9) as log:
        log.begin(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            for step in range(9):
                log.picture("sheet", step, np.random.default_rng(step).integers(0, 255, (64, 64, 3), np.uint8))
                time.sleep(0.02)  # its own thread writes
            log.event("step", 9, loss=1.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "tensorboard" in capsys.readouterr().err
    assert [row["step"] for row in events(tmp_path, "step")] == [9]


def test_a_folder_that_cannot_be_written(model: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match=r"output\.folder .* cannot be written"):
        train(tiny_config(model, pictures, tmp_path / "file/run"))


def test_steps_without_numbers_are_skipped_and_end_the_run(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cache = uninterrupted
    original, calls, bad = AdapterStep.forward, [0], {2}

    def poisoned(self: AdapterStep, *args: Any) -> Tensor:
        calls[0] += 1
        loss = original(self, *args)
        return loss * float("nan") if calls[0] in bad else loss

    monkeypatch.setattr(AdapterStep, "forward", poisoned)
    more: dict[str, Any] = {"data__cache": str(cache), "output__state_every": 0}
    train(tiny_config(model, pictures, tmp_path / "one", **more))
    assert [row["step"] for row in events(tmp_path / "one", "bad step")] == [2]
    assert events(tmp_path / "one", "done")[0]["bad_steps"] == 1
    assert all(torch.isfinite(value).all() for value in state(tmp_path / "one").values())
    calls[0], bad = 0, set(range(3, 99))
    with pytest.raises(TrainingFailed, match="steps 3 to 5 gave gradients that are no numbers"):
        train(tiny_config(model, pictures, tmp_path / "all", train__bad_steps=3, **more))


def test_old_files_go_and_the_last_stay(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path]
) -> None:
    config = tiny_config(
        model, pictures, tmp_path, data__cache=str(uninterrupted[1]), output__save_every=1, output__keep=2,
        output__keep_states=2, output__state_every=1, train__ema=0.0,
    )  # fmt: skip
    train(config)
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if name.endswith(".safetensors")} == {
        "ip-adapter.safetensors", "ip-adapter-00000005.safetensors", "ip-adapter-00000006.safetensors",
    }  # fmt: skip
    assert {name for name in names if name.startswith("state")} == {"state-00000005", "state-00000006"}


def test_fine_tuning_starts_from_a_file(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path]
) -> None:
    whole, cache = uninterrupted
    more: dict[str, Any] = {"data__cache": str(cache), "adapter__start_from": str(whole / "ip-adapter.safetensors")}
    train(tiny_config(model, pictures, tmp_path / "a", train__steps=1, train__lr=1e-9, train__ema=0.0, **more))
    for key, value in state(tmp_path / "a").items():
        torch.testing.assert_close(value, state(whole)[key], rtol=0, atol=1e-6)
    with pytest.raises(InvalidInputError, match=r"holds a base adapter, but adapter\.family is 'plus'"):
        train(tiny_config(model, pictures, tmp_path / "b", adapter__family="plus", **more))


@pytest.mark.parametrize(
    ("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("adafactor", ""), ("muon", "")]
)
def test_optimizers_by_name(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path], name: str, package: str
) -> None:
    import importlib.util

    config = tiny_config(
        model, pictures, tmp_path, train__optimizer=name, train__steps=2, data__cache=str(uninterrupted[1])
    )
    if package and importlib.util.find_spec(package) is None:
        with pytest.raises(InvalidInputError, match=f"pip install {package}"):
            train(config)
    elif name != "adamw8bit":  # on a CPU bitsandbytes has no kernels
        assert train(config).step == 2


@pytest.mark.parametrize("name", ["muon", "adafactor", "prodigy"])
def test_other_optimizers_resume_with_the_same_bits(model: Path, pictures: Path, tmp_path: Path, name: str) -> None:
    more: dict[str, Any] = {
        "adapter__family": "plus", "adapter__depth": 1, "adapter__hidden_dim": 32, "train__optimizer": name,
        "data__cache": str(tmp_path / "cache"), "train__lr": 1e-2, "train__steps": 4,
    }  # fmt: skip
    config = tiny_config(model, pictures, tmp_path / "whole", **more)
    train(config)
    halves = tiny_config(model, pictures, tmp_path / "halves", **more)
    status = dies(lambda: (kill_at(AdapterStep, "forward", 4)(), train(halves)))
    assert os.WTERMSIG(status) == signal.SIGKILL
    train(halves)
    assert_same(state(tmp_path / "halves"), state(tmp_path / "whole"))
    train(tiny_config(model, pictures, tmp_path / "adamw", **{**more, "train__optimizer": "adamw"}))
    assert differ(state(tmp_path / "adamw"), state(tmp_path / "whole"))


# --- seeing ----------------------------------------------------------------------------------------------------------------


def test_what_a_run_shows(model: Path, pictures: Path, tmp_path: Path) -> None:
    config = tiny_config(
        model, pictures, tmp_path, watch__validate_every=2, watch__sample_every=4, watch__tensorboard=True, watch__plot=True,
        watch__sample_prompts=["", "cat"], watch__sample_steps=1, train__steps=4, train__ignore_memory=False,
    )  # fmt: skip
    train(config)
    validations = events(tmp_path, "validation")
    assert [row["step"] for row in validations] == [0, 2, 4]
    assert all({"validation", "image_gain", "reference_gain"} <= set(row) for row in validations)
    assert set(curves(tmp_path / "progress.jsonl")) == {"loss", "validation", "image_gain", "reference_gain"}
    with Image.open(tmp_path / "loss.png") as plot:
        assert plot.size == (800, 600)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 36 - 4, 3 * 36 - 4), "references above, a row per prompt"
    assert list((tmp_path / "tensorboard").iterdir())


def test_watching_changes_no_weight(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path]
) -> None:
    more: dict[str, Any] = {"data__cache": str(uninterrupted[1]), "train__steps": 3, "output__state_every": 0}
    train(tiny_config(model, pictures, tmp_path / "blind", **more))
    train(
        tiny_config(
            model,
            pictures,
            tmp_path / "seeing",
            watch__validate_every=1,
            watch__sample_every=2,
            watch__sample_steps=1,
            **more,
        )
    )
    assert_same(state(tmp_path / "blind"), state(tmp_path / "seeing"))


def test_a_dry_run_tells_and_writes_nothing(model: Path, pictures: Path, tmp_path: Path) -> None:
    text = dry_run(
        tiny_config(model, pictures, tmp_path / "out", data__cache=str(tmp_path / "cache"), train__ignore_memory=False)
    )
    assert "trained: 3,680 parameters" in text
    assert "ip_adapter.1.to_k_ip.weight 128" in text
    assert "9 usable pictures" in text
    assert "memory: about" in text
    assert "s per sample" in text
    assert not list(tmp_path.iterdir())


def test_a_vanished_picture_is_named_and_its_neighbour_taken(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_pictures(tmp_path / "pictures", 3)
    original = loop_module.fit

    def vanishing(*args: Any) -> Any:
        (folder / "subject0/0.png").unlink()
        return original(*args)

    from ipadapter_core.training import run as run_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "fit", vanishing)
        assert train(tiny_config(model, folder, tmp_path / "out", watch__validation=0)).step == 6
    assert "skipped: " in (said := capsys.readouterr().err)
    assert "subject0/0.png" in said


def test_two_pictures_can_be_learned_by_heart(tmp_path: Path) -> None:
    """On the demo world: the loss falls, by way of the image alone, and the sheet shows each its own reference."""
    from ipadapter_core.demo.world import FOLDER, REFERENCES

    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("owl", "leopard"):
        shutil.copy(REFERENCES / f"{name}.png", folder)
        (folder / f"{name}.txt").write_text("emoji")
    config = tiny_config(
        FOLDER, folder, tmp_path / "out", data__cache=str(tmp_path / "cache"), data__resolution=64, adapter__init="zero_v",
        train__steps=40, train__batch=4, train__lr=3e-3, train__ema=0.0, watch__validate_every=40, watch__sample_every=40,
        watch__sample_steps=8, watch__sample_prompts=["emoji"], watch__guidance=2.0, output__state_every=0,
    )  # fmt: skip
    train(config)
    before, after = events(tmp_path / "out", "validation")
    assert before["image_gain"] == before["reference_gain"] == 0, "zero V: the untrained adapter is the base model"
    assert after["validation"] < 0.95 * before["validation"]
    assert after["image_gain"] > 0.05
    assert after["reference_gain"] > 0.2
    with Image.open(tmp_path / "out/sheet.png") as sheet:
        tiles = [sheet.crop((x, y, x + 64, y + 64)).convert("RGB").resize((8, 8)) for y in (0, 68) for x in (0, 68)]
    references, drawn = (torch.tensor([list(t.getdata()) for t in part]).double() for part in (tiles[:2], tiles[2:]))
    distances = (drawn[:, None] - references[None]).square().mean((2, 3))
    assert distances[0, 0] < 0.5 * distances[0, 1], distances
    assert distances[1, 1] < 0.5 * distances[1, 0], distances


# --- two processes -----------------------------------------------------------------------------------------------------------


def test_two_processes_train_what_one_with_twice_the_batch_does(model: Path, pictures: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"train__steps": 4, "train__accumulate": 2, "watch__validate_every": 2, "data__pairs": 0.5}
    one = tiny_config(
        model, pictures, tmp_path / "one", data__cache=str(tmp_path / "cache one"), train__batch=4, **more
    )
    two = tiny_config(
        model, pictures, tmp_path / "two", data__cache=str(tmp_path / "cache two"), train__batch=2, **more
    )
    train(one)
    assert two_processes(lambda rank: train(two)) == [0, 0]
    # sums in another order: float32's last bits, grown by Adam's division in the first steps
    for key, value in state(tmp_path / "two").items():
        torch.testing.assert_close(value, state(tmp_path / "one")[key], rtol=1e-3, atol=2e-6)
    whole = state(tmp_path / "two")
    shutil.rmtree(tmp_path / "two")

    def killed(rank: int) -> None:
        calls, original = [0], AdapterStep.forward

        def last(self: AdapterStep, *args: Any) -> Tensor:
            calls[0] += 1
            if rank == 1 and calls[0] == 6:  # amid the third step; the first state is of the second
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args)

        AdapterStep.forward = last  # type: ignore[method-assign]
        train(two)

    left, gone = two_processes(killed)
    assert gone == signal.SIGKILL
    assert left != 0, "the other process notices and ends"
    assert [path.name for path in (tmp_path / "two").glob("state-*")] == ["state-00000002"]
    assert two_processes(lambda rank: train(two)) == [0, 0]
    assert_same(state(tmp_path / "two"), whole)


def test_another_number_of_processes_goes_on_and_says_what_that_changes(
    model: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more: dict[str, Any] = {"data__cache": str(tmp_path / "cache"), "data__pairs": 0.5}

    def config(name: str, steps: int, batch: int) -> RunConfig:
        return tiny_config(model, pictures, tmp_path / name, train__steps=steps, train__batch=batch, **more)

    train(config("alone", 4, 4))
    assert two_processes(lambda rank: train(config("two", 2, 2))) == [0, 0]
    for name in ("fewer", "same", "again"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
    train(config("same", 4, 4))
    said = capfd.readouterr().err
    assert "processes: 2 of batch 2 → 1 of batch 4; 4 samples at a time as before" in said
    for key, value in state(tmp_path / "same").items():
        torch.testing.assert_close(value, state(tmp_path / "alone")[key], rtol=1e-3, atol=2e-6)
    train(config("fewer", 4, 2))
    said = capfd.readouterr().err
    assert "processes: 2 of batch 2 → 1 of batch 2; 2 samples at a time instead of 4, in another order" in said
    assert "train.batch=4 would have kept both" in said
    assert two_processes(lambda rank: train(config("same", 6, 2))) == [0, 0], "and with more processes"
    assert "processes: 1 of batch 4 → 2 of batch 2; 4 samples at a time as before" in capfd.readouterr().err
    with pytest.raises(InvalidInputError, match=r"train\.batch: 2 → 3"):
        train(config("again", 4, 3))


def test_a_folder_that_is_not_shared_is_named(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on two machines with disks of their own: the second has no state to go on from."""
    monkeypatch.setattr(loop_module, "SHARED_DISK", 0.5)
    cache = str(tmp_path / "cache")

    def work(rank: int, steps: int) -> object:
        return train(tiny_config(model, pictures, tmp_path / f"disk {rank}", data__cache=cache, train__steps=steps))

    assert two_processes(lambda rank: work(rank, 2)) == [0, 0]
    assert all(two_processes(lambda rank: work(rank, 4)))
    assert "the processes see different states" in (said := capfd.readouterr().err)
    assert "(step 2, no state); output.folder must be one folder" in said


# --- text, memory, export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_text_is_encoded_as_the_pipeline_does(kind: str, request: pytest.FixtureRequest) -> None:
    from ipadapter_core.model_folders import load_pipeline

    folder = request.getfixturevalue("model" if kind == "sd15" else "sdxl")
    base, pipeline = load_base(str(folder)), load_pipeline(folder)
    texts = ["cat on red background", ""]
    context, pooled = base.encode_text(base.tokenize(texts))
    expected = pipeline.encode_prompt(texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(context, expected[0])
    assert base.reads_sizes == (kind == "sdxl")
    if pooled is None:
        assert kind == "sd15"
        assert base.added(None, torch.zeros(2, 6)) == {}
    else:
        torch.testing.assert_close(pooled, expected[2])
        sizes = torch.tensor([[48.0, 40.0, 0.0, 4.0, 32.0, 32.0]] * 2)
        ids = pipeline._get_add_time_ids((48, 40), (0, 4), (32, 32), torch.float32, 8)
        assert base.added(pooled, sizes)["time_ids"].tolist() == ids.repeat(2, 1).tolist()


def test_memory_is_counted_and_a_run_that_cannot_fit_is_refused(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipadapter_core.training import memory
    from ipadapter_core.training.adapter_trainee import AdapterTrainee

    config = tiny_config(model, pictures, tmp_path, train__ignore_memory=False, data__cache=str(tmp_path / "cache"))
    base = load_base(str(model))
    trainee = AdapterTrainee.build(config, base)
    adapter = trainee.adapter
    plain, thrifty = (memory.activation_bytes(trainee, (16, 16), 4, checkpointing=on) for on in (False, True))
    assert 0 < thrifty < plain
    assert memory.activation_bytes(trainee, (16, 16), 2, checkpointing=False) == plain // 2

    adapter.install(base.unet)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in (*base.unet.parameters(), *adapter.parameters())}
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            tensors.append(tensor)
        return tensor

    context = torch.randn(1, 77 + 4, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        base.unet(torch.randn(1, 4, 16, 16), torch.zeros(1, dtype=torch.long), context)
    assert plain == pytest.approx(sum(kept.values()), rel=0.1), "what autograd really keeps, flash attention included"

    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    with pytest.raises(
        InvalidInputError,
        match=r"are free; try train\.checkpointing = true.*train\.batch = 1 with train\.accumulate = 2",
    ):
        train(config)


def test_export(
    pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = uninterrupted[0] / "ip-adapter.safetensors"
    assert main(["export", str(source), str(tmp_path / "a.bin"), "--dtype", "float16"]) == 0
    nested = torch.load(tmp_path / "a.bin", weights_only=True)
    assert set(nested) == {"image_proj", "ip_adapter"}
    assert main(["export", str(tmp_path / "a.bin"), str(tmp_path / "b.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] > 0
    half = {key: value.half() for key, value in state(uninterrupted[0]).items()}
    assert_same(load_adapter(tmp_path / "b.safetensors").module.checkpoint_state(), half)


def test_moving_a_model_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """diffusers warns of every other dtype than a model was loaded in, and lists modules that should stay in float32: none."""
    from diffusers.utils import logging

    class Talking(torch.nn.Linear):
        def to(self, *where: Any) -> Any:
            print("lists none", file=sys.stderr if logging.get_verbosity() <= logging.WARNING else sys.stdout)
            return super().to(*where)

    model = Talking(2, 2)
    model.to(torch.float64)
    assert "lists none" in capfd.readouterr().err
    onto(model, torch.device("cpu"), torch.float16)
    assert capfd.readouterr().err == ""
    assert model.weight.dtype == torch.float16
