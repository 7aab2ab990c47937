"""LoRAs on a fake ComfyUI: nothing on the model between calls, clones apart, regions, areas, chunks in any order."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false
# pyright: reportPrivateUsage=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fake_model import FakeDoor
from ipadapter_core import RegionMask, WeightSchedule, Window, bake
from ipadapter_core.backends.comfy import doors as image_backend
from ipadapter_core.backends.comfy import lora as backend
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.lora import load_lora
from ipadapter_core.lora.patch import LoRAPatch, choose_mode, masked
from ipadapter_core.lora.selector import parse_selector
from ipadapter_core.models.unet import walk_unet
from tiny_loras import MAKERS, tiny_lora
from tiny_models import (
    TOKEN_DIM,
    FakePatcher,
    Guider,
    HostModel,
    conditioning,
    noise,
    tiny_adapter,
    tiny_host,
    tiny_prompt,
)

CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 5e-5}  # outputs of size 10; processors differ in the order of sums
X = noise(2, 4, 12, 16, seed=3)
TEXTS = {name: noise(1, 7, TOKEN_DIM, seed=10 + i) for i, name in enumerate(("positive", "negative", "middle"))}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=[False, True], ids=["shares patches", "deep-copies"])
def host(request: pytest.FixtureRequest) -> FakePatcher:
    return tiny_host(deepcopy_options=request.param)


def patch_on(
    host: FakePatcher, *, where: str = "", algorithm: str = "LoRA", seed: int = 0, **settings: Any
) -> LoRAPatch:
    weights = tiny_lora(host.get_model_object("diffusion_model"), where, algorithm, seed=seed)
    return replace(LoRAPatch(backend.place(weights, host)), **settings)


def sample(host: Any, percent: float = 0.5, **more: Any) -> dict[str, Tensor]:
    conds: Any = {name: [conditioning(TEXTS[name])] for name in ("positive", "negative")}
    return Guider(host, conds, **more)(X, percent)


def live(host: Any, *patches: LoRAPatch) -> Any:
    for patch in patches:
        host = backend.apply_unfused(host, patch)
    return host


class Merged:
    def __init__(self, parts: tuple[backend.Part, ...]) -> None:
        self.parts = parts


def merged_sample(host: FakePatcher, *patches: LoRAPatch) -> dict[str, Tensor]:
    """What the host does with its patches, around one sampling step."""
    for patch in patches:
        host = backend.apply_merged(host, patch, ("denoiser",), Merged)  # type: ignore[assignment]
    parameters = dict(host.model.named_parameters())
    kept = {key: parameters[key].data.clone() for key in host.patches}
    for key, entries in host.patches.items():
        ((_, merged, *_),) = entries
        parameters[key].data += backend.merge_parts(kept[key], merged.parts)
    out = sample(host)
    for key, weight in kept.items():
        parameters[key].data.copy_(weight)
    return out


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    for name in a:
        assert_close(a[name], b[name], **CLOSE)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return min(float((a[name] - b[name]).abs().mean()) for name in a)


@pytest.mark.parametrize("algorithm", MAKERS)
def test_merged_is_live(algorithm: str) -> None:
    host = tiny_host()
    patch = patch_on(host, algorithm=algorithm, strength=0.7)
    beside = sample(live(host, patch))
    assert apart(beside, sample(host)) > 1e-3
    assert_same(beside, merged_sample(host, patch))


def test_strength_0_is_bit_identical(host: FakePatcher) -> None:
    patch = patch_on(host, strength=0.0)
    assert equal(sample(live(host, patch)), sample(host))
    assert backend.apply_merged(host, patch, ("denoiser",), Merged).patches == {}


def test_nothing_is_on_the_model_between_calls(host: FakePatcher) -> None:
    plain = sample(host)
    patched = live(host, patch_on(host))
    assert not equal(sample(patched), plain)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in host.model.modules())
    assert equal(sample(host), plain), "a clone's LoRA reached the original"


def test_hooks_are_taken_off_after_an_error(host: FakePatcher) -> None:
    patched = live(host, patch_on(host))
    with pytest.raises(RuntimeError):
        Guider(patched, {"positive": [conditioning(noise(1, 7, TOKEN_DIM + 1))]}, ("positive",))(X)
    assert all(not m._forward_hooks for m in host.model.modules())


def test_branches_chains_and_stacks(host: FakePatcher) -> None:
    a, b = patch_on(host, seed=1, strength=0.5), patch_on(host, seed=2, strength=-1.0)
    one = live(host, a)
    both, other = live(one, b), live(host, b)
    assert backend.unfused_patches(both) == (a, b)
    assert backend.unfused_patches(one) == (a,), "chaining changed the model it started from"
    results = [sample(model) for model in (one, both, other)]
    assert_same(results[1], sample(live(host, b, a)))
    assert_same(results[1], merged_sample(host, a, b))
    assert_same(results[0], sample(one))
    assert apart(results[0], results[1]) > 1e-3


def test_merged_ones_on_one_weight_are_one_patch(host: FakePatcher) -> None:
    """Each from the pristine weight, so that their order does not matter, not even for DoRA and OFT."""
    patches = [patch_on(host, algorithm=a, seed=i, strength=0.5) for i, a in enumerate(("DoRA out", "OFT", "LoRA"))]
    assert_same(merged_sample(host, *patches), merged_sample(host, *reversed(patches)))


def test_others_patches_on_a_weight_stay(host: FakePatcher) -> None:
    patch = patch_on(host, where="attn1 q")
    key = f"diffusion_model.{patch.matched.matches[0].key}"
    host.patches[key] = [(1.0, "theirs", 1.0, None, None)]
    first = backend.apply_merged(host, patch, ("denoiser",), Merged)
    second = backend.apply_merged(first, patch, ("denoiser",), Merged)
    assert next(entry[1] for entry in second.patches[key]) == "theirs"
    assert len(second.patches[key]) == 2
    assert len(second.patches[key][1][1].parts) == 2
    assert len(host.patches[key]) == 1


@pytest.mark.parametrize("how", [{}, {"chunks": 1}, {"order": ("negative", "positive")}])
def test_strength_of_the_negative_prompt(how: dict[str, Any]) -> None:
    """By the guider's names, whatever the order of chunks and however many fit into one call."""
    host = tiny_host()
    patch = patch_on(host, strength=0.9, uncond_strength=0.2)
    out = sample(live(host, patch), **how)
    assert_close(out["positive"], sample(live(host, replace(patch, uncond_strength=None)))["positive"], **CLOSE)
    weak = replace(patch, strength=0.2, uncond_strength=None)
    assert_close(out["negative"], sample(live(host, weak))["negative"], **CLOSE)


