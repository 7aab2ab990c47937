"""The demo's own models in the trainer's loop: ``ipadapter train`` and the stages of the demo world share every step of it."""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files.whole import written_whole
from ..generate import to_pillow
from ..training.accelerator import build_accelerator
from ..training.config import OptimizerName, RunConfig, parse_config
from ..training.log import Log
from ..training.loop import fit
from ..training.state import RunFolder
from ..training.step import Step

Loss = Callable[[int], Tensor]


class LossStep(Step):
    """Modules and a loss of them that draws its own pictures, all by the number of the step."""

    def __init__(self, modules: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.trained = modules
        self._loss = loss

    @property
    def learned(self) -> nn.Module:
        return self.trained

    def forward(self, step: int) -> Tensor:
        return self._loss(step)


class Steps:
    """The feed of a loss that draws its own pictures: nothing but the number of the step."""

    def batches(self, micro: int, end: int) -> Iterator[tuple[int]]:
        return ((step,) for step in range(micro, end))


class Preview:
    """Sheets of the averaged weights: they are put into the modules for as long as the drawing takes."""

    def __init__(self, modules: nn.Module, draw: Callable[[], Image.Image] | None) -> None:
        self.modules, self.draw = modules, draw

    def validate(self, module: LossStep) -> dict[str, float] | None:
        return None

    def sheet(self, module: LossStep, state: dict[str, Tensor]) -> Image.Image | None:
        if self.draw is None:
            return None
        kept = {key: value.clone() for key, value in self.modules.state_dict().items()}
        self.modules.load_state_dict(state)
        try:
            with torch.no_grad():
                return self.draw()
        finally:
            self.modules.load_state_dict(kept)


class ModuleFile:
    """The averaged weights of a finished stage, as safetensors."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def checkpoint(self, step: int, state: dict[str, Tensor], averaged: dict[str, Tensor] | None) -> None:
        """A stage is resumed from its states; nobody uses half-trained parts."""

    def finish(self, step: int, state: dict[str, Tensor]) -> None:
        tensors = {key: value.contiguous() for key, value in state.items()}
        with written_whole(self.file(None)) as place:
            save_file(tensors, place)

    def file(self, step: int | None) -> Path:
        return self.folder.path / f"{self.folder.config.name}.safetensors"


def stage_config(
    name: str,
    work: Path,
    *,
    steps: int,
    lr: float,
    seed: int,
    optimizer: OptimizerName = "adamw",
    every: int = 500,
) -> RunConfig:
    """Warm-up and cosine decay, clipping at 1 and an average of the weights; sheets and states every ``every`` steps."""
    values: dict[str, Any] = {
        "train": {
            "steps": steps, "lr": lr, "optimizer": optimizer, "beta2": 0.99, "schedule": "cosine",
            "warmup": min(200, steps // 10), "ema": 0.995, "seed": seed, "device": "cpu",
        },
        "watch": {"log_every": 50, "validate_every": 0, "sample_every": every, "tensorboard": False},
        "output": {"folder": str(work / name), "name": name, "state_every": every, "save_every": 0},
    }  # fmt: skip
    return parse_config(values, name)


def train_stage(
    config: RunConfig, modules: nn.Module, loss: Loss, preview: Callable[[], Image.Image] | None = None
) -> nn.Module:
    """Minimise ``loss(step)`` over ``modules``; returns them with averaged weights. Started again, it goes on where it was.

    The loss must draw at random by the step's number alone. Raises KeyboardInterrupt when asked to stop.
    """
    folder = RunFolder(config.output)
    folder.prepare()
    with Log(folder.path, steps=config.train.steps, tensorboard=False) as log:
        outcome = fit(
            config,
            build_accelerator(config),
            LossStep(modules, loss),
            Steps(),
            folder,
            log,
            Preview(modules, preview),
            ModuleFile(folder),
        )
    if outcome.stopped:
        raise KeyboardInterrupt
    modules.load_state_dict(load_file(outcome.file))
    return modules


def picture_grid(images: Tensor, columns: int) -> Image.Image:
    """``b 3 y x`` images in 0..1 as one picture of so many columns."""
    return to_pillow(rearrange(images.clamp(0, 1), "(r c) k y x -> (r y) (c x) k", c=columns))
