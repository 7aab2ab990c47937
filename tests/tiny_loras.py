"""LoRA files of random weights for a model: chosen layers, chosen algorithms, a few kilobytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ipadapter_core.lora import LoRAWeights, Target, load_lora, targets_of
from ipadapter_core.lora.selector import parse_selector
from tiny_models import noise

Weights = dict[str, Tensor]


def low_rank(shape: tuple[int, ...], rank: int, seed: int) -> Weights:
    out, *rest = shape
    columns = math.prod(rest)
    return {
        "lora_down.weight": noise(rank, *rest, seed=seed) / columns**0.5,
        "lora_up.weight": noise(out, rank, *[1] * (len(rest) - 1), seed=seed + 1) / rank**0.5,
        "alpha": torch.tensor(rank / 2),
    }


def dora(axis: int) -> Callable[[tuple[int, ...], int, int], Weights]:
    def make(shape: tuple[int, ...], rank: int, seed: int) -> Weights:
        sizes = [1] * len(shape)
        sizes[axis] = shape[axis]
        return low_rank(shape, rank, seed) | {"dora_scale": noise(*sizes, seed=seed + 2).abs() + 0.5}

    return make


def loha(shape: tuple[int, ...], rank: int, seed: int) -> Weights:
    out, columns = shape[0], math.prod(shape[1:])
    halves = {
        f"hada_w{i}_{side}": noise(*size, seed=seed + 2 * i + j)
        for i in (1, 2)
        for j, (side, size) in enumerate((("a", (out, rank)), ("b", (rank, columns))))
    }
    return {key: t / 2 for key, t in halves.items()} | {"alpha": torch.tensor(rank / 2)}


def lokr(shape: tuple[int, ...], rank: int, seed: int) -> Weights:
    second = noise(shape[0] // 2, shape[1] // 2, *shape[2:], seed=seed) / 4
    return {"lokr_w1": noise(2, 2, seed=seed + 1) / 2, "lokr_w2": second}


def oft(shape: tuple[int, ...], rank: int, seed: int) -> Weights:
    return {"oft_blocks": noise(shape[0] // 4, 4, 4, seed=seed) / 2}


def full(shape: tuple[int, ...], rank: int, seed: int) -> Weights:
    return {
        "diff": noise(*shape, seed=seed) / math.prod(shape[1:]) ** 0.5,
        "diff_b": noise(shape[0], seed=seed + 1) / 4,
    }


def ia3(shape: tuple[int, ...], rank: int, seed: int) -> Weights:
    return {"weight": noise(shape[0], seed=seed) / 2, "on_input": torch.tensor(0)}


MAKERS: dict[str, Callable[[tuple[int, ...], int, int], Weights]] = {
    "LoRA": low_rank,
    "DoRA out": dora(0),
    "DoRA in": dora(1),
    "LoHa": loha,
    "LoKr": lokr,
    "OFT": oft,
    "full": full,
    "IA3": ia3,
}


def state_for(
    targets: Iterable[Target], algorithm: str = "LoRA", *, rank: int = 3, seed: int = 0, prefix: str = "lora_unet_"
) -> Weights:
    """One module per target, by its own name in kohya's key format."""
    state: Weights = {}
    for n, target in enumerate(targets):
        if len(target.shape) > 1:
            module = MAKERS[algorithm](target.shape, rank, 1000 * seed + 7 * n)
            state |= {f"{prefix}{target.path.replace('.', '_')}.{key}": t for key, t in module.items()}
    return state


def tiny_lora(
    model: nn.Module, where: str = "", algorithm: str = "LoRA", *, rank: int = 3, seed: int = 0, name: str | None = None
) -> LoRAWeights:
    """A LoRA on the layers that a selector chooses (all of them without one)."""
    chosen = parse_selector(f"all: 0, {where}" if where else "").chosen(targets_of(model).targets.values())
    if algorithm in ("OFT", "LoKr"):  # blocks of 4, halves
        chosen = [t for t in chosen if t.shape[0] % 4 == 0 and t.shape[1:2] and t.shape[1] % 2 == 0]
    return load_lora(state_for(chosen, algorithm, rank=rank, seed=seed), name=name or f"tiny {algorithm} {seed}")