def test_schedules(host: FakePatcher) -> None:
    window = Window(0.1, 0.9, curve=((0.0, 1.0), (1.0, 0.0)))
    patched = live(host, patch_on(host, window=window))
    for percent, factor in ((0.25, 0.75), (0.5, 0.5)):
        expected = sample(live(host, patch_on(host, strength=factor)), percent)
        for name, out in sample(patched, percent).items():
            assert_close(out, expected[name], rtol=0, atol=2e-3)  # progress from float32 sigmas
    for percent in (0.02, 0.98):
        assert equal(sample(patched, percent), sample(host, percent))


# --- regions ---------------------------------------------------------------------------------------------------------


def half(left: bool) -> Tensor:
    mask = torch.zeros(96, 128)
    mask[:, :64] = 1
    return mask if left else 1 - mask


def test_ones_and_zeros(host: FakePatcher) -> None:
    patch = patch_on(host, where="attn1: 1, attn2: 1, ff: 1, conv: 1")
    assert_same(sample(live(host, masked(patch, torch.ones(8, 8)))), sample(live(host, patch)))
    assert_same(sample(live(host, masked(patch, torch.zeros(8, 8)))), sample(host))


def test_a_region_beside_an_image_prompt_in_either_order(host: FakePatcher) -> None:
    layout = image_backend.comfy_layout(host)
    adapter = tiny_adapter(layout)
    image = bake(adapter, tiny_prompt(adapter), layout, WeightSchedule(0.8))
    patch = masked(patch_on(host), half(True))
    first = image_backend.apply(live(host, patch), image)
    second = live(image_backend.apply(host, image), patch)
    assert image_backend.applied_patches(first) == image_backend.applied_patches(second) == (image,)
    assert_same(sample(first), sample(second))
    zero = masked(patch, torch.zeros(4, 4))
    assert_same(sample(live(image_backend.apply(host, image), zero)), sample(image_backend.apply(host, image)))
    third = live(second, masked(patch_on(host, seed=3), half(False)))
    assert apart(sample(third), sample(second)) > 1e-4


