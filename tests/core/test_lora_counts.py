"""What live LoRAs cost, counted: no weight written on a change of strength, two products per layer however many LoRAs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.attention_cost import Cost, Operations, cost_of
from ipadapter_core.backends.diffusers import lora as backend
from ipadapter_core.lora.patch import LoRAPatch, masked
from tiny_loras import tiny_lora
from tiny_models import TOKEN_DIM, call_unet, noise, tiny_unet

X, TEXT = noise(2, 4, 8, 8), noise(2, 5, TOKEN_DIM)
WHERE = "attn1: 1, attn2: 1, ff: 1, resnet conv: 1"


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.set_num_threads(1)
    return tiny_unet("small")


def patches(unet: nn.Module, count: int) -> list[LoRAPatch]:
    return [backend.place(unet, tiny_lora(unet, WHERE, seed=i)) for i in range(count)]


def added(unet: Any, *found: LoRAPatch) -> Cost:
    plain = cost_of(lambda: call_unet(unet, X, TEXT))
    with backend.apply(unet, *found):
        call_unet(unet, X, TEXT)  # makes the factors once
        live = cost_of(lambda: call_unet(unet, X, TEXT))
    return Cost(
        live.operations - plain.operations,
        live.synchronisations - plain.synchronisations,
        live.products - plain.products,
    )


def layers(patch: LoRAPatch) -> tuple[int, int]:
    """Linear layers and convolutions that it acts on."""
    shapes = [p.target.shape for p in patch.matched.matches]
    return sum(len(s) == 2 for s in shapes), sum(len(s) == 4 for s in shapes)


def test_two_products_per_linear_layer_and_few_operations(unet: Any) -> None:
    (one,) = patches(unet, 1)
    linear, convolutions = layers(one)
    cost = added(unet, one)
    assert cost.synchronisations == 0
    # down and up (addmm) of a linear layer; convolutions count as such, not as products
    assert cost.products == 2 * linear
    assert cost.operations <= 12 * (linear + convolutions), "views included"


def test_more_loras_cost_no_more_products(unet: Any) -> None:
    found = patches(unet, 4)
    one, four = added(unet, found[0]), added(unet, *found)
    assert four.products == one.products
    assert four.operations == one.operations, "equal strengths fold into the product"
    apart = added(unet, *(replace(p, strength=0.1 * (i + 1)) for i, p in enumerate(found)))
    assert apart.products == one.products
    assert apart.synchronisations == 0
    assert apart.operations <= one.operations + 2 * sum(layers(found[0]))


def test_a_strength_per_branch_makes_no_tensor_of_numbers_anew(unet: Any) -> None:
    """Numbers that travel to the device make the host wait: ``lift_fresh`` is what ``torch.tensor`` leaves in a trace."""
    patch = replace(patches(unet, 1)[0], uncond_strength=0.2)
    with Operations() as plain:
        call_unet(unet, X, TEXT)
    with backend.apply(unet, patch, branches=("uncond", "cond")):
        call_unet(unet, X, TEXT)
        with Operations() as live:
            call_unet(unet, X, TEXT)
    assert live.seen["aten.lift_fresh"] == plain.seen["aten.lift_fresh"]
    assert live.seen.total() > plain.seen.total()


def test_strength_0_adds_no_operation(unet: Any) -> None:
    (one,) = patches(unet, 1)
    assert added(unet, replace(one, strength=0.0)) == Cost(0, 0, 0)


class Writes:
    """Counts writes into a model's parameters by their version counters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self.versions()

    def versions(self) -> dict[str, tuple[int, int]]:
        return {name: (p._version, p.data_ptr()) for name, p in self.model.named_parameters()}

    @property
    def count(self) -> int:
        now = self.versions()
        return sum(now[name] != version for name, version in self.before.items())


def test_a_changed_strength_writes_no_weight(unet: Any) -> None:
    (one,) = patches(unet, 1)
    writes = Writes(unet)
    with backend.apply(unet, one) as lora:
        outputs: list[Tensor] = []
        for strength in (0.1, 0.5, -1.0):
            lora.set_strength(strength)
            outputs.append(call_unet(unet, X, TEXT))
    assert writes.count == 0
    assert not torch.equal(outputs[0], outputs[1])
    with backend.merge(unet, one) as merged:
        assert merged.writes == len(one.matched.matches)


def test_a_region_costs_a_share_and_not_a_pass(unet: Any) -> None:
    """Masked LoRAs add multiplications between the products, and an attention each where the text is changed."""
    found = patches(unet, 3)
    calls: list[int] = []
    handle = unet.register_forward_pre_hook(lambda *_: calls.append(1))
    mask = torch.ones(8, 8)
    try:
        with backend.apply(unet, *(masked(p, mask) for p in found)):
            call_unet(unet, X, TEXT)
    finally:
        handle.remove()
    assert len(calls) == 1
