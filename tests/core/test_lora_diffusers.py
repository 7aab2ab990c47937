"""LoRAs on diffusers' models: merged and live give the same, 0 is nothing, nothing stays behind, regions and schedules."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core import WeightSchedule, Window, bake, layout_of
from ipadapter_core.backends.diffusers import doors as image_backend
from ipadapter_core.backends.diffusers import lora as backend
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.lora.matching import TargetMatch
from ipadapter_core.lora.patch import LoRAPatch, choose_mode, masked
from ipadapter_core.lora.selector import parse_selector
from ipadapter_core.lora.unfused import UnfusedStack
from tiny_loras import MAKERS, tiny_lora
from tiny_models import SD15, SDXL, TOKEN_DIM, call_unet, noise, tiny_adapter, tiny_prompt, tiny_unet

X, TEXT = noise(2, 4, 16, 16, seed=3), noise(2, 7, TOKEN_DIM, seed=4)
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 2e-5}  # fp32 sums in another order; outputs of size 1
WHERE = "attn1: 1, attn2: 1, ff: 1, resnet: 1, sampler: 1, proj: 1"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def unet() -> Any:
    return tiny_unet("small")


def patch_on(
    unet: nn.Module, *, where: str = WHERE, algorithm: str = "LoRA", seed: int = 0, **settings: Any
) -> LoRAPatch:
    return replace(backend.place(unet, tiny_lora(unet, where, algorithm, seed=seed)), **settings)


def run(unet: Any, x: Tensor = X, **more: Any) -> Tensor:
    return call_unet(unet, x, TEXT[: x.shape[0]], **more)


def live(unet: Any, *patches: LoRAPatch, x: Tensor = X, t: float = 500.0, **more: Any) -> Tensor:
    with backend.apply(unet, *patches, **more):
        return run(unet, x, t=t)


def merged(unet: Any, *patches: LoRAPatch) -> Tensor:
    with backend.merge(unet, *patches):
        return run(unet)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def effect(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


@pytest.mark.parametrize("strength", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("algorithm", MAKERS)
def test_merged_is_live(unet: Any, algorithm: str, strength: float) -> None:
    """Linears and convolutions of resnets, transformers, down- and upsamplers alike."""
    patch = patch_on(unet, algorithm=algorithm, strength=strength)
    kinds = {len(p.target.shape) for p in patch.matched.matches}
    assert {2, 4} <= kinds
    plain, beside = run(unet), live(unet, patch)
    assert effect(plain, beside) > 0.005
    assert_close(merged(unet, patch), beside, **CLOSE)


def test_the_change_is_the_formula(unet: Any) -> None:
    """W + s · α/r · up · down, written into a copy of the model by hand."""
    weights = tiny_lora(unet, WHERE)
    other = copy.deepcopy(unet)
    for module in weights.modules:
        update: Any = module.weight
        (path,) = [n for n, _ in other.named_modules() if n.replace(".", "_") == module.name]
        weight = other.get_submodule(path).weight
        with torch.no_grad():
            weight += (0.7 * 0.5 * update.up.flatten(1) @ update.down.flatten(1)).reshape(weight.shape)
    assert_close(live(unet, replace(backend.place(unet, weights), strength=0.7)), run(other), **CLOSE)


@pytest.mark.parametrize("kind", [SD15, SDXL])
def test_real_topologies(kind: str) -> None:
    unet = tiny_unet(kind)
    patch = patch_on(unet, where="attn2: 1, conv: 1", strength=0.5)
    assert_close(merged(unet, patch), live(unet, patch), **CLOSE)


@pytest.mark.parametrize("algorithm", MAKERS)
def test_strength_0_changes_no_bit_and_adds_no_operation(unet: Any, algorithm: str) -> None:
    plain = run(unet)
    patch = patch_on(unet, algorithm=algorithm, strength=0.0)
    assert torch.equal(live(unet, patch), plain)
    assert torch.equal(merged(unet, patch), plain)
    with backend.merge(unet, patch) as applied:
        assert applied.writes == 0


def test_removing_leaves_no_trace(unet: Any) -> None:
    before, described, plain = weights_of(unet), repr(unet), run(unet)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())
    patch = patch_on(unet)
    for apply in (backend.apply, backend.merge):
        applied: Any = apply(unet, patch)
        assert not torch.equal(run(unet), plain)
        applied.remove()
        applied.remove()
        assert torch.equal(run(unet), plain)
        assert repr(unet) == described
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules()) == hooks
    after = weights_of(unet)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_order_does_not_matter(unet: Any) -> None:
    """Also for DoRA and OFT, since each change is made from the pristine weight."""
    patches = [patch_on(unet, algorithm=a, seed=i, strength=0.6) for i, a in enumerate(("LoRA", "DoRA out", "OFT"))]
    # bit-identity is not asked: sums round differently
    assert_close(merged(unet, *patches), merged(unet, *reversed(patches)), **CLOSE)
    low = [patch_on(unet, seed=i, strength=s) for i, s in enumerate((0.5, -1.0, 2.0))]
    assert_close(live(unet, *low), live(unet, *reversed(low)), **CLOSE)
    assert_close(live(unet, *low), merged(unet, *low), **CLOSE)


def test_two_live_ones_chained_by_two_applies(unet: Any) -> None:
    a, b = patch_on(unet, seed=1), patch_on(unet, seed=2, strength=-0.5)
    with backend.apply(unet, a), backend.apply(unet, b):
        chained = run(unet)
    assert_close(chained, live(unet, a, b), **CLOSE)


def test_strength_is_a_number_for_the_time_of_a_block(unet: Any) -> None:
    """Score distillation: one UNet, the frozen pass and the LoRA pass by turns."""
    plain, patch = run(unet), patch_on(unet, strength=0.8)
    before = weights_of(unet)
    with backend.apply(unet, patch) as lora:
        on = run(unet)
        with lora.strength(0):
            assert torch.equal(run(unet), plain)
            with lora.strength(0.8):
                assert torch.equal(run(unet), on)
            assert torch.equal(run(unet), plain)
        assert torch.equal(run(unet), on)
        with pytest.raises(RuntimeError), lora.strength(0):
            raise RuntimeError
        assert torch.equal(run(unet), on)
        lora.set_strength(0.4)
        half = run(unet)
    assert_close(half, live(unet, replace(patch, strength=0.4)), **CLOSE)
    after = weights_of(unet)
    assert all(torch.equal(before[name], after[name]) for name in before), "a weight was written"


def test_selectors_choose_layers(unet: Any) -> None:
    patch = patch_on(unet, where="attn1: 1, attn2: 1")
    only = patch_on(unet, where="attn1: 1, attn2: 1", selector=parse_selector("attn1: 0"))
    by_hand = UnfusedStack([only])
    assert by_hand.layers
    assert all(".attn2." in path for path in by_hand.layers)
    assert_close(live(unet, only), merged(unet, only), **CLOSE)
    nothing = patch_on(unet, selector=parse_selector("all: 0"))
    assert torch.equal(live(unet, nothing), run(unet))
    assert effect(live(unet, patch), live(unet, only)) > 1e-3


@pytest.mark.parametrize("algorithm", ["LoRA", "DoRA in", "full"])
def test_uncond_strength_acts_on_its_part_of_the_batch(unet: Any, algorithm: str) -> None:
    """As two runs at the two strengths do; ``full`` changes biases too, which add the same to every row."""
    both = ("uncond", "cond")
    patch = patch_on(unet, algorithm=algorithm, strength=0.9, uncond_strength=0.2)
    out = live(unet, patch, branches=both)
    assert_close(out[:1], live(unet, replace(patch, strength=0.2, uncond_strength=None))[:1], **CLOSE)
    assert_close(out[1:], live(unet, replace(patch, uncond_strength=None))[1:], **CLOSE)
    off = live(unet, replace(patch, uncond_strength=0.0), branches=both)
    assert_close(off[:1], run(unet)[:1], **CLOSE)


def test_schedules_over_the_steps(unet: Any) -> None:
    window = Window(end_percent=0.8, curve=((0.0, 1.0), (1.0, 0.0)))
    patch = patch_on(unet, window=window)
    constant = replace(patch, window=Window())
    for t, factor in ((999.0, 1.0), (499.5, 0.5), (100.0, 0.0)):
        expected = live(unet, replace(constant, strength=factor), t=t)
        assert_close(live(unet, patch, t=t), expected, **CLOSE)
    assert torch.equal(live(unet, patch, t=100.0), run(unet, t=100.0))


# --- merged, several and with mishaps --------------------------------------------------------------------------------


def same_weights(unet: nn.Module, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in unet.state_dict().items())


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merges_go_in_any_order(unet: Any, order: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also such as read the weight; what stays is what merging it alone gives, bit for bit."""
    unet = unet.to(dtype)
    before = weights_of(unet)
    patches = [patch_on(unet, algorithm=a, seed=i, strength=0.5) for i, a in enumerate(("LoRA", "DoRA out", "OFT"))]
    handles = [backend.merge(unet, patch) for patch in patches]
    everything = weights_of(unet)
    for gone in range(1, 4):
        handles[order[gone - 1]].remove()
        left = [patches[i] for i in range(3) if i not in order[:gone]]
        other = copy.deepcopy(unet)
        other.load_state_dict(before)
        if left:
            backend.merge(other, *left)
        assert same_weights(unet, weights_of(other))
    assert same_weights(unet, before)
    assert not same_weights(unet, everything)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_merge_that_fails_midway_changes_no_weight(
    unet: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, merged_before: bool
) -> None:
    pristine = weights_of(unet)
    first = backend.merge(unet, patch_on(unet)) if merged_before else None
    before = weights_of(unet)
    patch = patch_on(unet, seed=1)
    real = TargetMatch.change
    count = iter(range(10**6))

    def change(self: TargetMatch, *args: Any) -> None:
        if next(count) == 20:
            raise error
        real(self, *args)

    monkeypatch.setattr(TargetMatch, "change", change)
    with pytest.raises(type(error)):
        backend.merge(unet, patch)
    monkeypatch.undo()
    assert same_weights(unet, before)
    again = backend.merge(unet, patch)
    again.remove()
    assert same_weights(unet, before)
    if first is not None:
        first.remove()
    assert same_weights(unet, pristine)


