"""The ComfyUI backend on a fake host: what each chunk of a model call gets, in every order a guider or a full memory makes."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import ipadapter_core.attention.maths as attention
import ipadapter_core.backends.comfy.doors as backend
import ipadapter_core.backends.comfy.notes as notes
from ipadapter_core.attention.batch import Frames
from ipadapter_core.attention.call import SiteCall
from ipadapter_core.attention.patch import AdapterPatch
from ipadapter_core.attention.presets import SiteRule
from ipadapter_core.attention.schedule import SCALINGS, WeightSchedule
from ipadapter_core.bake import bake
from ipadapter_core.errors import IncompatibleAdapterError
from ipadapter_core.models.unet import down_up_middle
from ipadapter_core.prompt.image_prompt import ImagePrompt
from tiny_models import (
    SD15,
    SDXL,
    TOKEN_DIM,
    FakePatcher,
    Guider,
    HostModel,
    Sampling,
    conditioning,
    host_attention,
    noise,
    tiny_adapter,
    tiny_host,
    tiny_prompt,
)

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}  # fp32, outputs of size 1
X = noise(2, 4, 12, 16, seed=3)
TEXTS = {
    name: noise(1, 7, TOKEN_DIM, seed=10 + i) for i, name in enumerate(("positive", "negative", "middle", "empty"))
}
ALIAS = {"empty_negative_prompt": "empty"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=[False, True], ids=["shares patches", "deep-copies"])
def host(request: pytest.FixtureRequest) -> FakePatcher:
    """A model under both clone semantics: from 0.13 on and before."""
    return tiny_host(deepcopy_options=request.param)


@pytest.fixture
def model() -> FakePatcher:
    return tiny_host()


def patch_for(
    model: FakePatcher, *, seed: int = 0, family: str = "base", latents: int = 1, **options: Any
) -> AdapterPatch:
    layout = backend.comfy_layout(model)
    adapter = tiny_adapter(layout, family, seed=seed)
    mask = options.pop("mask", None)
    return bake(adapter, tiny_prompt(adapter, seed=seed, latents=latents), layout, WeightSchedule(**options), mask)


def applied(model: FakePatcher, *patches: AdapterPatch) -> FakePatcher:
    for patch in patches:
        model = backend.apply(model, patch)
    return model


def conds(*names: str) -> dict[str, list[dict[str, Any]] | None]:
    return {name: [conditioning(TEXTS[ALIAS.get(name, name)])] for name in names}


def sample(
    model: FakePatcher, *patches: AdapterPatch, order: tuple[str, ...] = ("positive", "negative"), x: Tensor = X,
    percent: float = 0.5, given: Mapping[str, Any] | None = None, **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    return Guider(applied(model, *patches), dict(given or conds(*order)), order, **options)(x, percent)


def same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        assert_close(got[name], expected[name], **TOLERANCE)


def identical(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(got[name], expected[name]) for name in expected)


# --- against a plain reference ----------------------------------------------------------------------------------------


def reference_model(
    model: FakePatcher, adapter: Any, prompt: ImagePrompt, weight: float, positive: Callable[[int], bool]
):
    """The formula of the paper in every slot, from the adapter's own layers, for one chunk at a time."""
    clone = model.clone()
    layout = backend.comfy_layout(model)
    for layer, at in enumerate(down_up_middle(layout)):
        site = layout.sites[at]

        def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], index: int = layer) -> Tensor:
            (chunk,) = options["cond_or_uncond"]
            tokens = prompt.cond if positive(chunk) else prompt.uncond
            heads = options["n_heads"]
            key, value = adapter.module.to_k_ip[index](tokens), adapter.module.to_v_ip[index](tokens)
            image = host_attention(q, key.expand(q.shape[0], -1, -1), value.expand(q.shape[0], -1, -1), heads)
            return host_attention(q, k, v, heads) + weight * image

        clone.set_model_attn2_replace(attend, site.group, site.number, site.depth)
    return clone


