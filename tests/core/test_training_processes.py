"""Several processes over gloo, as a launcher starts them: frozen models split, a rank that dies and is started again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ipadapter_core import load_adapter
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.training import train, write_config
from ipadapter_core.training.shard import from_launcher
from tiny_training import save_model, save_pictures, tiny_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"), 9)


def launch(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes by torchrun."""
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
    ]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *torchrun, *command],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )


def assert_close(a: Path, b: Path) -> None:
    one, other = (load_adapter(path / "ip-adapter.safetensors").module.checkpoint_state() for path in (a, b))
    for key, value in one.items():
        # sums in another order: float32's last bits, grown by Adam's division in the first steps
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=2e-6)


def test_split_frozen_models_train_what_whole_ones_do(model: Path, pictures: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "data__cache": str(tmp_path / "cache"), "train__steps": 4, "watch__validate_every": 2, "watch__sample_every": 4,
        "watch__sample_steps": 1,
    }  # fmt: skip
    whole = tiny_config(model, pictures, tmp_path / "whole", train__batch=4, **more)
    split = tiny_config(model, pictures, tmp_path / "split", train__shard=True, train__checkpointing=True, **more)
    train(whole)
    write_config(split, tmp_path / "split.toml")
    done = launch(["-m", "ipadapter_core.cli", "train", str(tmp_path / "split.toml")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(tmp_path / "split", tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "split/progress.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "validation"] == [0, 2, 4]
    assert (tmp_path / "split/sheet.png").is_file()


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


def test_a_killed_rank_is_started_again_by_the_launcher(model: Path, pictures: Path, tmp_path: Path) -> None:
    """torchrun --max-restarts: rank 1 dies amid the fourth step of the first attempt, the second goes on after the second."""
    more: dict[str, Any] = {"data__cache": str(tmp_path / "cache"), "train__steps": 5}
    whole = tiny_config(model, pictures, tmp_path / "whole", train__batch=4, **more)
    elastic = tiny_config(model, pictures, tmp_path / "elastic", **more)
    train(whole)
    write_config(elastic, tmp_path / "elastic.toml")
    script = tmp_path / "dying.py"
    script.write_text(f"""
import os, signal, sys
from ipadapter_core.cli import main
from ipadapter_core.training.step import AdapterStep
original, calls = AdapterStep.forward, [0]
def forward(self, *args):
    calls[0] += 1
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and calls[0] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args)
AdapterStep.forward = forward
sys.exit(main(["train", {str(tmp_path / "elastic.toml")!r}]))
""")
    done = launch(["--max-restarts", "1", str(script)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on after step 2" in done.stderr
    assert_close(tmp_path / "elastic", tmp_path / "whole")