def test_text_regions_blend_the_attentions(host: FakePatcher) -> None:
    """One attention layer's k and v: the outputs of two complementary regions are those of the whole LoRA."""
    patch = patch_on(host, where="in1 attn2 k: 1, in1 attn2 v: 1", strength=2.0)
    whole = sample(live(host, patch))
    assert apart(whole, sample(host)) > 1e-4
    assert_same(sample(live(host, masked(patch, half(True)), masked(patch, half(False)))), whole)


def test_areas_take_their_part_of_the_mask() -> None:
    """A conditioning that sees the right half only is not touched by a LoRA on the left."""
    host = tiny_host()
    patch = masked(patch_on(host, where="attn1: 1, ff: 1, conv: 1"), half(True))
    entries: Any = {"positive": [conditioning(TEXTS["positive"], area=(12, 8, 0, 8))]}
    plain = Guider(host, entries, ("positive",))(X)["positive"]
    assert_close(Guider(live(host, patch), entries, ("positive",))(X)["positive"], plain, **CLOSE)
    entries["positive"] = [conditioning(TEXTS["positive"], area=(12, 8, 0, 0))]
    whole = replace(patch, mask=None)
    expected = Guider(live(host, whole), entries, ("positive",))(X)["positive"]
    assert_close(Guider(live(host, patch), entries, ("positive",))(X)["positive"], expected, **CLOSE)


def test_one_model_call_whatever_the_number_of_regions(host: FakePatcher) -> None:
    patches = [masked(patch_on(host, seed=i), RegionMask.from_tensor(half(bool(i % 2)))) for i in range(4)]
    host.model.calls.clear()
    sample(live(host, *patches))
    assert len(host.model.calls) == 1


def test_selectors_leave_layers_alone(host: FakePatcher) -> None:
    patch = patch_on(host, selector=parse_selector("all: 0, attn2 k: 1"))
    (wrapper,) = live(host, patch).wrappers["apply_model"][backend.LORA_KEY]
    assert all(path.endswith("attn2.to_k") for path in wrapper.stack.layers)
    nowhere = live(host, patch_on(host, selector=parse_selector("all: 0")))
    assert not nowhere.wrappers.get("apply_model", {}).get(backend.LORA_KEY)


