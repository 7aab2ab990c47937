"""Several processes over gloo, as a launcher starts them: frozen models split, and streams."""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from ipadapter_core import load_adapter
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.training import train, write_config
from ipadapter_core.training.adapter_trainee import AdapterTrainee
from ipadapter_core.training.frozen import load_base
from ipadapter_core.training.log import Log
from ipadapter_core.training.objectives import objective_for
from ipadapter_core.training.rendezvous import agree_on_name, init_method
from ipadapter_core.training.shard import from_launcher
from ipadapter_core.training.stream import ShardBatches, Stream
from tiny_training import picture, save_model, save_pictures, tiny_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"), 9)


def launch(command: list[str], *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes by torchrun, with more options for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        endpoint,
        *options,
    ]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *torchrun, *command],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        start_new_session=True,  # torchrun ends a failed attempt by signalling its whole group
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )


def assert_close(a: Path, b: Path) -> None:
    one, other = (load_adapter(path / "ip-adapter.safetensors").module.checkpoint_state() for path in (a, b))
    for key, value in one.items():
        # sums in another order: float32's last bits, grown by Adam's division in the first steps
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=2e-6)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="train.shard needs torch 2.7, and says so"
)
def test_split_frozen_models_train_what_whole_ones_do(model: Path, pictures: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "data__cache": str(tmp_path / "cache"), "train__steps": 4, "watch__validate_every": 2, "watch__sample_every": 4,
        "watch__sample_steps": 1,
    }  # fmt: skip
    whole = tiny_config(model, pictures, tmp_path / "whole", train__batch=4, **more)
    split = tiny_config(model, pictures, tmp_path / "split", train__shard=True, train__checkpointing=True, **more)
    train(whole)
    write_config(split, tmp_path / "split.toml")
    done = launch(["-m", "ipadapter_core.commands.cli", "train", str(tmp_path / "split.toml")])
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "split", tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "split/progress.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "validation"] == [0, 2, 4]
    assert (tmp_path / "split/sheet.png").is_file()


DIES_ONCE = """
import os, signal, sys
from ipadapter_core.cli import main
from ipadapter_core.training.adapter_trainee import AdapterStep

calls, original = [0], AdapterStep.forward

def forward(self, *args):
    calls[0] += 1
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "0" and calls[0] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args)

AdapterStep.forward = forward
sys.exit(main(sys.argv[1:]))
"""
"""The command, its main process killed amid its third step of two micro-steps; the first state is of the second."""


