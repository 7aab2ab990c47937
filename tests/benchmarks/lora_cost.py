"""What LoRAs cost: time of a step, of a changed strength and of merging, ours beside PEFT's and ComfyUI's; times only reported.

    python tests/benchmarks/lora_cost.py                    # PEFT's rows where peft is installed
    COMFYUI_PATH=… python tests/benchmarks/lora_cost.py     # and the host's loader and hook LoRAs beside our node

tests/core/test_lora_counts.py asserts what can be counted: products, operations, weight writes, passes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":  # pytest has tests/ on its path already
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.attention_cost import by_host, milliseconds
from ipadapter_core.backends.diffusers import lora as backend
from ipadapter_core.lora.patch import masked
from ipadapter_core.lora.selector import parse_selector
from tiny_loras import tiny_lora
from tiny_models import SD15, call_unet, noise, tiny_unet

RANK = 16
SIZES: dict[str, Any] = {
    "block_out_channels": (64, 128, 256, 256), "norm_num_groups": 32, "attention_head_dim": 8, "cross_attention_dim": 768,
}  # fmt: skip
WHERE = "attn1: 1, attn2: 1, ff: 1"


def unet() -> Any:
    return tiny_unet(SD15, **SIZES)


def step(model: Any) -> Tensor:
    return call_unet(model, noise(2, 4, 32, 32), noise(2, 77, 768))


def ours() -> Iterator[tuple[str, float]]:
    model = unet()
    patches = [backend.place(model, tiny_lora(model, WHERE, rank=RANK, seed=i)) for i in range(4)]
    layers = len(patches[0].matched.matches)
    yield f"plain step ({layers} layers with a LoRA of rank {RANK} below)", milliseconds(lambda: step(model))[0]
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    for name, found in (
        ("live, one LoRA", patches[:1]),
        ("live, four at one strength", patches),
        ("live, four at four strengths", [replace(p, strength=0.2 * (i + 1)) for i, p in enumerate(patches)]),
        ("live, two in two regions", [masked(patches[0], mask), masked(patches[1], 1 - mask)]),
        ("live, one at strength 0", [replace(patches[0], strength=0.0)]),
    ):
        with backend.apply(model, *found):
            yield f"step {name}", milliseconds(lambda: step(model))[0]
    with backend.merge(model, patches[0]):
        yield "step merged", milliseconds(lambda: step(model))[0]
    yield "merge one and take it out again", milliseconds(lambda: backend.merge(model, patches[0]).remove())[0]
    with backend.apply(model, patches[0]) as lora:
        yield "change of strength, live", milliseconds(lambda: lora.set_strength(0.5))[0]


def peft() -> Iterator[tuple[str, float]]:
    """The same LoRA on the same UNet by PEFT's layers."""
    from peft import LoraConfig

    model = unet()
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK / 2, target_modules=_targets(model)), "a")
    model.requires_grad_(False)
    yield "PEFT: step", milliseconds(lambda: step(model))[0]
    yield "PEFT: change of strength", milliseconds(lambda: model.set_adapters("a", 0.5))[0]

    def fuse() -> None:
        model.fuse_lora()
        model.unfuse_lora()

    yield "PEFT: fuse and unfuse", milliseconds(fuse)[0]


def _targets(model: Any) -> list[str]:
    from ipadapter_core.lora import targets_of

    chosen = parse_selector(f"all: 0, {WHERE}").chosen(targets_of(model).targets.values())
    return [t.path for t in chosen if len(t.shape) > 1]


def main() -> None:
    torch.set_num_threads(1)
    for name, value in ours():
        print(f"{name:<72} {value:>9.2f} ms", flush=True)
    try:
        for name, value in peft():
            print(f"{name:<72} {value:>9.2f} ms", flush=True)
    except ModuleNotFoundError as error:
        print(f"PEFT: not measured, {error.name} is not installed")
    print("\n" + by_host("host_loras.py", os.environ.get("COMFYUI_PATH", ""), shown_from="ComfyUI, "))


if __name__ == "__main__":
    main()
