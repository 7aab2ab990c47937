"""Baking: keys and values of every site, once per prompt, adapter and layout."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core.attention.call import COND, UNCOND, ModelCall, SiteCall
from ipadapter_core.attention.patch import AdapterPatch
from ipadapter_core.attention.presets import SiteRule
from ipadapter_core.attention.schedule import WeightSchedule
from ipadapter_core.bake import bake
from ipadapter_core.checkpoints import AdapterWeights, load_adapter
from ipadapter_core.errors import IncompatibleAdapterError, InvalidInputError
from ipadapter_core.models import layout_of
from ipadapter_core.models.reach import Reach, every
from ipadapter_core.models.sd3 import SD3
from ipadapter_core.models.sites import ModelLayout, Site
from ipadapter_core.models.unet import down_up_middle
from ipadapter_core.prompt.image_prompt import ImagePrompt
from ipadapter_core.report import describe_fit
from tiny import SD15_CHANNELS, tiny_state
from tiny_models import (
    SDXL,
    TOKEN_DIM,
    LdmUNet,
    adapter_state,
    checkpoint_channels,
    noise,
    tiny_adapter,
    tiny_prompt,
    tiny_unet,
)

TOLERANCE = {"rtol": 0.0, "atol": 1e-6}


@pytest.fixture(scope="module")
def layout() -> ModelLayout:
    return layout_of(tiny_unet())


@pytest.fixture
def adapter(layout: ModelLayout) -> AdapterWeights:
    return tiny_adapter(layout)


@contextmanager
def linear_calls(adapter: AdapterWeights) -> Iterator[list[object]]:
    """One entry per call of any Linear layer of the adapter."""
    calls: list[object] = []
    layers = [m for m in adapter.module.modules() if isinstance(m, nn.Linear)]
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    yield calls
    for hook in hooks:
        hook.remove()


# --- once ------------------------------------------------------------------------------------------------------------


def test_each_site_is_projected_once(adapter: AdapterWeights, layout: ModelLayout) -> None:
    prompt = tiny_prompt(adapter)
    with linear_calls(adapter) as calls:
        patch = bake(adapter, prompt, layout)
        assert len(calls) == 2 * len(layout.sites), "one K and one V layer per site, both branches at once"
        calls.clear()
        again = bake(adapter, prompt, layout, WeightSchedule(0.3, "ease in", end_percent=0.4), torch.ones(8, 8))
        patch.with_schedule(WeightSchedule(-1, scaling="K+V")).with_mask(torch.ones(8, 8)).with_mask(None)
        assert calls == []
    assert all(a.k is b.k and a.v is b.v for a, b in zip(again.sites, patch.sites, strict=True))
    assert again.schedule.strength == 0.3


def test_another_prompt_adapter_or_layout_bakes_anew(adapter: AdapterWeights, layout: ModelLayout) -> None:
    prompt, second = tiny_prompt(adapter), tiny_prompt(adapter, seed=1)
    bake(adapter, prompt, layout)
    with linear_calls(adapter) as calls:
        bake(adapter, second, layout)
        bake(adapter, prompt, replace(layout, model=replace(layout.model, name="another")))
        assert len(calls) == 4 * len(layout.sites)
    other = tiny_adapter(layout, seed=7)
    assert not torch.equal(bake(other, prompt, layout).sites[0].k, bake(adapter, prompt, layout).sites[0].k)


def test_preparation_is_asked_for_only_when_weights_are_used(adapter: AdapterWeights, layout: ModelLayout) -> None:
    prompt = tiny_prompt(adapter)
    asked: list[int] = []
    for _ in range(3):
        bake(adapter, prompt, layout, prepare=lambda: asked.append(1))
    assert asked == [1]


def test_baked_tensors_die_with_prompt_and_patch(adapter: AdapterWeights, layout: ModelLayout) -> None:
    prompt = tiny_prompt(adapter)
    patch = bake(adapter, prompt, layout)
    k = weakref.ref(patch.sites[0].k)
    del patch
    gc.collect()
    assert k() is not None, "a changed strength would bake again"
    del prompt
    gc.collect()
    assert k() is None


def test_a_host_moves_keys_and_values_as_one_module(adapter: AdapterWeights, layout: ModelLayout) -> None:
    """What was arranged and resolved for calls goes when they move, and stays when they do not."""
    patch = bake(adapter, tiny_prompt(adapter), layout)
    again = patch.with_schedule(WeightSchedule(0.3))
    q = noise(2, 9, layout.sites[0].channels)
    for one in (patch, again):
        one.add_to(q, 0, call(q, layout, UNCOND, COND))
    site: Any = patch.sites[0]
    assert patch.held is again.held is not None
    bytes = sum(s.k.nbytes + s.v.nbytes for s in patch.sites)
    assert patch.held.bytes == bytes
    patch.held.to("cpu")
    assert site._prepared
    assert patch._kinds
    patch.held.to("meta")
    assert (site.k.device.type, site.v.device.type, patch.held.bytes) == ("meta", "meta", bytes)
    assert not site._prepared
    assert not patch._kinds
    assert not again._kinds, "a changed strength keeps what it resolved by itself"


# --- what ------------------------------------------------------------------------------------------------------------


def test_keys_and_values_are_those_of_the_checkpoint(layout: ModelLayout) -> None:
    state = adapter_state("base", layout)
    adapter = load_adapter(state)
    prompt = tiny_prompt(adapter)
    baked_sites = bake(adapter, prompt, layout).sites
    for layer, index in enumerate(down_up_middle(layout)):
        site, baked, number = layout.sites[index], baked_sites[index], 2 * layer + 1
        for tokens, branch in ((prompt.uncond, UNCOND), (prompt.cond, COND)):
            for kind, tensor in (("k", baked.k), ("v", baked.v)):
                expected = tokens @ state[f"ip_adapter.{number}.to_{kind}_ip.weight"].T
                heads = expected.reshape(1, -1, site.heads, site.channels // site.heads).movedim(2, 1)
                assert_close(tensor[branch], heads, **TOLERANCE)


def test_patches_are_frozen(adapter: AdapterWeights, layout: ModelLayout) -> None:
    patch = bake(adapter, tiny_prompt(adapter), layout)
    with pytest.raises(FrozenInstanceError):
        patch.schedule = WeightSchedule()  # type: ignore[misc]
    changed = patch.with_schedule(WeightSchedule(0.2))
    assert (patch.schedule.strength, changed.schedule.strength) == (1.0, 0.2)


def test_no_gradient_is_kept(adapter: AdapterWeights, layout: ModelLayout) -> None:
    patch = bake(adapter, tiny_prompt(adapter), layout)
    assert not any(site.k.requires_grad or site.v.requires_grad for site in patch.sites)


# --- one call --------------------------------------------------------------------------------------------------------


def call(q: Tensor, layout: ModelLayout, *branches: int, percent: float = 0.5) -> SiteCall:
    return SiteCall(ModelCall(branches, lambda: percent), q, layout.sites[0].heads)


def test_a_negative_branch_that_is_off_is_the_base_model_to_the_bit(
    adapter: AdapterWeights, layout: ModelLayout
) -> None:
    prompt = tiny_prompt(adapter)
    q = noise(2, 4, layout.sites[0].channels)
    plain = bake(adapter, prompt, layout).add_to(q, 0, call(q, layout, 0, 1))
    off = replace(prompt, negative_branch="off")  # its tokens stay: a bias would make keys of zeros too
    out = bake(adapter, off, layout).add_to(q, 0, call(q, layout, 0, 1))
    assert torch.equal(out[:1], q[:1])
    assert_close(out[1:], plain[1:], **TOLERANCE)
    assert (plain[:1] - q[:1]).abs().max() > 1e-2


def test_one_site_alone_in_another_dtype(adapter: AdapterWeights, layout: ModelLayout) -> None:
    """What is ready at a site is for the dtype of its own queries, not of the first site's that was asked."""
    patch = bake(adapter, tiny_prompt(adapter), layout)
    first, second = (noise(2, 4, layout.sites[i].channels) for i in (0, 1))
    for dtype in (torch.float32, torch.float64):
        at = call(first, layout, 0, 1)
        patch.add_to(first, 0, at)
        q = second.to(dtype)
        assert patch.add_to(q, 1, SiteCall(at.call, q, layout.sites[1].heads)).dtype == dtype


