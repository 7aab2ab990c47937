"""A loss minimised for a share of a time on one device, as fast as that goes: what learns, its optimiser, and its recorded step.

On a GPU such small models spend their time on launching kernels: the step is recorded once as a CUDA graph and replayed. On a CPU the
same code runs step by step. Nothing in a step waits for the device.
"""

# pyright: reportPrivateUsage=false, reportArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PART = 15_000_000
"""Bytes of tensors in one file at most; some places carry files of 16 MB and no larger ones."""
MUON_SIDE = 16
"""Matrices that are narrower learn by AdamW."""
MUON_RATE = 2.0
WARM_STEPS = 3
"""Steps of a process before the recording, in which the libraries choose their kernels."""
WARM, FLOOR = 0.03, 0.02
"""Share of the time in which the rate rises, and what it falls to by a cosine."""


def save_parts(folder: Path, tensors: dict[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Write tensors into numbered files of at most PART bytes below ``folder``, which appears whole or not at all."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in sorted(tensors.items()):
        if size and size + value.nbytes > PART:
            parts.append({})
            size = 0
        parts[-1][key] = value.detach().cpu().contiguous()
        size += value.nbytes
    new, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for number, part in enumerate(parts):
        save_file(part, new / f"{number:02d}.safetensors", metadata={"format": "pt", **(facts or {})})
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_parts(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """What ``save_parts`` wrote, with its facts; None if there is nothing."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            facts |= opened.metadata()
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return (tensors, facts) if tensors else None


def generator_on(device: torch.device) -> torch.Generator:
    """The device's own generator of random numbers, which a recorded CUDA graph goes on with."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


class StackedMuon:
    """Muon on matrices and convolutions, AdamW on the rest; equal shapes share one matrix product.

    The rate is a tensor, so that a recorded step follows it. Rates and decay are AdamW's, as in ``training.optimizers.Muon``.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float, momentum: float = 0.95) -> None:
        wide = [p for p in parameters if p.ndim in (2, 4) and min(p.shape[:2]) > MUON_SIDE]
        taken = set(map(id, wide))
        self.rest = [p for p in parameters if id(p) not in taken]
        shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in wide:
            shapes.setdefault((p.shape[0], p.numel() // p.shape[0]), []).append(p)
        self.groups = [(shape, group, [torch.zeros_like(p) for p in group]) for shape, group in shapes.items()]
        self.first = [torch.zeros_like(p) for p in self.rest]
        self.second = [torch.zeros_like(p) for p in self.rest]
        self.count = torch.zeros((), device=parameters[0].device)
        self.decay, self.momentum, self.betas = decay, momentum, (0.9, 0.99)

    def state(self) -> list[Tensor]:
        """All that it remembers, in a fixed order."""
        return [self.count, *self.first, *self.second, *(m for *_, group in self.groups for m in group)]

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        self.count += 1
        keep = 1 - rate * self.decay
        if self.rest:
            gradients = [_gradient(p) for p in self.rest]
            torch._foreach_lerp_(self.first, gradients, 1 - self.betas[0])
            torch._foreach_mul_(self.second, self.betas[1])
            torch._foreach_addcmul_(self.second, gradients, gradients, 1 - self.betas[1])
            scale = torch._foreach_sqrt(self.second)
            torch._foreach_mul_(scale, (1 - self.betas[1] ** self.count).rsqrt())
            torch._foreach_add_(scale, 1e-8)
            update = torch._foreach_div(self.first, scale)
            torch._foreach_mul_(update, -rate / (1 - self.betas[0] ** self.count))
            torch._foreach_mul_(self.rest, keep)
            torch._foreach_add_(self.rest, update)
        for (out, into), group, momenta in self.groups:
            gradients = [_gradient(p) for p in group]
            torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
            ahead = torch._foreach_lerp(gradients, momenta, self.momentum)  # Nesterov's
            directions = orthogonal(torch.stack([g.reshape(out, into) for g in ahead]))
            directions = directions.float() * (-0.2 * max(out, into) ** 0.5 * MUON_RATE * rate)
            torch._foreach_mul_(group, keep)
            torch._foreach_add_(group, [d.reshape(p.shape) for d, p in zip(directions, group, strict=True)])


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices of ``k o i``, roughly: Newton and Schulz' iteration with Keller Jordan's coefficients (Muon)."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x.mT if tall else x


class Learner:
    """Modules, a loss that draws for itself, optimiser and averaged weights; ``run`` goes on where a state was left."""

    def __init__(
        self,
        modules: nn.Module,
        loss: Callable[[], Tensor],
        device: torch.device,
        *,
        lr: float,
        average: float = 0.998,
        decay: float = 0.01,
        record: bool | None = None,
    ) -> None:
        self.modules, self.loss, self.device, self.lr, self.average = modules, loss, device, lr, average
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.optimizer = StackedMuon(self.parameters, decay)
        self.mean = [p.detach().clone() for p in self.parameters]
        self.rate, self.keep = torch.zeros((), device=device), torch.zeros((), device=device)
        self.record = device.type == "cuda" if record is None else record
        self.steps, self.used = 0, 0.0
        self._warm = 0
        self._graph: Any = None
        self._last: Tensor | None = None

    def _step(self) -> Tensor:
        for p in self.parameters:
            p.grad = None
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step(self.rate)
        with torch.no_grad():
            torch._foreach_mul_(self.mean, self.keep)
            torch._foreach_add_(self.mean, torch._foreach_mul(self.parameters, 1 - self.keep))
        return loss.detach()

    def step(self, done: float) -> None:
        """One step at this share of the time, recorded where recording pays."""
        self.rate.fill_(self.lr * rate_at(done))
        self.keep.fill_(min(self.average, (1 + self.steps) / (10 + self.steps)))
        if self._graph is not None:
            self._graph.replay()
        elif not self.record or self._warm < WARM_STEPS:
            self._last = self._step()
            self._warm += 1
        else:
            torch.cuda.synchronize(self.device)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._last = self._step()
            self._graph.replay()  # recording runs nothing
        self.steps += 1

    def run(self, seconds: float, state: Path, *, most: int | None = None, save_every: float = 60.0) -> None:
        """Learn for ``seconds`` in all (or ``most`` steps, at least one), those before a restart included."""
        self.modules.train()
        self.restore(state)
        begun, saved = time.perf_counter() - self.used, self.used
        while self.steps == 0 or (self.used < seconds and (most is None or self.steps < most)):
            self.step(min(self.used / seconds, 1.0))
            if self.device.type == "cuda" and self.steps % 8 == 0:
                torch.cuda.current_stream(self.device).synchronize()  # no more steps than that under way
            self.used = time.perf_counter() - begun
            if self.used - saved > save_every:
                self.store(state)
                saved = self.used
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.mean)
        self.modules.eval().requires_grad_(False)

    def last_loss(self) -> float:
        return math.nan if self._last is None else self._last.item()

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"weight.{i}": p for i, p in enumerate(self.parameters)}
        found |= {f"mean.{i}": m for i, m in enumerate(self.mean)}
        return found | {f"optimizer.{i}": s for i, s in enumerate(self.optimizer.state())}

    def store(self, folder: Path) -> None:
        """Write what ``restore`` needs."""
        tensors = self._tensors() | {"random": generator_on(self.device).get_state()}
        save_parts(folder, tensors, {"steps": str(self.steps), "used": str(self.used)})

    def restore(self, folder: Path) -> None:
        """Go on from a state, if there is one, with the same random numbers."""
        found = load_parts(folder)
        if found is None:
            return
        tensors, facts = found
        with torch.no_grad():
            for key, value in self._tensors().items():
                value.copy_(tensors[key])
        generator_on(self.device).set_state(tensors["random"])
        self.steps, self.used = int(facts["steps"]), float(facts["used"])


def rate_at(done: float) -> float:
    """Factor of the rate at this share of the time: a short rise, then a cosine."""
    return min(1.0, max(done, 1e-3) / WARM) * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))
