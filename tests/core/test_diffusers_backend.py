"""The diffusers backend: the same numbers as diffusers' own IP-Adapter, and the invariants that hold for any adapter."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.testing import assert_close

import ipadapter_core.attention.maths as attention
import ipadapter_core.backends.diffusers.doors as backend
from ipadapter_core.attention.patch import AdapterPatch
from ipadapter_core.attention.presets import SiteRule
from ipadapter_core.attention.schedule import SCALINGS, WeightSchedule
from ipadapter_core.bake import bake
from ipadapter_core.errors import IncompatibleAdapterError, InvalidInputError
from ipadapter_core.models import layout_of
from ipadapter_core.prompt.image_prompt import ImagePrompt
from ipadapter_core.training.processors import IPAttnProcessor, build_processors
from tiny import nested
from tiny_models import (
    FEATURE_DIM,
    SD15,
    SDXL,
    TOKEN_DIM,
    adapter_state,
    call_unet,
    checkpoint_channels,
    noise,
    tiny_adapter,
    tiny_prompt,
    tiny_unet,
)

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}  # fp32; outputs are of size 1, both sides run the same kernels in other orders
FULL_FACE_TOKENS = 257  # diffusers fixes the number, the encoder decides in our code
X = noise(4, 4, 16, 16, seed=3)
TEXT = noise(4, 7, TOKEN_DIM, seed=4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet("small")


def patch_for(unet: nn.Module, *, seed: int = 0, family: str = "base", **options: object) -> AdapterPatch:
    layout = layout_of(unet)
    adapter = tiny_adapter(layout, family, seed=seed)
    mask = options.pop("mask", None)
    return bake(adapter, tiny_prompt(adapter, seed=seed), layout, WeightSchedule(**options), mask)


def run_applied(
    unet: UNet2DConditionModel, *patches: AdapterPatch, x: Tensor = X, text: Tensor = TEXT, **options: object
):
    call = {key: options.pop(key) for key in ("t",) if key in options}
    with backend.apply(unet, *patches, **options):
        return call_unet(unet, x, text, **call)


# --- parity with diffusers -----------------------------------------------------------------------------------------


class Reference:
    """diffusers' own IP-Adapter on a UNet of the same weights as ours, with the adapters of the given families."""

    def __init__(self, kind: str, families: tuple[str, ...]) -> None:
        self.unet, self.theirs = tiny_unet(kind), tiny_unet(kind)
        layout = layout_of(self.unet)
        states = [adapter_state(family, layout, seed=i) for i, family in enumerate(families)]
        self.adapters = [tiny_adapter(layout, family, seed=i) for i, family in enumerate(families)]
        self.prompts = [tiny_prompt(a, seed=i, tokens=FULL_FACE_TOKENS) for i, a in enumerate(self.adapters)]
        self.theirs._load_ip_adapter_weights([nested(state) for state in states])

    def features(self) -> list[Tensor]:
        """What diffusers takes: per adapter ``b images ...``, negative half first."""
        return [torch.cat([p.uncond_features, p.uncond_features, p.features, p.features]) for p in self.prompts]

    def run(self, strengths: tuple[float, ...], masks: list[Tensor] | None = None) -> Tensor:
        for processor in self.theirs.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = list(strengths)
        extra = {} if masks is None else {"cross_attention_kwargs": {"ip_adapter_masks": masks}}
        return call_unet(self.theirs, X, TEXT, added_cond_kwargs={"image_embeds": self.features()}, **extra)

    def patches(self, strengths: tuple[float, ...], masks: list[Tensor] | None = None) -> list[AdapterPatch]:
        layout = layout_of(self.unet)
        return [
            bake(adapter, prompt, layout, WeightSchedule(strength), None if masks is None else masks[i])
            for i, (adapter, prompt, strength) in enumerate(zip(self.adapters, self.prompts, strengths, strict=True))
        ]


@cache
def reference_for(kind: str, families: tuple[str, ...]) -> Reference:
    return Reference(kind, families)


FAMILIES = [("base",), ("plus",), ("full-face",), ("base", "plus"), ("plus", "full-face")]


# diffusers' loader takes seconds for 70 sites, so SDXL has fewer combinations: every family, one and two adapters
PARITY = [(SD15, families) for families in FAMILIES] + [(SDXL, ("base",)), (SDXL, ("plus", "full-face"))]