def weight_names(patch: LoRAPatch) -> list[str]:
    return [match.key for match in patch.matched.matches]


@pytest.mark.parametrize("stored", ["int8", "float8", "meta", "resized", "inference"])
def test_weights_that_cannot_be_merged_are_named_before_any_is_written(unet: Any, stored: str) -> None:
    patch = patch_on(unet)
    name = weight_names(patch)[-1]
    owner = unet.get_submodule(name.rpartition(".")[0])
    weight = owner.weight.data
    with torch.inference_mode():
        made_there = weight.clone()
    owner.weight = nn.Parameter(
        {
            "int8": lambda: weight.to(torch.int8),
            "float8": lambda: weight.to(torch.float8_e4m3fn),
            "meta": lambda: weight.to("meta"),
            "resized": lambda: torch.cat([weight, weight]),
            "inference": lambda: made_there,
        }[stored](),
        requires_grad=False,
    )
    before = {n: p for n, p in weights_of(unet).items() if n != name}
    with pytest.raises(InvalidInputError, match=name):
        backend.merge(unet, patch)
    assert all(torch.equal(p, before[n]) for n, p in unet.state_dict().items() if n in before)


def test_a_merge_beyond_the_dtype_is_refused(unet: Any) -> None:
    unet = unet.to(torch.float16)
    before = weights_of(unet)
    with pytest.raises(InvalidInputError, match=r"infinite or NaN in torch\.float16"):
        backend.merge(unet, patch_on(unet, strength=1e6))
    assert same_weights(unet, before)