def added(patch: AdapterPatch, q: Tensor, *branches: int, site: int = 0) -> Tensor:
    base = torch.zeros_like(q)
    return patch.add_to(base, site, call(q, patch.layout, *branches))


@pytest.mark.parametrize("branches", [(0, 1), (1, 0), (1,), (0,), (1, 1), (1, 0, 1), (0, 1, 1), (0, 0, 1, 1)])
def test_any_order_of_branches(adapter: AdapterWeights, layout: ModelLayout, branches: tuple[int, ...]) -> None:
    patch = bake(adapter, tiny_prompt(adapter), layout)
    q = noise(2 * len(branches), 9, layout.sites[0].channels)
    got = added(patch, q, *branches).chunk(len(branches))
    for chunk, branch, part in zip(q.chunk(len(branches)), branches, got, strict=True):
        assert_close(part, added(patch, chunk, branch), **TOLERANCE)


@pytest.mark.parametrize(
    ("prompts", "latents", "expected"), [(3, 3, [0, 1, 2]), (3, 2, [0, 1]), (2, 4, [0, 1, 1, 1]), (1, 3, [0, 0, 0])]
)
def test_prompts_per_latent(
    adapter: AdapterWeights, layout: ModelLayout, prompts: int, latents: int, expected: list[int]
) -> None:
    """Surplus prompts are left out, missing ones repeat the last."""
    prompt = tiny_prompt(adapter, latents=prompts)
    q = noise(2 * latents, 9, layout.sites[0].channels)
    got = added(bake(adapter, prompt, layout), q, UNCOND, COND)
    for row in range(2 * latents):
        cut = slice(expected[row % latents], expected[row % latents] + 1)
        alone = ImagePrompt(
            prompt.cond[cut], prompt.uncond[cut], prompt.features, prompt.uncond_features, "a", "e", TOKEN_DIM
        )
        branch = row // latents
        assert_close(got[row : row + 1], added(bake(adapter, alone, layout), q[row : row + 1], branch), **TOLERANCE)


