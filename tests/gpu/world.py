"""A section of ``check.py``: one step of every stage in which the demo world learns, eager and recorded as a CUDA graph.

    python tests/gpu/world.py [--toy]

The stages are those of ``train_world all`` with every base model, on a handful of drawn discs; what base models share is measured once.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from gpu.rows import attempt, count, cuda, holds, peak, seconds, set_toy, show, without
from ipadapter_core.demo import train_all
from ipadapter_core.demo.build_world import SHARED
from ipadapter_core.demo.learner import WARM_STEPS, Learner, save_parts
from tiny_world import SMALL, few_pictures

DEVICE = torch.device("cuda" if cuda() else "cpu")


class Measuring(train_all.Workshop):
    """A workshop in which every stage takes a few measured steps instead of its share of the time."""

    def learn(
        self,
        stage: str,
        modules: nn.Module,
        loss: Callable[[], Tensor],
        parts: Callable[[], Mapping[str, train_all.Part]],
        **settings: Any,
    ) -> None:
        name = f"world, {self.base.name}, {stage}, batch {self.batch}"
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
        for part, tensors in parts().items():
            if part in SHARED:
                save_parts(self.work / "parts" / part, tensors)


def no_start(*_: object) -> None:
    """``start_on_grid`` needs the pictures of a whole world."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    toy = parser.parse_args().toy
    set_toy(toy)
    changed: Any = train_all
    changed.start_on_grid = no_start
    if toy:
        changed.FEW = 256
    if cuda():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as folder:
        for name, base in (SMALL if toy else train_all.BASES).items():
            settings = train_all.Settings(1.0, 4 if toy else 128)
            shop = Measuring(few_pictures(), Path(folder), DEVICE, settings, base)
            attempt(f"world, {name}", partial(train_all.stages, shop))


if __name__ == "__main__":
    main()