@pytest.mark.parametrize("family", ["base", "plus", "full-face"])
@pytest.mark.parametrize("kind", ["small", SD15, SDXL])
def test_output_equals_the_plain_formula(kind: str, family: str) -> None:
    model = tiny_host(kind)
    layout = backend.comfy_layout(model)
    adapter = tiny_adapter(layout, family)
    prompt = tiny_prompt(adapter)
    reference = reference_model(model, adapter, prompt, 0.7, lambda chunk: chunk == 0)
    expected = sample(reference, chunks=1)
    plain = sample(model)
    for name in plain:
        assert (expected[name] - plain[name]).abs().max() > 1e-3, (
            "the adapter hardly acts, so equality would prove nothing"
        )
    same(sample(model, bake(adapter, prompt, layout, WeightSchedule(0.7))), expected)


@pytest.mark.parametrize("broken", ["middle block left out", "uncond and cond swapped", "wrong attention scale"])
def test_the_comparison_with_the_formula_can_fail(
    broken: str, model: FakePatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = backend.comfy_layout(model)
    adapter = tiny_adapter(layout)
    prompt = tiny_prompt(adapter)
    expected = sample(reference_model(model, adapter, prompt, 0.7, lambda chunk: chunk == 0), chunks=1)
    schedule = WeightSchedule(0.7)
    if broken == "middle block left out":
        schedule = WeightSchedule(0.7, site_factors=(SiteRule("middle", 0.0),))
    elif broken == "uncond and cond swapped":
        monkeypatch.setattr(notes, "NEGATIVE_NAMES", frozenset({"positive"}))
    else:
        real = attention.attend
        monkeypatch.setattr(
            attention,
            "attend",
            lambda q, kv, heads, key_scale=1.0, rows=None: real(q, kv, heads, key_scale * 1.1, rows),
        )
    with pytest.raises(AssertionError, match="not close"):
        same(sample(model, bake(adapter, prompt, layout, schedule)), expected)


# --- invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
def test_strength_zero_changes_no_bit(model: FakePatcher, scaling: str) -> None:
    patched = applied(model, patch_for(model, strength=0.0, scaling=scaling))
    assert patched.slots == {}
    assert identical(sample(patched), sample(model))


def test_outside_the_window_no_bit_changes(model: FakePatcher) -> None:
    patch = patch_for(model, start_percent=0.6, end_percent=0.8)
    assert patch.active(0)
    assert identical(sample(model, patch, percent=0.5), sample(model, percent=0.5))
    assert not identical(sample(model, patch, percent=0.7), sample(model, percent=0.7))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_mask_of_ones_is_no_mask(model: FakePatcher, scaling: str) -> None:
    masked = patch_for(model, scaling=scaling, mask=torch.ones(50, 70))
    same(sample(model, masked), sample(model, patch_for(model, scaling=scaling)))


def test_the_order_of_adapters_is_no_matter(host: FakePatcher) -> None:
    a, b = patch_for(host, seed=1), patch_for(host, seed=2, family="plus", strength=0.5)
    both = sample(host, a, b)
    same(sample(host, b, a), both)
    assert (both["positive"] - sample(host, a)["positive"]).abs().max() > 1e-3
    assert backend.applied_patches(applied(host, a, b)) == (a, b)


def test_a_batch_of_two_is_two_batches_of_one(model: FakePatcher) -> None:
    patch = patch_for(model, mask=torch.rand(96, 128))
    together = sample(model, patch)
    for i in (0, 1):
        same(sample(model, patch, x=X[i : i + 1]), {name: out[i : i + 1] for name, out in together.items()})


def test_one_prompt_and_one_mask_per_latent(model: FakePatcher) -> None:
    layout = backend.comfy_layout(model)
    adapter = tiny_adapter(layout)
    both = tiny_prompt(adapter, latents=2)
    masks = torch.zeros(2, 12, 16)
    masks[0, :6], masks[1, 6:] = 1, 1
    together = sample(model, bake(adapter, both, layout, None, masks))
    for i in (0, 1):
        cut = slice(i, i + 1)
        alone = ImagePrompt(
            both.cond[cut], both.uncond[cut], both.features[cut], both.uncond_features[cut], "a", "e", TOKEN_DIM
        )
        got = sample(model, bake(adapter, alone, layout, None, masks[i]), x=X[cut])
        same(got, {name: out[cut] for name, out in together.items()})


# --- guiders: every order, every split ---------------------------------------------------------------------------------

ORDERS = {
    "cfg": ("positive", "negative"),
    "uncond first": ("negative", "positive"),
    "dual cfg": ("negative", "middle", "positive"),
    "perp-neg": ("positive", "negative", "empty_negative_prompt"),
    "no guidance": ("positive",),
}


@pytest.mark.parametrize("chunks", [1, 2, 8])
@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_every_conditioning_gets_its_branch(model: FakePatcher, order: tuple[str, ...], chunks: int) -> None:
    """The image for positive and middle, its unconditional for the negatives, wherever they stand and however they are split."""
    layout = backend.comfy_layout(model)
    adapter = tiny_adapter(layout)
    prompt = tiny_prompt(adapter)
    image = {"positive", "middle"}
    reference = reference_model(model, adapter, prompt, 1.0, lambda chunk: order[chunk] in image)
    given = conds(*order)
    expected = sample(reference, order=order, given=given, chunks=1)
    model.model.calls.clear()
    same(sample(model, bake(adapter, prompt, layout), order=order, given=given, chunks=chunks), expected)
    seen = model.model.calls
    assert sorted(i for call in seen for i in call) == list(range(len(order)))
    assert max(map(len, seen)) == min(chunks, len(order))


def test_a_missing_negative_is_no_trouble(model: FakePatcher) -> None:
    """Guidance of 1 skips the negative: the host passes None."""
    given = {"positive": conds("positive")["positive"], "negative": None}
    got = sample(model, patch_for(model), given=given)
    assert torch.equal(got["negative"], torch.zeros_like(X))
    assert_close(got["positive"], sample(model, patch_for(model))["positive"], **TOLERANCE)


def test_conditionings_that_share_a_uuid(model: FakePatcher) -> None:
    """The host copies uuids when it completes area conditionings, and users wire one conditioning into both sockets."""
    entry = conditioning(TEXTS["positive"])
    given = {"positive": [entry], "negative": [dict(entry)]}
    got = sample(model, patch_for(model), given=given)
    own = {"positive": conds("positive")["positive"], "negative": [conditioning(TEXTS["positive"])]}
    same(got, sample(model, patch_for(model), given=own))
    assert (got["positive"] - got["negative"]).abs().max() > 1e-3
    assert given == {"positive": [entry], "negative": [dict(entry)]}, "the host's conditionings were changed"


def test_the_same_list_on_both_sides_of_guidance(model: FakePatcher) -> None:
    """process_conds copies lists, but a guider of somebody's might not: the name then follows the negative's rule or the position."""
    entries = [conditioning(TEXTS["positive"])]
    got = sample(model, patch_for(model), given={"positive": entries, "negative": entries})
    assert all(torch.isfinite(out).all() for out in got.values())


def test_windows_that_rebuild_the_conditionings_keep_their_names(model: FakePatcher) -> None:
    """ComfyUI's context windows hand on new lists of copied entries; a dual-CFG guider's second one is no negative."""
    order = ("negative", "middle", "positive")
    patched, given = applied(model, patch_for(model)), conds(*order)
    expected = Guider(patched, given, order)(X)

    class Windowed(Guider):
        def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any) -> list[Tensor]:
            whole = self.conds
            self.conds = {name: [dict(e) for e in entries or ()] for name, entries in whole.items()}
            try:
                return super().predict_noise(x, timestep, model_options, seed)
            finally:
                self.conds = whole

    same(Windowed(patched, given, order)(X), expected)