def test_a_flipped_site_moves_the_image_to_the_negative(adapter: AdapterWeights, layout: ModelLayout) -> None:
    """The positive half gets attention over zero tokens, which is zero; the negative half the positive's image."""
    prompt = tiny_prompt(adapter)
    precise = bake(adapter, prompt, layout, WeightSchedule(preset="style transfer precise"))
    plain = bake(adapter, prompt, layout)
    flipped = [i for i, weight in enumerate(precise.weights) if weight.flipped]
    assert flipped
    site = flipped[0]
    q = noise(2, 9, layout.sites[site].channels)
    got = added(precise, q, UNCOND, COND, site=site)
    assert_close(got[1], torch.zeros_like(got[1]), rtol=0, atol=0)
    assert_close(got[:1], added(plain, q[:1], COND, site=site), **TOLERANCE)
    kept = next(i for i, weight in enumerate(precise.weights) if weight.weight and not weight.flipped)
    q = noise(2, 9, layout.sites[kept].channels)
    assert_close(added(precise, q, UNCOND, COND, site=kept), added(plain, q, UNCOND, COND, site=kept), **TOLERANCE)


def test_a_site_without_weight_returns_the_very_tensor(adapter: AdapterWeights, layout: ModelLayout) -> None:
    schedule = WeightSchedule(site_factors=(SiteRule("input", 0.0),))
    patch = bake(adapter, tiny_prompt(adapter), layout, schedule)
    base = q = noise(2, 9, layout.sites[0].channels)
    assert not patch.active(0)
    assert patch.add_to(base, 0, call(q, layout, 0, 1)) is base
    windowed = patch.with_schedule(WeightSchedule(end_percent=0.4))
    assert windowed.active(0)
    assert windowed.add_to(base, 0, call(q, layout, 0, 1, percent=0.5)) is base


def test_the_progress_is_asked_for_only_by_windows_and_curves(adapter: AdapterWeights, layout: ModelLayout) -> None:
    def never() -> float:
        raise AssertionError("a constant schedule asked how far sampling is")

    q = noise(2, 9, layout.sites[0].channels)
    patch = bake(adapter, tiny_prompt(adapter), layout)
    patch.add_to(q, 0, SiteCall(ModelCall((0, 1), never), q, 2))
    with pytest.raises(AssertionError, match="how far"):
        patch.with_schedule(WeightSchedule(end_percent=0.4)).add_to(q, 0, SiteCall(ModelCall((0, 1), never), q, 2))


def test_another_dtype_is_converted_once(adapter: AdapterWeights, layout: ModelLayout) -> None:
    patch = bake(adapter, tiny_prompt(adapter), layout)
    q = noise(2, 9, layout.sites[0].channels).bfloat16()
    got = added(patch, q, 0, 1)
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), added(patch, q.float(), 0, 1), rtol=0, atol=0.05)
    assert patch.sites[0].k.dtype == torch.float32
    asked = call(q, layout, 0, 1)
    first = patch.sites[0].at(asked, (0, 1), False)
    assert patch.sites[0].at(asked, (0, 1), False) is first


