"""The trainable form: threestudio's construction by name, exactly the trainable parameters, files that come back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core.backends.diffusers import lora as backend
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.lora.selector import parse_selector
from ipadapter_core.lora.trainable import LoRAConv2dLayer, LoRALinearLayer
from ipadapter_core.training.processors import LoRAAttnProcessor, build_lora
from tiny_models import SD15, TOKEN_DIM, call_unet, noise, tiny_unet

X, TEXT = noise(2, 4, 8, 8), noise(2, 5, TOKEN_DIM)
EVERYWHERE = parse_selector("norm: 0")


def run(unet: Any) -> Tensor:
    return call_unet(unet, X, TEXT)


def stir(module: nn.Module) -> None:
    """Give the up matrices, which start at zero, something to say."""
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            if name.endswith("up.weight"):
                p.copy_(noise(*p.shape, seed=i) / 4)


def test_processors_are_sized_block_by_block() -> None:
    """threestudio's loop: hidden size by block from block_out_channels, no context width for attn1."""
    unet = tiny_unet(SD15)
    widths = unet.config.block_out_channels
    build_lora(unet, rank=3)
    for name, processor in unet.attn_processors.items():
        assert isinstance(processor, LoRAAttnProcessor)
        if name.startswith("mid_block"):
            expected = widths[-1]
        elif name.startswith("up_blocks"):
            expected = tuple(reversed(widths))[int(name[len("up_blocks.")])]
        else:
            expected = widths[int(name[len("down_blocks.")])]
        context = None if name.endswith("attn1.processor") else unet.config.cross_attention_dim
        assert (processor.hidden_size, processor.cross_attention_dim, processor.rank) == (expected, context, 3)
        assert processor.to_k_lora.down.in_features == (context or expected)


def test_it_starts_as_nothing_and_scale_0_is_the_frozen_model() -> None:
    unet = tiny_unet("small")
    plain = run(unet)
    lora = build_lora(unet, where=EVERYWHERE)
    assert_close(run(unet), plain, rtol=0, atol=1e-5)
    stir(lora)
    on = run(unet)
    assert float((on - plain).abs().mean()) > 1e-3
    with lora.scaled(0):
        assert_close(run(unet), plain, rtol=0, atol=1e-6)
    assert torch.equal(run(unet), on)


def test_the_scale_of_one_call() -> None:
    unet = tiny_unet("small")
    lora = build_lora(unet)
    stir(lora)
    with lora.scaled(0):
        frozen = run(unet)
    off = call_unet(unet, X, TEXT, cross_attention_kwargs={"lora_scale": 0.0})
    assert torch.equal(off, frozen)


def test_an_optimiser_sees_exactly_the_trainable_layers() -> None:
    unet = tiny_unet("small")
    lora = build_lora(unet, where=parse_selector("all: 0, attn: 1, resnet conv: 1, sampler: 1, ff: 1"))
    trained = {id(p) for p in lora.parameters()}
    assert all(p.requires_grad for p in lora.parameters())
    ours = {id(p) for processor in unet.attn_processors.values() for p in processor.parameters()}
    assert ours <= trained
    own = [p for n, p in unet.named_parameters() if ".processor." not in n]
    assert not any(p.requires_grad for p in own)
    before = [p.detach().clone() for p in own]
    optimiser = torch.optim.SGD(lora.parameters(), lr=0.1)
    unet(X, torch.tensor(500), TEXT).sample.pow(2).mean().backward()
    ups = [p for n, p in lora.named_parameters() if n.endswith("up.weight")]
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in ups)
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, own, strict=True))


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_what_was_trained_runs_as_a_file(alpha: float | None) -> None:
    """Placed on a fresh UNet and run live or merged, it gives what the trainable form gave."""
    unet = tiny_unet("small")
    lora = build_lora(unet, rank=4, alpha=alpha, where=EVERYWHERE)
    stir(lora)
    trained = run(unet)
    weights = lora.weights()
    fresh = tiny_unet("small")
    patch = backend.place(fresh, weights)
    assert not patch.matched.unmatched
    with backend.apply(fresh, patch):
        assert_close(run(fresh), trained, rtol=0, atol=2e-5)
    with backend.merge(fresh, replace(patch, strength=1.0)):
        assert_close(run(fresh), trained, rtol=0, atol=2e-5)
    again = build_lora(tiny_unet("small"), rank=4, alpha=alpha, where=EVERYWHERE)
    again.load_tensors(lora.tensors())
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), again.parameters(), strict=True))


def test_file_names_are_those_of_the_old_processors() -> None:
    lora = build_lora(tiny_unet("one site"))
    stem = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert set(lora.tensors()) == {
        f"{stem}.{attention}.processor.{part}_lora.{side}.weight"
        for attention in ("attn1", "attn2")
        for part in ("to_q", "to_k", "to_v", "to_out")
        for side in ("down", "up")
    }


def test_part_of_an_attention_gets_layers_beside_it() -> None:
    unet = tiny_unet("one site")
    lora = build_lora(unet, where=parse_selector("all: 0, attn2 k: 1, attn2 v: 1"))
    assert {name.rsplit(".", 2)[1] for name in lora.names} == {"to_k", "to_v"}
    plain = run(unet)
    stir(lora)
    assert not torch.equal(run(unet), plain)
    lora.remove()
    assert torch.equal(run(unet), plain)


def test_layers_follow_the_formula_and_the_start() -> None:
    torch.manual_seed(0)
    linear = LoRALinearLayer(64, 32, 16, 8.0)
    assert float(linear.up.weight.detach().abs().max()) == 0
    assert float(linear.down.weight.detach().std()) == pytest.approx(1 / 16, rel=0.1)
    stir(linear)
    x = noise(2, 3, 64)
    assert_close(linear(x), 0.5 * x @ linear.down.weight.T @ linear.up.weight.T)
    conv = LoRAConv2dLayer(4, 6, 2, 3, 2, 1)
    stir(conv)
    assert conv(noise(1, 4, 9, 7)).shape == (1, 6, 5, 4)
    for rank, alpha in ((0, None), (4, 0.0)):
        with pytest.raises(InvalidInputError, match="must be above 0"):
            LoRALinearLayer(4, 4, rank, alpha)
    with pytest.raises(InvalidInputError, match="chooses no layer"):
        build_lora(tiny_unet("one site"), where=parse_selector("all: 0"))
    with pytest.raises(InvalidInputError, match="tensors are missing"):
        build_lora(tiny_unet("one site")).load_tensors({})