def test_the_hosts_own_context_window_names_the_frames() -> None:
    window = SimpleNamespace(index_list=[3, 1], total_frames=5, dim=0)
    options = {"cond_or_uncond": [0], "context_window": window}
    x = torch.zeros(2, 4, 8, 8)
    assert notes.call_of(x, (), {"transformer_options": options}).frames == Frames((3, 1), 5)
    window.dim = 2  # video models cut another axis, on which no latent of the batch lies
    assert notes.call_of(x, (), {"transformer_options": options}).frames is None


def test_several_conditionings_of_one_name(model: FakePatcher) -> None:
    """Combined prompts: each is averaged, all of them see the image."""
    given = {
        "positive": [conditioning(TEXTS["positive"]), conditioning(TEXTS["middle"])],
        "negative": conds("negative")["negative"],
    }
    patch = patch_for(model)
    got = sample(model, patch, given=given)
    first = sample(model, patch)["positive"]
    second = sample(model, patch, given={"positive": [conditioning(TEXTS["middle"])], "negative": None})["positive"]
    assert_close(got["positive"], (first + second) / 2, **TOLERANCE)


def test_area_conditioning_sees_its_part_of_the_mask(model: FakePatcher) -> None:
    """A chunk that shows the right half gets the right half of the mask: all of it here, nothing of it on the left."""
    mask = torch.zeros(96, 128)
    mask[:, 64:] = 1
    left, right = (12, 8, 0, 0), (12, 8, 0, 8)
    patch = patch_for(model, mask=mask)

    def crop(area: tuple[int, int, int, int], model: FakePatcher, *patches: AdapterPatch, chunks: int = 8) -> Tensor:
        given = {
            "positive": [conditioning(TEXTS["positive"]), conditioning(TEXTS["positive"], area)],
            "negative": [conditioning(TEXTS["negative"])],
        }
        whole = {"positive": [given["positive"][0]], "negative": None}
        both = sample(model, *patches, given=given, chunks=chunks)["positive"]
        only = sample(model, *patches, given=whole)["positive"]
        return (2 * both - only)[..., area[3] : area[3] + area[1]]  # the mean of two, undone where they overlap

    for chunks in (1, 8):
        assert_close(crop(left, model, patch, chunks=chunks), crop(left, model), **TOLERANCE)
        assert_close(crop(right, model, patch, chunks=chunks), crop(right, model, patch_for(model)), **TOLERANCE)
    assert (crop(right, model, patch) - crop(right, model)).abs().max() > 1e-3


