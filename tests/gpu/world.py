"""A section of ``check.py``: one step of every stage in which the demo world learns, eager and recorded as a CUDA graph.

    python tests/gpu/world.py [--toy]

The stages are those of ``train_world all`` on a handful of drawn discs; nothing is kept.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from gpu.rows import attempt, count, cuda, holds, peak, seconds, set_toy, show, without
from ipadapter_core.demo import train_all, train_parts
from ipadapter_core.demo.learner import WARM_STEPS, Learner
from ipadapter_core.demo.pictures import Pictures
from tiny_training import six_discs

DEVICE = torch.device("cuda" if cuda() else "cpu")


def small_unet() -> Any:
    """A UNet for the world's latents and texts that a CPU trains in a second."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=16, out_channels=16, layers_per_block=1, block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=train_parts.TEXT_DIM,
        attention_head_dim=4, norm_num_groups=32,
    )  # fmt: skip


class Measuring(train_all.Workshop):
    """A workshop in which every stage takes a few measured steps instead of its share of the time."""

    def learn(self, stage: str, modules: nn.Module, loss: Callable[[], Tensor], **settings: Any) -> None:
        name = f"world, {stage}, batch {self.batch}"
        steps = WARM_STEPS + 1 if cuda() else 1
        times: dict[str, Callable[[], object]] = {}
        for how, record in (("eager", False), ("recorded", True)):
            if record and not cuda():
                without(f"{name}: recorded", "needs CUDA")
                continue
            learner = Learner(modules, loss, self.device, record=record, **settings)
            modules.train()
            for _ in range(steps):
                learner.step(0.5)
            holds(f"{name}: loss of the {how} step is a number", math.isfinite(learner.last_loss()))
            times[how] = lambda learner=learner: learner.step(0.5)
        found = seconds(times, 3 if cuda() else 1)
        for how, value in found.items():
            show(f"{name}: {how}", 1000 * value, "ms a step")
        if "recorded" in found:
            show(f"{name}: recorded / eager", found["recorded"] / found["eager"], "of the time", 1.0)
            counted = count(times["eager"])
            show(f"{name}: synchronisations in a step", counted.waits, "", 0)
            show(f"{name}: kernels in a step", counted.kernels, "kernels")
            allocated = peak(times["eager"])
            assert allocated is not None
            show(f"{name}: peak memory", allocated, "MB")
        modules.eval().requires_grad_(False)

    def finish(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Nothing is kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    toy = parser.parse_args().toy
    set_toy(toy)
    changed: Any = train_all
    changed.start_on_grid = lambda projector, features: None  # of the pictures of a whole world
    if toy:
        changed.FEW = 256
        changed.train_parts.build_unet = small_unet
    if cuda():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    discs = six_discs()
    pictures = Pictures(discs.rgba, discs.names, discs.studios, discs.held_out, others=1)
    with tempfile.TemporaryDirectory() as folder:
        batch = 4 if toy else 128
        shop = Measuring(pictures, Path(folder), DEVICE, train_all.Settings(1.0, batch))

        def stages() -> None:
            encoder, vae = train_all.image_encoder(shop), train_all.autoencoder(shop)
            train_all.base(shop, encoder, vae, *train_all.together(shop, encoder, vae))

        attempt("world", stages)


if __name__ == "__main__":
    main()