@pytest.mark.parametrize(
    ("kind", "families"), PARITY, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_output_equals_diffusers(kind: str, families: tuple[str, ...]) -> None:
    reference = reference_for(kind, families)
    strengths = (0.7, -0.4)[: len(families)]
    expected = reference.run(strengths)
    got = run_applied(reference.unet, *reference.patches(strengths))
    plain = call_unet(reference.unet, X, TEXT)
    assert (plain - expected).abs().max() > 0.02, "the adapter hardly acts, so equality would prove nothing"
    assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("family", ["base", "plus", "full-face"])
def test_tokens_equal_diffusers(family: str) -> None:
    reference = reference_for("one site", (family,))
    with torch.no_grad():
        (theirs,) = reference.theirs.encoder_hid_proj([reference.prompts[0].features])
    assert_close(reference.prompts[0].cond, theirs[:, 0], **TOLERANCE)  # b images n d; one image


@pytest.mark.parametrize("kind", [SD15, SDXL])
def test_masked_output_equals_diffusers_where_it_is_right(kind: str) -> None:
    """Binary masks whose edges lie between tokens of the coarsest level, on a size that halves without a remainder."""
    reference = reference_for(kind, ("plus", "full-face"))
    masks = torch.zeros(2, 128, 128)
    masks[0, :, :64], masks[1, :, 64:] = 1, 1
    processed = IPAdapterMaskProcessor().preprocess(list(masks[:, None]), height=128, width=128)
    expected = reference.run((0.8, 0.5), [mask[None] for mask in processed])
    patches = reference.patches((0.8, 0.5), list(masks))
    unmasked = run_applied(reference.unet, *reference.patches((0.8, 0.5)))
    assert (unmasked - expected).abs().max() > 0.01, "the masks hardly act"
    assert_close(run_applied(reference.unet, *patches), expected, **TOLERANCE)


@pytest.mark.parametrize("broken", ["middle block left out", "uncond and cond swapped", "wrong attention scale"])
def test_the_parity_test_can_fail(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these is a defect found in the wild or easily made; the comparison above has to see it."""
    reference = reference_for(SD15, ("base",))
    expected = reference.run((0.7,))
    (patch,) = reference.patches((0.7,))
    options: dict[str, object] = {}
    if broken == "middle block left out":
        patch = patch.with_schedule(WeightSchedule(0.7, site_factors=(SiteRule("middle", 0.0),)))
    elif broken == "uncond and cond swapped":
        options = {"branches": ("cond", "uncond")}
    else:
        real = attention.attend
        monkeypatch.setattr(
            attention,
            "attend",
            lambda q, kv, heads, key_scale=1.0, rows=None: real(q, kv, heads, key_scale * 1.1, rows),
        )
    with pytest.raises(AssertionError, match="not close"):
        assert_close(run_applied(reference.unet, patch, **options), expected, **TOLERANCE)


# --- invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
def test_strength_zero_changes_no_bit(unet: UNet2DConditionModel, scaling: str) -> None:
    patch = patch_for(unet, strength=0.0, scaling=scaling)
    assert torch.equal(run_applied(unet, patch), call_unet(unet, X, TEXT))


def test_outside_the_window_no_bit_changes(unet: UNet2DConditionModel) -> None:
    patch = patch_for(unet, start_percent=0.6, end_percent=0.8)
    plain = call_unet(unet, X, TEXT, t=500.0)
    assert torch.equal(run_applied(unet, patch, t=500.0), plain)
    inside = call_unet(unet, X, TEXT, t=300.0)
    assert not torch.equal(run_applied(unet, patch, t=300.0), inside)


@pytest.mark.parametrize(("start", "end", "t", "acts"), [
    (0.0, 0.5, 999.0 / 2, True), (0.5, 1.0, 999.0 / 2, True), (0.0, 1.0, 0.0, True), (0.0, 1.0, 999.0, True),
    (0.501, 1.0, 999.0 / 2, False), (0.0, 0.499, 999.0 / 2, False), (0.0, 0.0, 999.0, False), (0.0, 0.001, 999.0, True), (1.0, 1.0, 0.0, True),
])  # fmt: skip
def test_the_window_includes_both_ends(
    unet: UNet2DConditionModel, start: float, end: float, t: float, acts: bool
) -> None:
    patch = patch_for(unet, start_percent=start, end_percent=end)
    assert torch.equal(run_applied(unet, patch, t=t), call_unet(unet, X, TEXT, t=t)) is not acts


def test_a_curve_scales_the_strength(unet: UNet2DConditionModel) -> None:
    scheduled = patch_for(unet, strength=2.0, curve=((0.0, 1.0), (1.0, 0.0)))
    constant = patch_for(unet, strength=2.0 * (1 - 0.25))
    t = 999 * 0.75
    assert_close(run_applied(unet, scheduled, t=t), run_applied(unet, constant, t=t), **TOLERANCE)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_mask_of_ones_is_no_mask(unet: UNet2DConditionModel, scaling: str) -> None:
    got = run_applied(unet, patch_for(unet, scaling=scaling, mask=torch.ones(50, 70)))
    assert_close(got, run_applied(unet, patch_for(unet, scaling=scaling)), **TOLERANCE)


def test_a_mask_of_zeros_is_no_adapter(unet: UNet2DConditionModel) -> None:
    got = run_applied(unet, patch_for(unet, mask=torch.zeros(50, 70)))
    assert_close(got, call_unet(unet, X, TEXT), **TOLERANCE)


def test_the_order_of_adapters_is_no_matter(unet: UNet2DConditionModel) -> None:
    a, b = patch_for(unet, seed=1), patch_for(unet, seed=2, family="plus", strength=0.5)
    both = run_applied(unet, a, b)
    assert_close(both, run_applied(unet, b, a), **TOLERANCE)
    assert (both - run_applied(unet, a)).abs().max() > 0.01
    with backend.apply(unet, a), backend.apply(unet, b):
        assert_close(call_unet(unet, X, TEXT), both, **TOLERANCE)


def test_a_batch_of_two_is_two_batches_of_one(unet: UNet2DConditionModel) -> None:
    patch = patch_for(unet)
    together = run_applied(unet, patch)
    for i in (0, 1):
        pair = [i, i + 2]
        assert_close(run_applied(unet, patch, x=X[pair], text=TEXT[pair]), together[pair], **TOLERANCE)


def test_swapping_the_branches_swaps_the_outputs(unet: UNet2DConditionModel) -> None:
    patch = patch_for(unet)
    swapped = [2, 3, 0, 1]
    got = run_applied(unet, patch, x=X[swapped], text=TEXT[swapped], branches=("cond", "uncond"))
    assert_close(got[swapped], run_applied(unet, patch), **TOLERANCE)


def test_without_guidance_every_latent_gets_the_image(unet: UNet2DConditionModel) -> None:
    patch = patch_for(unet)
    got = run_applied(unet, patch, x=X[2:], text=TEXT[2:], branches=("cond",))
    assert_close(got, run_applied(unet, patch)[2:], **TOLERANCE)
    asked = run_applied(unet, patch, x=X[2:], text=TEXT[2:], branches=lambda: ["cond"])
    assert torch.equal(asked, got)


def test_one_prompt_per_latent(unet: UNet2DConditionModel) -> None:
    layout = layout_of(unet)
    adapter = tiny_adapter(layout)
    both = tiny_prompt(adapter, latents=2)
    got = run_applied(unet, bake(adapter, both, layout))
    for i in (0, 1):
        cut = slice(i, i + 1)
        alone = ImagePrompt(
            both.cond[cut], both.uncond[cut], both.features[cut], both.uncond_features[cut], "a", "e", TOKEN_DIM
        )
        pair = [i, i + 2]
        assert_close(
            run_applied(unet, bake(adapter, alone, layout), x=X[pair], text=TEXT[pair]), got[pair], **TOLERANCE
        )
    assert (got[2] - got[3]).abs().max() > 0.01


def test_one_mask_per_latent(unet: UNet2DConditionModel) -> None:
    masks = torch.zeros(2, 16, 16)
    masks[0, :8], masks[1, 8:] = 1, 1
    got = run_applied(unet, patch_for(unet, mask=masks))
    for i in (0, 1):
        pair = [i, i + 2]
        assert_close(
            run_applied(unet, patch_for(unet, mask=masks[i]), x=X[pair], text=TEXT[pair]), got[pair], **TOLERANCE
        )


@pytest.mark.parametrize("size", [(16, 16), (13, 11), (9, 24)])
def test_masks_on_sizes_that_do_not_halve(unet: UNet2DConditionModel, size: tuple[int, int]) -> None:
    """Two complementary soft masks of the same image are the image without a mask."""
    x = noise(2, 4, *size, seed=5)
    mask = torch.rand(8 * size[0], 8 * size[1], generator=torch.Generator().manual_seed(0))
    halves = [patch_for(unet, mask=mask), patch_for(unet, mask=1 - mask)]
    got = run_applied(unet, *halves, x=x, text=TEXT[:2])
    assert_close(got, run_applied(unet, patch_for(unet), x=x, text=TEXT[:2]), **TOLERANCE)


# --- apply and remove ------------------------------------------------------------------------------------------------


def traces(unet: nn.Module) -> tuple[object, ...]:
    """Everything that could remember an adapter: the module tree, its buffers and weights, hooks, processors, attributes."""
    hooks = [
        (
            name,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            len(m._backward_hooks),
            len(m._forward_hooks_with_kwargs),
        )
        for name, m in unet.named_modules()
    ]
    kwargs_hooks = sum(len(m._forward_pre_hooks_with_kwargs) for m in unet.modules())
    attributes = [(name, sorted(vars(m))) for name, m in unet.named_modules()]
    processors = {name: id(p) for name, p in unet.attn_processors.items()}
    state = {key: (id(value), value._version) for key, value in unet.named_parameters()}
    forwards = [m.forward.__func__ for m in unet.modules()]
    return repr(unet), hooks, kwargs_hooks, attributes, processors, state, forwards, dict(unet.config)


def test_apply_then_remove_leaves_no_trace(unet: UNet2DConditionModel) -> None:
    before, plain = traces(unet), call_unet(unet, X, TEXT)
    handle = backend.apply(unet, patch_for(unet), patch_for(unet, seed=1, mask=torch.ones(8, 8)))
    assert traces(unet)[1] != before[1], "nothing was hooked, so removing proves nothing"
    call_unet(unet, X, TEXT)
    handle.remove()
    handle.remove()
    assert traces(unet) == before
    assert torch.equal(call_unet(unet, X, TEXT), plain)
    with pytest.raises(InvalidInputError, match="apply them again"):
        handle.set_schedule(WeightSchedule(0.5))


def test_removed_adapters_are_freed(unet: UNet2DConditionModel) -> None:
    patch = patch_for(unet)
    k = weakref.ref(patch.sites[0].k)
    handle = backend.apply(unet, patch)
    call_unet(unet, X, TEXT)
    handle.remove()
    del patch, handle
    gc.collect()
    assert k() is None


def test_removal_after_an_error_in_the_model(unet: UNet2DConditionModel) -> None:
    before = traces(unet)
    with pytest.raises(RuntimeError), backend.apply(unet, patch_for(unet)):
        call_unet(unet, X, TEXT[..., :-1])
    assert traces(unet) == before


def test_other_unets_are_not_touched(unet: UNet2DConditionModel) -> None:
    other = copy.deepcopy(unet)
    plain = call_unet(other, X, TEXT)
    with backend.apply(unet, patch_for(unet)):
        assert torch.equal(call_unet(other, X, TEXT), plain)


def test_live_changes(unet: UNet2DConditionModel) -> None:
    """A handle follows new schedules and masks at once; switched off, its hooks stay for torch.compile and do nothing."""
    plain = call_unet(unet, X, TEXT)
    mask = torch.zeros(16, 16)
    mask[:8] = 1
    with backend.apply(unet, patch_for(unet)) as handle:
        handle.set_schedule(WeightSchedule(0.3, preset="style transfer"))
        handle.set_mask(mask)
        got = call_unet(unet, X, TEXT)
        handle.set_schedule(WeightSchedule(0.0))
        assert torch.equal(call_unet(unet, X, TEXT), plain)
        assert handle.patches[0].schedule.strength == 0.0
    assert_close(got, run_applied(unet, patch_for(unet, strength=0.3, preset="style transfer", mask=mask)), **TOLERANCE)


def test_a_patch_for_another_model_is_refused(unet: UNet2DConditionModel) -> None:
    before = traces(unet)
    sdxl = tiny_unet(SDXL)
    with pytest.raises(IncompatibleAdapterError, match="70 sites"):
        backend.apply(unet, patch_for(unet), patch_for(sdxl))
    with pytest.raises(InvalidInputError):
        backend.apply(unet)
    assert traces(unet) == before


def test_a_batch_that_cannot_hold_the_branches_is_refused(unet: UNet2DConditionModel) -> None:
    with pytest.raises(InvalidInputError, match="batch of 3"):
        run_applied(unet, patch_for(unet), x=X[:3], text=TEXT[:3])


# --- besides others --------------------------------------------------------------------------------------------------


class LoudProcessor:
    """Somebody else's processor: no shared code with diffusers', and a side effect of its own."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(t) for t in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        out = attn.batch_to_head_dim((q @ k.mT * attn.scale).softmax(-1) @ v)
        return attn.to_out[1](attn.to_out[0](out)) * 1.25


@pytest.mark.parametrize("other", ["AttnProcessor", "sliced", "custom"])
def test_other_processors_stay_and_keep_working(unet: UNet2DConditionModel, other: str) -> None:
    plain_difference = run_applied(unet, patch_for(unet)) - call_unet(unet, X, TEXT)
    if other == "sliced":
        unet.set_attention_slice(1)
    else:
        unet.set_attn_processor({"AttnProcessor": AttnProcessor, "custom": LoudProcessor}[other]())
    processors = dict(unet.attn_processors)
    plain = call_unet(unet, X, TEXT)
    got = run_applied(unet, patch_for(unet))
    assert unet.attn_processors == processors
    if other == "custom":
        assert (got - plain).abs().max() > 0.01
    else:  # the same maths in another order
        assert_close(got - plain, plain_difference, **TOLERANCE)
    assert torch.equal(call_unet(unet, X, TEXT), plain)


class WithLoRA(nn.Module):
    """A linear layer wrapped as peft wraps it."""

    def __init__(self, base_layer: nn.Linear, seed: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.up, self.down = (
            noise(base_layer.out_features, 2, seed=seed),
            noise(2, base_layer.in_features, seed=seed + 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.3 * x @ self.down.T @ self.up.T


def add_lora(unet: nn.Module) -> None:
    for i, module in enumerate(m for m in unet.modules() if isinstance(m, Attention)):
        module.to_q = WithLoRA(module.to_q, i)
        module.to_out[0] = WithLoRA(module.to_out[0], i + 50)


def test_a_lora_may_come_before_or_after(unet: UNet2DConditionModel) -> None:
    with backend.apply(unet, patch_for(unet)) as handle:
        without = call_unet(unet, X, TEXT)
        add_lora(unet)
        after = call_unet(unet, X, TEXT)
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    assert (after - without).abs().max() > 0.01
    assert_close(after, run_applied(unet, patch_for(unet)), **TOLERANCE)  # applied on the UNet that has the LoRA


def test_a_processor_that_bypasses_to_q_is_named() -> None:
    class Bypassing(LoudProcessor):
        def __call__(
            self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
        ):
            return attn.to_out[0](hidden_states)

    unet = tiny_unet()
    patch = patch_for(unet)
    unet.set_attn_processor(Bypassing())
    with pytest.raises(IncompatibleAdapterError, match=r"down_blocks\.0\.attentions\.0.*set_default_attn_processor"):
        run_applied(unet, patch)


def test_the_backend_works_on_a_unet_with_diffusers_ip_adapter() -> None:
    """Theirs and ours side by side are two adapters."""
    reference = reference_for(SD15, ("base", "plus"))
    expected = reference.run((0.7, 0.5))
    reference.run((0.7, 0.0))
    both = Reference(SD15, ("base",))
    for processor in both.theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7]
    second = reference.patches((0.7, 0.5))[1]
    with backend.apply(both.theirs, second):
        got = call_unet(both.theirs, X, TEXT, added_cond_kwargs={"image_embeds": both.features()})
    assert_close(got, expected, **TOLERANCE)


def test_gradients_flow_through_an_applied_adapter(unet: UNet2DConditionModel) -> None:
    x = X.clone().requires_grad_()
    with backend.apply(unet, patch_for(unet)):
        unet(x, torch.tensor(500.0), TEXT).sample.square().mean().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


def test_patches_baked_in_inference_mode_serve_training(unet: UNet2DConditionModel) -> None:
    with torch.inference_mode():
        patch = patch_for(unet)
        inference = run_applied(unet, patch)
    x = X.clone().requires_grad_()
    with backend.apply(unet, patch):
        out = unet(x, torch.tensor(500.0), TEXT).sample
    out.mean().backward()
    assert_close(out.detach(), inference.clone(), **TOLERANCE)


# --- the trainable form ----------------------------------------------------------------------------------------------


def trainable(kind: str, scale: float = 0.7) -> tuple[UNet2DConditionModel, nn.ModuleList]:
    unet = tiny_unet(kind)
    unet.set_attn_processor(build_processors(unet, scale=scale))
    return unet, nn.ModuleList(unet.attn_processors.values())


def ip_adapter_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("ip_adapter."): value for key, value in state.items() if key.startswith("ip_adapter.")}


@pytest.mark.parametrize("kind", [SD15, SDXL])
def test_key_numbers_equal_released_files(kind: str) -> None:
    unet, modules = trainable(kind)
    state = ip_adapter_keys(adapter_state("base", layout_of(unet)))
    assert {k: v.shape for k, v in modules.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert next(iter(state)) == "1.to_k_ip.weight"
    assert len(state) == 2 * {SD15: 16, SDXL: 70}[kind]


@pytest.mark.parametrize("kind", [SD15, SDXL])
def test_training_computes_what_inference_computes(kind: str) -> None:
    unet, modules = trainable(kind)
    state = adapter_state("base", layout_of(unet))
    modules.load_state_dict(ip_adapter_keys(state))
    reference = reference_for(kind, ("base",))
    prompt = reference.prompts[0]
    text = torch.cat([TEXT, torch.cat([prompt.uncond, prompt.uncond, prompt.cond, prompt.cond])], 1)
    got = call_unet(unet, X, text)
    assert_close(got, run_applied(reference.unet, *reference.patches((0.7,))), **TOLERANCE)
    assert_close(got, reference.run((0.7,)), **TOLERANCE)


def test_gradients_reach_exactly_the_adapter() -> None:
    unet, modules = trainable(SD15)
    for parameter in unet.parameters():
        parameter.requires_grad_(True)  # a trainer that forgets to freeze would still see which ones matter
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name.endswith(("to_k_ip.weight", "to_v_ip.weight")))
    text = torch.cat([TEXT, noise(4, 4, TOKEN_DIM, seed=9)], 1)
    unet(X, torch.tensor(500.0), text).sample.square().mean().backward()
    reached = {
        name
        for name, parameter in modules.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }
    assert reached == set(modules.state_dict())
    frozen = [name for name, p in unet.named_parameters() if p.grad is not None and "_ip.weight" not in name]
    assert frozen == []


def test_starts_as_copies_or_as_the_base_model() -> None:
    unet = tiny_unet()
    copies = build_processors(unet)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    layer = unet.get_submodule(name)
    processor = copies[f"{name}.processor"]
    assert isinstance(processor, IPAttnProcessor)
    assert torch.equal(processor.to_k_ip.weight, layer.to_k.weight)
    assert torch.equal(processor.to_v_ip.weight, layer.to_v.weight)
    plain = call_unet(unet, X, TEXT)
    unet.set_attn_processor(build_processors(unet, init="zero_v"))
    got = call_unet(unet, X, torch.cat([TEXT, noise(4, 4, TOKEN_DIM, seed=9)], 1))
    assert_close(got, plain, **TOLERANCE)


def test_the_trainable_form_needs_its_image_tokens() -> None:
    unet, _ = trainable(SD15)
    with pytest.raises(ValueError, match="4 image tokens, got 3"):
        call_unet(unet, X, TEXT[:, :3])


def test_hidden_sizes_are_those_of_the_layers() -> None:
    unet = tiny_unet(SDXL)
    processors = [p for p in build_processors(unet, num_tokens=7).values() if isinstance(p, IPAttnProcessor)]
    assert tuple(p.hidden_size for p in processors) == checkpoint_channels(layout_of(unet))
    assert {p.num_tokens for p in processors} == {7}
    assert FEATURE_DIM != TOKEN_DIM
