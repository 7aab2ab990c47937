"""Image tokens that depend on the timestep: made once per timestep for all sites and both branches; and prompts that share them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fake_model import CHANNELS, HEADS, WIDTH, FakeTransformer, walk_fake
from ipadapter_core import AdapterPatch, AdapterWeights, ImagePrompt, ModelLayout, bake
from ipadapter_core.attention.call import COND, UNCOND, ModelCall, SiteCall
from ipadapter_core.checkpoints.base import Base
from ipadapter_core.models.reach import Reach, every
from tiny_models import noise, tiny_adapter, tiny_prompt

HEUN = [900.0, 700.0, 700.0, 500.0, 500.0, 300.0]
"""Timesteps of a sampler of two evaluations a step: at the step's own, and at the next one's."""
SITES = 3


class Counted(Base):
    """A family whose tokens depend on the timestep, and what it was asked."""

    name = "counted"
    reach = Reach(every, query="normed", join="residual", timed=True)

    def __init__(self) -> None:
        self.tokens_made: list[tuple[float, tuple[int, ...]]] = []
        self.projected: list[tuple[int, float | None, int]] = []

    def tokens_at(self, projector: nn.Module, constant: Tensor, timestep: float) -> Tensor:
        self.tokens_made.append((timestep, tuple(constant.shape)))
        return constant[:, 1:] * (1 + timestep / 1000) + constant[:, :1]

    def key_value(self, module: Any, index: int, tokens: Tensor, timestep: float | None) -> tuple[Tensor, Tensor]:
        self.projected.append((index, timestep, len(tokens)))
        return super().key_value(module, index, tokens, timestep)


class BlockByBlock(Counted):
    reach = replace(Counted.reach, block_by_block=True)


class Constant(Counted):
    reach = replace(Counted.reach, timed=False)


@pytest.fixture
def layout() -> ModelLayout:
    with torch.random.fork_rng(devices=[]):
        found = walk_fake(FakeTransformer())
    assert found is not None
    assert len(found.sites) == SITES
    return found


def adapter_of(form: Counted, layout: ModelLayout) -> AdapterWeights:
    adapter = tiny_adapter(layout)
    return replace(adapter, spec=replace(adapter.spec, format=form))


def model_call(
    patch: AdapterPatch, timestep: float, branches: tuple[int, ...] = (UNCOND, COND), seed: int = 0
) -> list[Tensor]:
    """All sites of one model call, two latents to a branch."""
    asked: list[int] = []

    def read() -> float:
        asked.append(1)
        return timestep

    call = ModelCall(branches, timestep=read)
    b = 2 * len(branches)
    found = [
        patch.add_to(torch.zeros(b, 6, CHANNELS), i, SiteCall(call, noise(b, 6, CHANNELS, seed=seed + i), HEADS))
        for i in range(SITES)
    ]
    assert all(float(out.abs().max()) > 0 or branches == (UNCOND,) for out in found)
    return found


def test_constant_families_project_nothing_while_sampling(layout: ModelLayout) -> None:
    form = Constant()
    adapter = adapter_of(form, layout)
    patch = bake(adapter, tiny_prompt(adapter), layout)
    assert form.projected == [(i, None, 2) for i in range(SITES)]
    form.projected.clear()
    for timestep in HEUN:
        model_call(patch, timestep)
    assert form.projected == []
    assert form.tokens_made == []


@pytest.mark.parametrize("separate", [False, True], ids=["branches batched", "branches apart"])
def test_one_set_per_sigma_for_samplers_of_two_evaluations(layout: ModelLayout, separate: bool) -> None:
    form = Counted()
    adapter = adapter_of(form, layout)
    patch = bake(adapter, tiny_prompt(adapter), layout)
    assert (form.tokens_made, form.projected) == ([], []), "nothing can be made before the timestep is known"
    for timestep in HEUN:
        for branches in ((COND,), (UNCOND,)) if separate else ((UNCOND, COND),):
            model_call(patch, timestep, branches)
    sigmas = list(dict.fromkeys(HEUN))
    assert [timestep for timestep, _ in form.tokens_made] == sigmas, "tokens are made once for all sites and branches"
    assert {shape[0] for _, shape in form.tokens_made} == {2}, "both branches are one batch"
    assert form.projected == [(i, timestep, 2) for timestep in sigmas for i in range(SITES)]


def test_only_the_last_two_timesteps_are_kept(layout: ModelLayout) -> None:
    form = Counted()
    adapter = adapter_of(form, layout)
    patch = bake(adapter, tiny_prompt(adapter), layout)
    for timestep in (900.0, 800.0, 900.0, 800.0, 700.0):
        model_call(patch, timestep)
    assert [timestep for timestep, _ in form.tokens_made] == [900.0, 800.0, 700.0]
    model_call(patch, 900.0)
    assert [timestep for timestep, _ in form.tokens_made][3:] == [900.0]
    patch.release(0, torch.device("cpu"))
    model_call(patch, 900.0)
    assert len(form.tokens_made) == 4, "what is where it shall be stays"
    for i in range(SITES):
        patch.release(i, torch.device("cuda"))
    model_call(patch, 900.0)
    assert [timestep for timestep, _ in form.tokens_made][4:] == [900.0], "what was given back is made again"
    assert len(form.projected) == 5 * SITES


def test_what_is_kept_per_timestep_is_counted_before_it_is_made(layout: ModelLayout) -> None:
    """Two timesteps' tokens, keys and values of both branches; block by block, those of one block."""
    for form, sites in ((Counted(), 2 * SITES), (BlockByBlock(), 1)):
        adapter = adapter_of(form, layout)
        patch = bake(adapter, tiny_prompt(adapter), layout)
        assert patch.held is not None
        tokens = 2 * adapter.spec.num_tokens
        assert patch.held.bytes == 4 * tokens * (2 * WIDTH + sites * 2 * CHANNELS)
        model_call(patch, 900.0)
        patch.held.to("meta")
        model_call(patch, 900.0)
        assert [timestep for timestep, _ in form.tokens_made] == [900.0, 900.0], "what moves away is made again"