def test_areas_of_different_chunks_in_one_call(model: FakePatcher) -> None:
    """Two areas of one size run as one batch, each with its own part of the mask."""
    mask = torch.zeros(96, 128)
    mask[:, 64:] = 1
    given = {
        "positive": [conditioning(TEXTS["positive"], (12, 8, 0, 0)), conditioning(TEXTS["positive"], (12, 8, 0, 8))],
        "negative": None,
    }
    model.model.calls.clear()
    got = sample(model, patch_for(model, mask=mask), given=given)["positive"]
    assert model.model.calls == [[0, 0]]
    assert_close(got[..., :8], sample(model, given=given)["positive"][..., :8], **TOLERANCE)
    assert_close(got[..., 8:], sample(model, patch_for(model), given=given)["positive"][..., 8:], **TOLERANCE)


@pytest.mark.parametrize("size", [(25, 24), (13, 11), (9, 24)])
def test_masks_on_sizes_that_do_not_halve(model: FakePatcher, size: tuple[int, int]) -> None:
    """Complementary soft masks add up to no mask."""
    x = noise(1, 4, *size, seed=5)
    mask = torch.rand(*size, generator=torch.Generator().manual_seed(0))
    got = sample(model, patch_for(model, mask=mask), patch_for(model, mask=1 - mask), x=x)
    same(got, sample(model, patch_for(model), x=x))


# --- clones --------------------------------------------------------------------------------------------------------


def test_applying_never_changes_the_model_it_is_applied_to(host: FakePatcher) -> None:
    plain = sample(host)
    a, b, c = (patch_for(host, seed=seed) for seed in range(3))
    with_a = applied(host, a)
    before = sample(with_a)
    slots = dict(with_a.slots)
    with_ab, with_ac = applied(with_a, b), applied(with_a, c)
    assert host.slots == {}
    assert host.wrappers == {}
    assert with_a.slots == slots
    assert identical(sample(with_a), before)
    assert identical(sample(host), plain)
    same(sample(with_ab), sample(host, a, b))
    same(sample(with_ac), sample(host, a, c))
    same(sample(applied(with_a.clone().clone(), b)), sample(with_ab))


def test_deep_copies_share_the_tensors(model: FakePatcher) -> None:
    """Old hosts deep-copy the options in each clone: the adapter must not be copied with them."""
    hook = next(iter(applied(model, patch_for(model)).slots.values()))
    assert copy.deepcopy(hook) is hook
    old = applied(tiny_host(deepcopy_options=True), patch_for(model))
    clone = old.clone()
    assert all(clone.slots[key] is old.slots[key] for key in old.slots)


def test_applying_again_keeps_one_wrapper_each(model: FakePatcher) -> None:
    patched = applied(model, patch_for(model, seed=1), patch_for(model, seed=2), patch_for(model, seed=3))
    assert {kind: [len(w) for w in keys.values()] for kind, keys in patched.wrappers.items()} == {
        "predict_noise": [1],
        "calc_cond_batch": [1],
        "apply_model": [1],
    }