@pytest.mark.parametrize("change", ["loaded", "cast", "added", "in .data"])
def test_weights_changed_while_merged_are_named_and_left_alone(unet: Any, change: str) -> None:
    """To put the kept weights back would undo the change in silence."""
    patch = patch_on(unet)
    loaded = {name: value + 0.01 for name, value in weights_of(unet).items()}
    handle = backend.merge(unet, patch)
    weight = unet.get_parameter(weight_names(patch)[0])
    if change == "loaded":
        unet.load_state_dict(loaded)
    elif change == "cast":
        unet.to(torch.bfloat16)
    elif change == "added":
        with torch.no_grad():
            weight += 0.01
    else:
        weight.data.mul_(2)
    now = weights_of(unet)
    for act in (handle.remove, lambda: backend.merge(unet, patch)):
        with pytest.raises(InvalidInputError, match="were changed by something else"):
            act()
        assert same_weights(unet, now)


def test_a_lasting_merge_keeps_nothing_aside(unet: Any) -> None:
    """Whoever drops the handle means the merge to stay; a later one starts from what is there."""
    patch = patch_on(unet)
    backend.merge(unet, patch)
    gc.collect()
    parameters = {id(p) for p in unet.parameters()}
    assert not [p for p in backend._MERGED if id(p) in parameters]
    stays = weights_of(unet)
    backend.merge(unet, patch_on(unet, seed=1)).remove()
    assert same_weights(unet, stays)