def test_text_encoders_are_merged_by_their_own_names() -> None:
    """ComfyUI's pair of CLIPs: lora_te1 goes to clip_l, lora_te2 to clip_g, at the text strength."""
    layer = "encoder.layers.0.self_attn.q_proj"
    encoders = torch.nn.Module()
    for clip in ("clip_l", "clip_g"):
        owner = encoders
        for part in (clip, "transformer", "text_model", *layer.split(".")[:-1]):
            owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module("q_proj", torch.nn.Linear(8, 8))
    state = {}
    for n, prefix in enumerate(("lora_te1_", "lora_te2_")):
        stem = f"{prefix}text_model_{layer.replace('.', '_')}"
        state |= {f"{stem}.lora_down.weight": noise(2, 8, seed=n), f"{stem}.lora_up.weight": noise(8, 2, seed=n + 5)}
    placed = backend.place(load_lora(state), None, encoders)
    patch = LoRAPatch(placed, strength=1.0, text_strength=0.5)
    patcher: Any = backend.apply_merged(FakePatcher(encoders), patch, ("te1", "te2", "te3"), Merged)
    key = f"clip_l.transformer.text_model.{layer}.weight"
    assert set(patcher.patches) == {key, key.replace("clip_l", "clip_g")}
    ((_, merged, *_),) = patcher.patches[key]
    stem = f"lora_te1_text_model_{layer.replace('.', '_')}"
    expected = 0.5 * state[f"{stem}.lora_up.weight"] @ state[f"{stem}.lora_down.weight"]
    assert_close(backend.merge_parts(torch.zeros(8, 8), merged.parts), expected)


def test_without_slots_the_attention_runs_again_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    host = tiny_host()
    patches = [masked(patch_on(host, seed=i), half(bool(i))) for i in range(2)]
    expected = sample(live(host, *patches))
    monkeypatch.setitem(image_backend.DOORS, walk_unet, FakeDoor())
    through_modules = live(host, *patches)
    assert not through_modules.slots
    assert_same(sample(through_modules), expected)


# --- what the host runs before the steps --------------------------------------------------------------------------------


class Prepared(torch.nn.Module):
    """A model that prepares the prompt once for all steps, as Anima's and LTX-2's in ComfyUI."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("refiner", "projection", "inside", "unused"):
            self.add_module(name, torch.nn.Linear(4, 4))

    def preprocess_text_embeds(self, text: Tensor) -> Tensor:
        return self.connected(self.projection(text))

    def connected(self, text: Tensor) -> Tensor:
        return self.refiner(text)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


def test_what_the_host_runs_before_the_steps_is_merged_beside_what_is_live() -> None:
    model = Prepared()
    assert backend.run_ahead(model) == {"projection", "refiner"}
    assert backend.run_ahead(torch.nn.Sequential(model)) == frozenset()
    host: Any = FakePatcher(HostModel(model))
    state: dict[str, Tensor] = {}
    for seed, name in enumerate(("refiner", "inside")):
        state[f"diffusion_model.{name}.lora_down.weight"] = noise(2, 4, seed=seed)
        state[f"diffusion_model.{name}.lora_up.weight"] = noise(4, 2, seed=10 + seed)
    patch = LoRAPatch(backend.place(load_lora(state, name="both"), host), strength=0.5)
    assert [choose_mode([patch], mode).mode for mode in ("auto", "live", "merged")] == ["merged", "live", "merged"]
    assert choose_mode([patch], quantised=True).mode == "live"
    applied: Any = backend.apply_live(host, patch, Merged)
    assert list(applied.patches) == ["diffusion_model.refiner.weight"]
    ((_, merged, *_),) = applied.patches["diffusion_model.refiner.weight"]
    change = backend.merge_parts(model.refiner.weight.detach(), merged.parts)
    down, up = (state[f"diffusion_model.refiner.lora_{part}.weight"] for part in ("down", "up"))
    assert_close(change, 0.5 * up @ down)
    stack = backend.unfused_stack(applied)
    assert stack is not None
    assert list(stack.layers) == ["inside"]
    assert not host.patches
    assert "refiner" in str(patch.beside_layers().matched.matches[0].target.path)
    for changes in (
        {"window": Window(end_percent=0.5)},
        {"uncond_strength": 0.0},
        {"mask": RegionMask.of(noise(4, 4).abs())},
    ):
        scheduled = replace(patch, **changes)
        with pytest.raises(
            InvalidInputError, match=r"refiner.weight, which the host runs once for a prompt, before the steps"
        ):
            choose_mode([scheduled])
        beside = scheduled.beside_layers()
        assert [match.target.path for match in beside.matched.matches] == ["inside"]
        assert choose_mode([beside]).mode == "live"