def test_torchrun_starts_a_killed_run_again_and_it_ends_with_the_same_bits(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"data__cache": str(tmp_path / "cache"), "train__steps": 4, "train__accumulate": 2}
    for name in ("whole", "killed"):
        write_config(tiny_config(model, pictures, tmp_path / name, **more), tmp_path / f"{name}.toml")
    (tmp_path / "dies_once.py").write_text(DIES_ONCE)
    assert launch(["-m", "ipadapter_core.commands.cli", "train", str(tmp_path / "whole.toml")]).returncode == 0
    done = launch([str(tmp_path / "dies_once.py"), "train", str(tmp_path / "killed.toml")], "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert "failed (exitcode: -9)" in done.stderr, "it was to be killed"
    assert "going on after step 2" in done.stderr
    assert done.stdout.count("ip-adapter.safetensors") == 1, "one process tells"
    one, other = (
        load_adapter(tmp_path / n / "ip-adapter.safetensors").module.checkpoint_state() for n in ("whole", "killed")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [json.loads(line) for line in (tmp_path / "killed/progress.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == [1, 2, 3, 4]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_new_attempt_does_not_meet_the_dead(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes agree on a name in a store that others used before, whoever of them comes last."""
    assert init_method() is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert init_method() == "ipadapter://"
    store, names = torch.distributed.HashStore(), list[set[str]]()
    for _ in range(3):
        found: list[str] = []

        def come(rank: int, found: list[str] = found) -> None:
            found.append(agree_on_name(store, rank, 3, timedelta(seconds=20)))

        processes = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
        for process in (*processes[:late], *processes[late + 1 :]):
            process.start()
        time.sleep(0.1)
        processes[late].start()
        for process in processes:
            process.join()
        assert len(found) == 3
        names.append(set(found))
    assert [len(one) for one in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3
    with pytest.raises(TimeoutError, match=r"processes \[1, 2\] of 3 did not come"):
        agree_on_name(store, 0, 3, timedelta(seconds=0.05))


def test_what_cannot_be_split_is_said(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(model, pictures, tmp_path, train__shard=True)
    with pytest.raises(InvalidInputError, match="over several processes and there is one"):
        train(config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert from_launcher(tiny_config(model, pictures, tmp_path)).train.shard
    assert "ACCELERATE_USE_FSDP" not in os.environ
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InvalidInputError, match=r"train\.shard = true, which splits those"):
        train(config)


def test_each_process_streams_its_own_shards(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Uneven shards without a cache: equal steps, no picture in two processes, a bad one named, the same bits resumed."""
    numbers = iter(range(20))
    for shard, count in enumerate((7, 2, 5)):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in itertools.islice(numbers, count):
                buffer = io.BytesIO()
                picture(number).save(buffer, "PNG")
                for name, content in ((f"{number:04}.png", buffer.getvalue()), (f"{number:04}.txt", b"cat")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content) if number != 5 or name.endswith("txt") else 20  # cut off: unreadable
                    tar.addfile(member, io.BytesIO(content))
    more: dict[str, Any] = {
        "data__path": f"pipe:cat {tmp_path}/{{0..2}}.tar", "data__shuffle": 4, "train__steps": 7, "watch__validation": 1,
        "watch__validate_every": 7, "output__state_every": 3,
    }  # fmt: skip
    seen: dict[int, list[str]] = {0: [], 1: []}
    config = tiny_config(model, tmp_path, tmp_path / "one", **more)
    base = load_base(str(model))
    for rank in seen:
        encoders = AdapterTrainee.build(config, base).encoders(torch.device("cpu"))
        stream = Stream(config, encoders, base.tokenize, rank, 2)
        seen[rank] = [record.name for record in itertools.islice(stream.records(), 14)]
        assert [sample.name for sample in stream.held_out.samples] == ["0.tar/0000"]
        again = Stream(config, encoders, base.tokenize, rank, 2).records()
        assert [record.name for record in itertools.islice(again, 14)] == seen[rank]
        feed = ShardBatches(stream, objective_for(base.scheduler, "auto", config.loss), Log(tmp_path, steps=7))
        whole = list(feed.batches(0, 6))
        late = list(feed.batches(4, 6))
        for (a, x), (b, y) in zip(whole[4:], late, strict=True):
            assert torch.equal(a.latents, b.latents)
            assert torch.equal(x.noise, y.noise)
    assert not set(seen[0][:2]) & set(seen[1][:2])
    assert all("0.tar/0000" not in names for names in seen.values())
    train(config)
    assert "streaming 3 shards" in (said := capsys.readouterr().err)
    assert "0.tar/0005" in said
    half = tiny_config(model, tmp_path, tmp_path / "half", **{**more, "train__steps": 3})
    train(half)
    train(tiny_config(model, tmp_path, tmp_path / "half", **more))
    one, other = (
        load_adapter(tmp_path / n / "ip-adapter.safetensors").module.checkpoint_state() for n in ("one", "half")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(InvalidInputError, match=r"data\.pairs needs to know all pictures"):
        train(tiny_config(model, tmp_path, tmp_path / "pairs", **{**more, "data__pairs": 0.5}))


def test_two_processes_stream_the_same_number_of_steps(model: Path, tmp_path: Path) -> None:
    for shard, count in enumerate((9, 2)):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(count):
                buffer = io.BytesIO()
                picture(10 * shard + number).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{number:04}.png")
                member.size = len(buffer.getvalue())
                tar.addfile(member, io.BytesIO(buffer.getvalue()))
    config = tiny_config(
        model, tmp_path, tmp_path / "out", data__path=f"pipe:cat {tmp_path}/{{0..1}}.tar", train__steps=5
    )
    write_config(config, tmp_path / "run.toml")
    done = launch(["-m", "ipadapter_core.commands.cli", "train", str(tmp_path / "run.toml")])
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/progress.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == [1, 2, 3, 4, 5]