def test_modules_that_share_a_weight(unet: Any) -> None:
    """Two layers with one parameter: both changes are in it, and out of it again."""
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn2.to_q.weight = block.attn1.to_q.weight
    before = weights_of(unet)
    handle = backend.merge(unet, patch_on(unet, where="attn1 q: 1, attn2 q: 1"))
    assert not same_weights(unet, before)
    handle.remove()
    assert same_weights(unet, before)


# --- regions ---------------------------------------------------------------------------------------------------------


def halves() -> tuple[Tensor, Tensor]:
    left = torch.zeros(128, 128)
    left[:, :64] = 1
    return left, 1 - left


def test_a_mask_of_ones_is_no_mask_and_of_zeros_no_lora(unet: Any) -> None:
    patch = patch_on(unet, where="attn1: 1, attn2: 1, ff: 1, conv: 1")
    assert_close(live(unet, masked(patch, torch.ones(8, 8))), live(unet, patch), **CLOSE)
    assert_close(live(unet, masked(patch, torch.zeros(8, 8))), run(unet), **CLOSE)


def test_complementary_masks_of_one_lora_are_the_lora(unet: Any) -> None:
    patch = patch_on(unet, where="attn1: 1, ff: 1, conv: 1")
    left, right = halves()
    assert_close(live(unet, masked(patch, left), masked(patch, right)), live(unet, patch), **CLOSE)


def test_a_region_changes_its_pixels_and_not_others() -> None:
    """A single convolution at the end is local, so outside of the region no bit may change."""
    unet = tiny_unet("small")
    patch = patch_on(unet, where="re:^conv_out$")
    left, _ = halves()
    plain, out = run(unet), live(unet, masked(patch, left))
    assert torch.equal(out[..., 8:], plain[..., 8:])
    assert_close(out[..., :8], live(unet, patch)[..., :8], **CLOSE)


def test_text_keys_and_values_are_blended_by_region() -> None:
    """With the LoRA on k and v of the cross-attention alone: base + mask · (LoRA's attention − base), and exactly that."""
    unet = tiny_unet("one site")
    site = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    patch = patch_on(unet, where="attn2 k: 1, attn2 v: 1", strength=2.0)
    left, _ = halves()
    seen: dict[str, Tensor] = {}
    attention = unet.get_submodule(site)

    def remember(name: str) -> Any:
        return attention.register_forward_hook(lambda m, a, out: seen.__setitem__(name, out))

    for name, patches in (("plain", ()), ("whole", (patch,)), ("region", (masked(patch, left),))):
        if patches:
            with backend.apply(unet, *patches):
                handle = remember(name)  # after ours, so that it sees what we give
                run(unet)
                handle.remove()
        else:
            handle = remember(name)
            run(unet)
            handle.remove()
    grid = left[::8, ::8].reshape(1, -1, 1)
    assert effect(seen["plain"], seen["whole"]) > 1e-3
    assert_close(seen["region"], seen["plain"] + grid * (seen["whole"] - seen["plain"]), **CLOSE)


