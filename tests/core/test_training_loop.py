"""The loop with other modules than an adapter: the demo's stages, Muon, and resumption of both."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ipadapter_core.demo import train_parts
from ipadapter_core.demo.pictures import Pictures
from ipadapter_core.demo.stages import picture_grid, stage_config, train_stage
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.training.log import curves
from ipadapter_core.training.optimizers import Muon
from ipadapter_core.training.order import seeded
from tiny_training import six_discs


@pytest.fixture
def pictures() -> Pictures:
    return six_discs()


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


@pytest.mark.parametrize(("optimizer", "memory"), [("muon", torch.channels_last), ("adamw", torch.contiguous_format)])
def test_a_stage_killed_and_resumed_is_bit_identical(
    tmp_path: Path, optimizer: Any, memory: torch.memory_format
) -> None:
    def run(work: Path, kill_at: int = -1) -> dict[str, Tensor]:
        net = small_net(memory)

        def loss(step: int) -> Tensor:
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss_of(net, step)

        def draw() -> Image.Image:
            return picture_grid(net[0].weight[:4, :3].detach() + 0.5, 2)

        config = stage_config("stage", work, steps=7, lr=1e-2, seed=0, optimizer=optimizer, every=3)
        config = replace(config, watch=replace(config.watch, log_every=1))
        return train_stage(config, net, loss, draw).state_dict()

    whole = run(tmp_path / "whole")
    child = os.fork()
    if child == 0:
        run(tmp_path / "halves", kill_at=5)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / "halves/stage/state-00000003").is_dir()
    halves = run(tmp_path / "halves")
    assert all(torch.equal(halves[key], value) for key, value in whole.items())
    assert not torch.equal(whole["0.weight"], small_net()[0].weight)
    logs = [curves(tmp_path / name / "stage/progress.jsonl")["loss"] for name in ("whole", "halves")]
    assert logs[0] == logs[1]
    for name in ("loss.png", "sheet.png", "stage.safetensors"):
        assert (tmp_path / "halves/stage" / name).is_file()
    again = run(tmp_path / "whole")
    assert all(torch.equal(again[key], value) for key, value in whole.items()), "a finished stage is only loaded"


def test_the_worlds_unet_is_trained_by_the_same_loop(
    pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(unet: nn.Module, text: Tensor, empty: Tensor) -> Tensor:
        return torch.zeros(len(text), train_parts.LATENT_CHANNELS, 16, 16)

    monkeypatch.setattr(train_parts, "sample", sample)
    index = torch.arange(5).repeat(40)
    scenes = train_parts.draw_scenes(pictures, index, seeded(0), recolour_rate=0.5)
    autoencoder = train_parts.build_autoencoder(*train_parts.patch_pca(scenes.images))
    tokenizer = train_parts.world_tokenizer(pictures, tmp_path / "tokenizer")
    before = train_parts.build_unet().conv_in.bias
    unet, _ = train_parts.train_unet(pictures, tokenizer, autoencoder, tmp_path, 2, 2)
    assert not torch.equal(unet.conv_in.bias, before)
    assert all(torch.isfinite(p).all() for p in unet.parameters())
    with Image.open(tmp_path / "unet/sheet.png") as sheet:
        assert sheet.size == (8 * 64, 2 * 64)
    assert (tmp_path / "unet/state-00000002").is_dir()