def test_a_mask_needs_a_grid(adapter: AdapterWeights, layout: ModelLayout) -> None:
    patch = bake(adapter, tiny_prompt(adapter), layout, None, torch.ones(8, 8))
    with pytest.raises(InvalidInputError, match="9 tokens"):
        added(patch, noise(2, 9, layout.sites[0].channels), 0, 1)


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_an_adapter_for_another_base_model_is_named() -> None:
    sdxl, sd15 = layout_of(tiny_unet(SDXL)), load_adapter(tiny_state(token_dim=768, channels=SD15_CHANNELS))
    prompt = tiny_prompt(sd15)
    with pytest.raises(
        IncompatibleAdapterError, match=r"adapter for SD1\.5 \(16 attention layers, 768 wide\).*70 layers, 32 wide"
    ):
        bake(sd15, prompt, sdxl)


def test_an_adapter_for_sd35_large_is_refused_on_medium_by_the_widths_that_matter() -> None:
    """Its tokens are as wide as its attentions; the text's width is that of both models."""

    def sd3(blocks: int, channels: int) -> ModelLayout:
        sites = (Site("", "joint", i, 0, i, channels, channels // 8) for i in range(blocks))
        return ModelLayout(SD3, 32, tuple(sites))

    large = load_adapter(tiny_state("sd3.5", token_dim=64, channels=(64,) * 5), name="large")
    bake(large, tiny_prompt(large), sd3(5, 64))
    with pytest.raises(
        IncompatibleAdapterError, match=r"\(5 attention layers, 64 wide\); the model is SD3 \(3 layers, 24 wide\)"
    ):
        bake(large, tiny_prompt(large), sd3(3, 24))
    with pytest.raises(IncompatibleAdapterError, match="64 channels in layer 0, but joint 0 of SD3 has 24"):
        bake(large, tiny_prompt(large), sd3(5, 24))


def test_an_adapter_with_other_channels_is_refused_at_the_layer(layout: ModelLayout) -> None:
    channels = list(checkpoint_channels(layout))
    channels[15] = 24
    adapter = tiny_adapter(layout, channels=tuple(channels))
    with pytest.raises(IncompatibleAdapterError, match="24 channels in layer 31, but middle 0"):
        bake(adapter, tiny_prompt(adapter), layout)


def test_a_prompt_of_another_adapter_is_refused(adapter: AdapterWeights, layout: ModelLayout) -> None:
    wide = replace(layout, token_dim=48)
    other = tiny_adapter(wide)
    with pytest.raises(IncompatibleAdapterError, match="48 wide tokens"):
        bake(adapter, tiny_prompt(other), layout)


# --- the report ----------------------------------------------------------------------------------------------------------


def test_the_report_lists_every_site_with_its_weight(adapter: AdapterWeights, layout: ModelLayout) -> None:
    prompt = tiny_prompt(adapter)
    patches = [
        bake(adapter, prompt, layout, WeightSchedule(0.5)),
        bake(adapter, prompt, layout, WeightSchedule(1, "style transfer precise")),
    ]
    lines = describe_fit(adapter, layout, patches).splitlines()
    assert len(lines) == 4 + len(layout.sites)
    numbers = 2 * 2 * prompt.cond.shape[1] * sum(site.channels for site in layout.sites)  # K and V for both branches
    assert lines[-2:] == [f"  prompt {n} holds {4 * numbers / 1000:.3g} kB of keys and values" for n in (1, 2)]
    middle = next(line for line in lines if "middle 0" in line)
    assert middle.split()[:4] == ["middle", "0", "6", "31"]
    assert "0.5" in middle
    assert sum("neg." in line for line in lines) == sum(weight.flipped for weight in patches[1].weights)
    assert "no image prompt" in describe_fit(adapter, layout, [])
    with pytest.raises(IncompatibleAdapterError):
        describe_fit(adapter, layout_of(LdmUNet("small")), [])


def test_the_report_numbers_layers_as_the_family_does() -> None:
    layout = layout_of(LdmUNet("small"))
    adapter = tiny_adapter(layout)

    def keys(reached: Callable[[ModelLayout], tuple[int, ...]]) -> list[str]:
        form: Any = type("Other", (type(adapter.spec.format),), {"reach": Reach(reached)})()
        spec = replace(adapter.spec, format=form, layer_channels=(8,) * len(reached(layout)))
        return [
            line[19:23].strip() for line in describe_fit(replace(adapter, spec=spec), layout, []).splitlines()[2:-1]
        ]

    assert keys(every) == [str(2 * i + 1) for i in range(len(layout.sites))]
    assert keys(lambda layout: (2, 0))[:4] == ["3", "", "1", ""]