def test_regions_beside_an_image_prompt(unet: Any) -> None:
    """Either order of installing, and a region of zeros leaves the image prompt alone."""
    layout = layout_of(unet)
    adapter = tiny_adapter(layout)
    image = bake(adapter, tiny_prompt(adapter), layout, WeightSchedule(0.8))
    patch = patch_on(unet)
    left, _ = halves()
    with image_backend.apply(unet, image):
        alone = run(unet)
        assert_close(live(unet, masked(patch, torch.zeros(4, 4))), alone, **CLOSE)
        first = live(unet, masked(patch, left))
    with backend.apply(unet, masked(patch, left)), image_backend.apply(unet, image):
        second = run(unet)
    assert_close(first, second, **CLOSE)
    assert effect(first, alone) > 1e-3


def test_one_pass_of_the_model_whatever_the_number_of_regions(unet: Any) -> None:
    calls: list[int] = []
    unet.register_forward_pre_hook(lambda *_: calls.append(1))
    convolutions: list[int] = []
    unet.conv_in.register_forward_hook(lambda *_: convolutions.append(1))
    left, right = halves()
    live(unet, masked(patch_on(unet, seed=1), left), masked(patch_on(unet, seed=2), right), patch_on(unet, seed=3))
    assert (len(calls), len(convolutions)) == (1, 1)


# --- costs and mistakes ----------------------------------------------------------------------------------------------


def test_auto_says_why(unet: Any) -> None:
    patch = patch_on(unet)
    assert choose_mode([patch]).mode == "merged"
    assert choose_mode([patch], quantised=True).reason.startswith("the base weights are quantised")
    assert choose_mode([patch], offloaded=True).mode == "live"
    assert choose_mode([masked(patch, torch.ones(2, 2))]).reason == "it acts in a region"
    scheduled = replace(patch, window=Window(end_percent=0.5))
    assert choose_mode([scheduled]).reason == "its strength changes over the steps"
    with pytest.raises(InvalidInputError, match="'merged' is not possible: its strength changes"):
        choose_mode([scheduled], "merged")
    with pytest.raises(InvalidInputError, match="cannot be merged"):
        backend.merge(unet, scheduled)


def test_strengths_must_be_numbers(unet: Any) -> None:
    with pytest.raises(InvalidInputError, match="strength is nan"):
        patch_on(unet, strength=float("nan"))


def test_half_precision_and_bfloat16(unet: Any) -> None:
    unet = unet.to(torch.bfloat16)
    patch = patch_on(unet)

    def run_half() -> Tensor:
        with torch.no_grad():
            return unet(X.bfloat16(), torch.tensor(500.0), TEXT.bfloat16()).sample

    with backend.apply(unet, patch):
        beside = run_half()
    with backend.merge(unet, patch):
        into = run_half()
    assert beside.dtype == torch.bfloat16
    assert effect(beside.float(), into.float()) < 0.05 * effect(beside.float(), run_half().float()) + 0.02


def test_gradients_pass_through_live_loras(unet: Any) -> None:
    x = X.clone().requires_grad_()
    with backend.apply(unet, patch_on(unet)):
        unet(x, torch.tensor(500.0), TEXT).sample.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


@pytest.fixture
def encoder() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes: dict[str, int] = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99,
    }  # fmt: skip
    return CLIPTextModel(CLIPTextConfig(**sizes, projection_dim=8)).eval().requires_grad_(False)


def test_text_encoders_have_a_strength_of_their_own(unet: Any, encoder: nn.Module) -> None:
    from ipadapter_core.lora import load_lora, targets_of
    from tiny_loras import state_for

    pipeline = type("Pipeline", (), {"unet": unet, "text_encoder": encoder})()
    targets = [t for t in targets_of(encoder, "te1").targets.values() if "proj" in t.path]
    state = state_for(targets, prefix="lora_te_") | state_for(
        t for t in targets_of(unet).targets.values() if "attn2" in t.path
    )
    patch = replace(backend.place(pipeline, load_lora(state)), strength=1.0, text_strength=0.5)
    ids = torch.arange(5)[None]

    def encode() -> Tensor:
        with torch.no_grad():
            return encoder(ids).last_hidden_state

    plain = encode()
    with backend.apply(pipeline, patch) as lora:
        beside = encode()
        lora.set_patch(replace(patch, text_strength=0.0))
        assert torch.equal(encode(), plain)
    with backend.merge(pipeline, patch):
        assert_close(beside, encode(), **CLOSE)
    assert effect(beside, plain) > 1e-3
    assert torch.equal(encode(), plain)