def test_a_dropped_model_frees_the_tensors(host: FakePatcher) -> None:
    patch = patch_for(host)
    k = weakref.ref(patch.sites[0].k)
    patched = applied(host, patch)
    sample(patched)
    del patch, patched
    gc.collect()
    assert k() is None


def test_unloading_keeps_what_is_on_the_cpu(model: FakePatcher) -> None:
    patched = applied(model, patch_for(model))
    before = sample(patched)
    for hook in patched.slots.values():
        assert hook.to(torch.device("cpu")) is hook
        assert hook.to(torch.float16) is hook
    assert identical(sample(patched), before)


# --- what else sits in the slots -----------------------------------------------------------------------------------------


def halving(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """Somebody else's hook."""
    return 0.5 * host_attention(q, k, v, options["n_heads"])


def every_slot(model: FakePatcher, hook: Callable[..., Tensor], parts: int) -> FakePatcher:
    clone = model.clone()
    for site in backend.comfy_layout(model).sites:
        clone.set_model_attn2_replace(hook, site.group, site.number, site.depth if parts == 3 else None)
    return clone


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("kind", ["small", SDXL])
def test_a_hook_that_was_there_is_called_first(kind: str, parts: int) -> None:
    model = tiny_host(kind)
    patch = patch_for(model)
    other = every_slot(model, halving, parts)
    got = sample(other, patch)
    assert set(other.slots.values()) == {halving}

    def both(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        index = sites[(*options["block"], options["block_index"])]
        call = SiteCall(notes.call_at(options), q, options["n_heads"])
        return patch.add_to(halving(q, k, v, options), index, call)

    sites = {(s.group, s.number, s.depth): i for i, s in enumerate(patch.layout.sites)}
    expected = every_slot(applied(model, patch), both, 3)
    same(got, sample(expected))
    assert (got["positive"] - sample(model, patch)["positive"]).abs().max() > 1e-3


@pytest.mark.parametrize("parts", [2, 3])
def test_a_hook_that_comes_later_and_composes(model: FakePatcher, parts: int) -> None:
    patch, second = patch_for(model), patch_for(model, seed=2)
    patched = applied(model, patch)
    wrapped = patched.clone()
    for key, hook in patched.slots.items():

        def doubling(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], hook: Any = hook) -> Tensor:
            return 2 * hook(q, k, v, options)

        wrapped.set_model_attn2_replace(doubling, key[0], key[1], 0 if parts == 3 else None)
    expected = every_slot(model, lambda q, k, v, o: 2 * patched.slots[o["block"]](q, k, v, o), 3)
    expected.wrappers = patched.wrappers
    same(sample(wrapped), sample(expected))
    assert (sample(wrapped, second)["positive"] - sample(wrapped)["positive"]).abs().max() > 1e-3


def test_one_transformer_layer_gets_a_two_part_key_and_more_get_three(model: FakePatcher) -> None:
    """The field's convention, so that other packs find the slot they expect."""
    assert {len(key) for key in applied(model, patch_for(model)).slots} == {2}
    sdxl = tiny_host(SDXL)
    assert {len(key) for key in applied(sdxl, patch_for(sdxl)).slots} == {3}


def test_every_site_is_hooked() -> None:
    for kind, sites in ((SD15, 16), (SDXL, 70)):
        model = tiny_host(kind)
        slots = applied(model, patch_for(model)).slots
        assert len(slots) == sites
        assert {key[:2] for key in slots} >= {("middle", 0)}


def test_hooks_sit_only_where_the_image_acts() -> None:
    model = tiny_host(SD15)
    patched = applied(model, patch_for(model, site_factors=(SiteRule("all", 0.0), SiteRule("output 3", 1.0))))
    assert set(patched.slots) == {("output", 3)}


# --- when ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end", "percent", "acts"), [
    (0.0, 0.5, 0.5, True), (0.5, 1.0, 0.5, True), (0.2, 0.3, 0.3, True), (0.2, 0.3, 0.2, True), (0.0, 1.0, 0.0, True),
    (0.501, 1.0, 0.5, False), (0.0, 0.499, 0.5, False), (0.3, 0.2, 0.25, False), (0.9, 1.0, 1.0, True), (0.0, 0.1, 0.0, True),
])  # fmt: skip
def test_the_window_includes_both_ends(
    model: FakePatcher, start: float, end: float, percent: float, acts: bool
) -> None:
    patch = patch_for(model, start_percent=start, end_percent=end)
    assert identical(sample(model, patch, percent=percent), sample(model, percent=percent)) is not acts


