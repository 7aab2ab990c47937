"""The loop with another module than an adapter or a LoRA, Muon, and resumption of both."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ipadapter_core.errors import InvalidInputError
from ipadapter_core.generate import to_pillow
from ipadapter_core.training.accelerator import build_accelerator
from ipadapter_core.training.config import RunConfig, parse_config
from ipadapter_core.training.log import Log, curves
from ipadapter_core.training.loop import fit
from ipadapter_core.training.optimizers import Muon
from ipadapter_core.training.order import seeded
from ipadapter_core.training.state import RunFolder
from ipadapter_core.training.step import Step


def small_net(memory: torch.memory_format = torch.contiguous_format) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1), nn.SiLU(), nn.Conv2d(20, 24, 3), nn.Flatten(), nn.Linear(96, 18)
    )
    return net.to(memory_format=memory)


def loss_of(net: nn.Module, step: int) -> Tensor:
    generator = seeded("test", step)
    images, wanted = torch.randn(4, 3, 4, 4, generator=generator), torch.randn(4, 18, generator=generator)
    return (net(images) - wanted).square().mean()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_muon_updates_matrices_and_convolutions_and_adamw_the_rest(memory: torch.memory_format) -> None:
    net, twin = small_net(memory), small_net()
    made = Muon([{"params": list(net.parameters()), "lr": 1e-2}], weight_decay=0.01, beta2=0.99)
    flat = nn.Parameter(twin[2].weight.data.flatten(1).clone())  # type: ignore[union-attr]
    linear = twin[4].weight
    muon = torch.optim.Muon([flat, linear], lr=2e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rest = [p for name, p in twin.named_parameters() if name not in ("2.weight", "4.weight")]
    adamw = torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.01, betas=(0.9, 0.99))
    for step in range(3):
        for net_, optimizers in ((net, [made]), (twin, [muon, adamw])):
            net_.zero_grad()
            loss_of(net_, step).backward()
            if net_ is twin:
                flat.grad = twin[2].weight.grad.flatten(1)  # type: ignore[union-attr]
            for optimizer in optimizers:
                optimizer.step()
        twin[2].weight.data.copy_(flat.data.view(24, 20, 3, 3))  # type: ignore[union-attr]
    # in channels-last memory the matrices' columns come in another order, so sums round differently, Muon's in bfloat16
    same: dict[str, float] = {"rtol": 0, "atol": 0} if memory == torch.contiguous_format else {"rtol": 0, "atol": 3e-3}
    for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, **same, msg=lambda text, name=name: f"{name}: {text}")
    assert (net[2].weight - small_net()[2].weight).abs().mean() > 5e-3  # type: ignore[operator]


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(InvalidInputError, match=r"muon needs torch 2\.9 or newer, this is 2\."):
        Muon([{"params": list(small_net().parameters()), "lr": 1e-3}], weight_decay=0.0, beta2=0.99)


class LossStep(Step):
    """A module and a loss of it by the number of the step."""

    def __init__(self, net: nn.Module, kill_at: int) -> None:
        super().__init__()
        self.net, self.kill_at = net, kill_at

    @property
    def learned(self) -> nn.Module:
        return self.net

    def forward(self, step: int) -> Tensor:
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_of(self.net, step)


class Steps:
    """A feed of nothing but numbers."""

    def batches(self, micro: int, end: int) -> Iterator[tuple[int]]:
        return ((step,) for step in range(micro, end))


class Sheets:
    """Sheets of a module's first weights, no validation."""

    def validate(self, module: LossStep) -> None:
        return None

    def sheet(self, module: LossStep, state: dict[str, Tensor]) -> Image.Image:
        return to_pillow(state["0.weight"][0].detach().permute(1, 2, 0).clamp(0, 1))


class ModuleFile:
    """The averaged weights of a finished run."""

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.path / "net.safetensors"

    def checkpoint(self, step: int, state: dict[str, Tensor], averaged: dict[str, Tensor] | None) -> None:
        """Only the states are kept."""

    def finish(self, step: int, state: dict[str, Tensor]) -> None:
        save_file({key: value.contiguous() for key, value in state.items()}, self.path)

    def file(self, step: int | None) -> Path:
        return self.path


def settings(work: Path, optimizer: str) -> RunConfig:
    values: dict[str, Any] = {
        "train": {
            "steps": 7, "lr": 1e-2, "optimizer": optimizer, "beta2": 0.99, "schedule": "cosine", "warmup": 0, "ema": 0.995,
            "device": "cpu",
        },
        "watch": {"log_every": 1, "validate_every": 0, "sample_every": 3, "tensorboard": False},
        "output": {"folder": str(work / "run"), "name": "net", "state_every": 3, "save_every": 0},
    }  # fmt: skip
    return parse_config(values, "net")


@pytest.mark.parametrize(("optimizer", "memory"), [("muon", torch.channels_last), ("adamw", torch.contiguous_format)])
def test_a_run_killed_and_resumed_is_bit_identical(tmp_path: Path, optimizer: Any, memory: torch.memory_format) -> None:
    def run(work: Path, kill_at: int = -1) -> dict[str, Tensor]:
        config = settings(work, optimizer)
        folder = RunFolder(config.output)
        folder.prepare()
        with Log(folder.path, steps=7, tensorboard=False) as log:
            step, files = LossStep(small_net(memory), kill_at), ModuleFile(folder)
            outcome = fit(config, build_accelerator(config), step, Steps(), folder, log, Sheets(), files)
        return load_file(outcome.file)

    whole = run(tmp_path / "whole")
    child = os.fork()
    if child == 0:
        run(tmp_path / "halves", kill_at=5)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / "halves/run/state-00000003").is_dir()
    halves = run(tmp_path / "halves")
    assert all(torch.equal(halves[key], value) for key, value in whole.items())
    assert not torch.equal(whole["0.weight"], small_net()[0].weight)
    logs = [curves(tmp_path / name / "run/progress.jsonl")["loss"] for name in ("whole", "halves")]
    assert logs[0] == logs[1]
    for name in ("loss.png", "sheet.png"):
        assert (tmp_path / "halves/run" / name).is_file()
    again = run(tmp_path / "whole")
    assert all(torch.equal(again[key], value) for key, value in whole.items()), "a finished run is only loaded"