def test_block_by_block_keeps_tokens_and_no_keys(layout: ModelLayout) -> None:
    form = BlockByBlock()
    adapter = adapter_of(form, layout)
    prompt = tiny_prompt(adapter)
    patch = bake(adapter, prompt, layout)
    for timestep in HEUN:
        model_call(patch, timestep)
    sigmas = list(dict.fromkeys(HEUN))
    assert [timestep for timestep, _ in form.tokens_made] == sigmas
    assert form.projected == [(i, timestep, 2) for timestep in HEUN for i in range(SITES)]
    kept = Counted()
    other = adapter_of(kept, layout)
    for got, expected in zip(model_call(patch, 450.0), model_call(bake(other, prompt, layout), 450.0), strict=True):
        assert_close(got, expected, rtol=0, atol=0)
    sites: Any = patch.sites
    assert not any(site._kept for site in sites), "keys and values of a site were kept"


@pytest.mark.parametrize("form", [Counted(), BlockByBlock()], ids=["kept", "block by block"])
def test_the_outputs_follow_the_timestep(layout: ModelLayout, form: Counted) -> None:
    """Against the layers called by hand, for several references side by side with tokens of their own each."""
    adapter = adapter_of(form, layout)
    prompt = two_references(adapter)
    patch = bake(adapter, prompt, layout)
    for timestep in (800.0, 100.0, 800.0):
        got = model_call(patch, timestep)
        for i in range(SITES):
            q = noise(4, 6, CHANNELS, seed=i)
            for row in range(4):
                constant = (prompt.uncond, prompt.cond)[row // 2].unflatten(1, (2, -1))
                tokens = constant[:, :, 1:] * (1 + timestep / 1000) + constant[:, :, :1]
                tokens = tokens.flatten(1, 2)
                assert tokens.shape[1] == 2 * (adapter.spec.num_tokens - 1)
                k, v = (layer[i](tokens) for layer in (adapter.module.to_k_ip, adapter.module.to_v_ip))
                heads = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q[row : row + 1], k, v)]
                expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
                assert_close(got[i][row : row + 1], expected.detach(), rtol=0, atol=1e-5)


def two_references(adapter: AdapterWeights) -> ImagePrompt:
    one, two = tiny_prompt(adapter), tiny_prompt(adapter, seed=1)
    return ImagePrompt(
        torch.cat([one.cond, two.cond], 1),
        torch.cat([one.uncond, two.uncond], 1),
        torch.cat([one.features, two.features], 1),
        torch.cat([one.uncond_features, two.uncond_features], 1),
        adapter.name,
        "none",
        WIDTH,
    )


# --- unconditional rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Constant(), Counted()], ids=["constant", "timed"])
def test_off_gives_the_negative_prompt_nothing(layout: ModelLayout, form: Counted) -> None:
    adapter = adapter_of(form, layout)
    patch = bake(adapter, replace(tiny_prompt(adapter), negative_branch="off"), layout)
    for out in model_call(patch, 500.0):
        assert torch.equal(out[:2], torch.zeros_like(out[:2]))
        assert float(out[2:].abs().max()) > 1e-3
    assert {rows for *_, rows in form.projected} == {1}, "keys of a branch that sees nothing were made"
    model_call(patch, 500.0, (UNCOND,))


def test_same_tokens_are_projected_once_for_both_branches(layout: ModelLayout) -> None:
    form = Counted()
    adapter = adapter_of(form, layout)
    prompt = tiny_prompt(adapter)
    got = model_call(bake(adapter, replace(prompt, negative_branch="same"), layout), 500.0)
    assert {rows for *_, rows in form.projected} == {1}
    assert {shape[0] for _, shape in form.tokens_made} == {1}
    twice = adapter_of(Counted(), layout)
    for one, two in zip(got, model_call(bake(twice, replace(prompt, uncond=prompt.cond), layout), 500.0), strict=True):
        assert_close(one, two, rtol=0, atol=1e-5)