class ContinuousEDM:
    """Log-linear in the progress, as ModelSamplingContinuousEDM (v-prediction SDXL, Playground)."""

    def percent_to_sigma(self, percent: float) -> float:
        low, high = math.log(0.002), math.log(120.0)
        return 999999999.9 if percent <= 0 else 0.0 if percent >= 1 else math.exp((high - low) * (1 - percent) + low)


@pytest.mark.parametrize("percent", [1e-5, 0.001, 0.1, 0.25, 0.3, 0.5, 0.777, 0.99, 0.9999])
@pytest.mark.parametrize("sampling", [Sampling(), ContinuousEDM()], ids=["discrete", "continuous"])
def test_progress_inverts_the_hosts_schedule(sampling: Any, percent: float) -> None:
    """Within the slack of the window's ends, from a float32 sigma."""
    sigma = float(torch.tensor(sampling.percent_to_sigma(percent)))
    assert notes.percent_of(sigma, sampling) == pytest.approx(percent, abs=1e-6)


def test_progress_at_the_ends_of_the_schedule() -> None:
    sampling = Sampling()
    assert notes.percent_of(1000.0, sampling) == 0.0
    assert notes.percent_of(float(sampling.sigma(torch.tensor(999.0))), sampling) == 0.0
    assert notes.percent_of(0.0, sampling) == 1.0
    assert notes.percent_of(float(sampling.sigma(torch.tensor(0.0))), sampling) == 1.0


def test_a_curve_scales_the_strength(model: FakePatcher) -> None:
    scheduled = patch_for(model, strength=2.0, curve=((0.0, 1.0), (1.0, 0.0)))
    same(sample(model, scheduled, percent=0.25), sample(model, patch_for(model, strength=1.5), percent=0.25))


def test_a_sampler_without_our_wrappers(model: FakePatcher) -> None:
    """Samplers of other packs may call the model on their own: order by index, and a clear word where the step matters."""
    patch = patch_for(model)
    same(sample(model, patch, wrapped=False), sample(model, patch))
    for windowed in (patch_for(model, end_percent=0.5), patch_for(model, curve=((0.0, 1.0), (1.0, 0.5)))):
        with pytest.raises(IncompatibleAdapterError, match="set start to 0, end to 1"):
            sample(model, windowed, wrapped=False)


def test_a_sampler_that_calls_calc_cond_batch_alone(model: FakePatcher) -> None:
    """Without a guider the second list is the negative, and the model still tells the progress."""
    patch = patch_for(model, end_percent=0.6)
    patched = applied(model, patch)
    patched.remove_wrappers_with_key("predict_noise", notes.KEY)
    guider = Guider(patched, conds("positive", "negative"))
    same(guider(X, 0.5), sample(model, patch_for(model)))
    assert identical(guider(X, 0.7), sample(model, percent=0.7))


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_a_patch_for_another_model_is_refused(model: FakePatcher) -> None:
    before = dict(model.model_options)
    with pytest.raises(IncompatibleAdapterError, match="prepare it for this model"):
        backend.apply(model, patch_for(tiny_host(SD15)))
    assert model.model_options == before
    assert model.wrappers == {}


def test_a_model_without_cross_attention_is_refused() -> None:
    with pytest.raises(IncompatibleAdapterError, match="Linear"):
        backend.comfy_layout(FakePatcher(HostModel(torch.nn.Linear(1, 1))))


def test_a_mask_without_the_latents_size_is_explained(model: FakePatcher) -> None:
    """Token merging changes the number of tokens: no level of the latent has it."""
    patched = applied(model, patch_for(model, mask=torch.ones(8, 8)))
    hook = patched.slots[("middle", 0)]
    with pytest.raises(ValueError, match="token merging"):
        hook(
            noise(1, 7, 8),
            noise(1, 3, 8),
            noise(1, 3, 8),
            {"n_heads": 2, "cond_or_uncond": [0], "original_shape": [1, 4, 8, 8]},
        )
