"""Image prompts inside the blocks of ComfyUI's transformers: the formula, whoever else is there, and what is told when it cannot be."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core import AdapterPatch, AdapterWeights, bake
from ipadapter_core.backends.comfy import blocks, doors
from ipadapter_core.backends.comfy.flux import FluxBlocks
from ipadapter_core.errors import IncompatibleAdapterError
from ipadapter_core.models.reach import Reach
from tiny_flux import HEADS, WIDTH, ComfyTransformer, comfy_chroma, comfy_flux
from tiny_models import (
    AtEverySite,
    BehindDoubleBlocks,
    FakePatcher,
    Guider,
    HostModel,
    conditioning,
    noise,
    tiny_adapter,
    tiny_prompt,
)
from torch_versions import WHOLE_GRAPHS

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}  # fp32, outputs of size 1
X, TEXT = noise(2, 4, 10, 6, seed=3), noise(1, 7, 32, seed=4)
FAMILIES: dict[str, Any] = {"everywhere": AtEverySite(), "behind": BehindDoubleBlocks()}
MODELS: dict[str, Callable[[], ComfyTransformer]] = {
    "Flux": comfy_flux,
    "older Flux": lambda: comfy_flux(newer=False),
    "Chroma": comfy_chroma,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def host(kind: str = "Flux") -> FakePatcher:
    return FakePatcher(HostModel(MODELS[kind]()))


def adapter_for(model: FakePatcher, family: str, seed: int = 0) -> AdapterWeights:
    layout, form = doors.comfy_layout(model), FAMILIES[family]
    channels = tuple(layout.sites[i].channels for i in form.reach.sites(layout))
    adapter = tiny_adapter(layout, seed=seed, channels=channels)
    return replace(adapter, spec=replace(adapter.spec, format=form))


def patch_for(model: FakePatcher, family: str, seed: int = 0, mask: Tensor | None = None) -> AdapterPatch:
    adapter = adapter_for(model, family, seed)
    return bake(adapter, tiny_prompt(adapter, seed=seed), doors.comfy_layout(model), mask=mask)


def prediction(model: FakePatcher) -> Tensor:
    return Guider(model, {"positive": [conditioning(TEXT)]}, ("positive",))(X)["positive"]


# --- the formula by the host's slots -----------------------------------------------------------------------------------


def by_slots(model: FakePatcher, family: str, mask: Tensor | None = None, picture: int = 15) -> FakePatcher:
    """The same image prompt as other packs make one: around blocks and in the attention's override, with the rotation undone."""
    adapter, state = adapter_for(model, family), dict[str, Any]()
    tokens = tiny_prompt(adapter).cond
    rows = torch.ones(picture) if mask is None else mask.flatten()
    layers = {index: i for i, index in enumerate(FAMILIES[family].reach.sites(doors.comfy_layout(model)))}

    def image(q: Tensor) -> Tensor:
        """``b h l d`` of all tokens to what is added to them, ``b l c``."""
        pe = state["pe"].mT  # the inverse of a rotation
        pairs = q.unflatten(-1, (-1, 1, 2))
        q = (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(-2)
        module, layer = adapter.module, layers[state["index"]]
        k, v = (
            to(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for to in (module.to_k_ip[layer], module.to_v_ip[layer])
        )
        out = F.scaled_dot_product_attention(q, k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1))
        behind = out.shape[2] - state["text"] - picture
        of_text = rows.mean() * (family == "everywhere" and state["single"])
        inside = torch.cat([of_text.expand(state["text"]), rows, torch.zeros(behind)])
        return out.transpose(1, 2).flatten(2) * inside[:, None]

    def override(function: Callable[..., Tensor], q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = function(q, *args, **kwargs)
        if state["index"] not in layers:
            return out
        state["image"] = image(q)
        return out + state["image"] if family == "everywhere" else out

    def around(kind: str, i: int) -> Callable[..., Any]:
        def occupant(args: dict[str, Any], extra: dict[str, Any]) -> Any:
            if kind == "double_block":
                state["text"] = args["txt"].shape[1]
            state.update(pe=args["pe"], index=i if kind == "double_block" else 2 + i, single=kind == "single_block")
            out = extra["original_block"](args)
            if family == "behind" and kind == "double_block":
                out["img"] = out["img"] + state["image"][:, state["text"] :]
            return out

        return occupant

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    for kind, count in (("double_block", 2), ("single_block", 3)):
        for i in range(count):
            clone.set_model_patch_replace(around(kind, i), "dit", kind, i)
    return clone


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_output_is_the_formula_in_the_hosts_slots(kind: str, family: str, masked: bool) -> None:
    model, mask = host(kind), torch.rand(5, 3, generator=torch.Generator().manual_seed(1)) if masked else None
    pixels = None if mask is None else mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
    got = prediction(doors.apply(model, patch_for(model, family, mask=pixels)))
    expected = prediction(by_slots(model, family, mask))
    assert (expected - prediction(model)).abs().max() > 0.05, "the adapter hardly acts"
    assert_close(got, expected, **TOLERANCE)


def with_reference() -> FakePatcher:
    model = host()
    model.model.diffusion_model.reference = noise(1, 4, 4, 4, seed=5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_pictures_stay_as_they_are(family: str) -> None:
    model = with_reference()
    expected = prediction(by_slots(model, family))
    assert_close(prediction(doors.apply(model, patch_for(model, family))), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("family", "broken"), [("behind", "_picture"), ("everywhere", "_picture"), ("everywhere", "texts")]
)
def test_that_comparison_can_fail(family: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_reference()
    expected = prediction(by_slots(model, family))
    if broken == "_picture":
        monkeypatch.setattr(blocks, "_picture", lambda layout, size, tokens: tokens)
    else:
        monkeypatch.setattr(FluxBlocks, "texts", lambda self, layout: ())
    assert (prediction(doors.apply(model, patch_for(model, family))) - expected).abs().max() > 1e-3


# --- beside others -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_in_the_hosts_slots_and_ours_add_up(family: str) -> None:
    """Also one whose block function calls the block twice, and in whatever order they were applied."""
    model = host()

    def twice(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        extra["original_block"]({name: v.clone() if isinstance(v, Tensor) else v for name, v in args.items()})
        return extra["original_block"](args)

    def occupied(model: FakePatcher) -> FakePatcher:
        model = model.clone()
        model.set_model_patch_replace(twice, "dit", "double_block", 1)
        return model

    patch = patch_for(model, family)
    expected = prediction(doors.apply(model, patch))
    for steered in (doors.apply(occupied(model), patch), occupied(doors.apply(model, patch))):
        assert_close(prediction(steered), expected, **TOLERANCE)
        assert doors.applied_patches(steered) == (patch,)


@contextmanager
def one_block_for_all(model: ComfyTransformer) -> Iterator[None]:
    """A pack that skips blocks puts one module in the place of all double blocks for the time of a call."""

    class All(nn.Module):
        def forward(self, img: Tensor, txt: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
            for block in own:
                img, txt = block(img=img, txt=txt, **more)
            return img, txt

    own = model.double_blocks
    model.double_blocks = nn.ModuleList([All()])
    try:
        yield
    finally:
        model.double_blocks = own


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_that_swaps_the_list_of_blocks(family: str) -> None:
    model = host()
    steered = doors.apply(model, patch_for(model, family))
    expected = prediction(steered)
    with one_block_for_all(model.model.diffusion_model):
        assert_close(prediction(steered), expected, **TOLERANCE)


def test_blocks_that_were_never_there_are_named() -> None:
    model = host()
    patch = patch_for(model, "everywhere")
    steered = doors.apply(model, patch)
    blocks._FOUND.clear()
    named = pytest.raises(IncompatibleAdapterError, match=r"ComfyFlux has no double_blocks.0.img_attn.norm.*in front")
    with one_block_for_all(model.model.diffusion_model), named:
        prediction(steered)
    assert_close(prediction(steered), prediction(by_slots(model, "everywhere")), **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_that_goes_past_its_norm_is_named(family: str) -> None:
    model = host()
    steered = doors.apply(model, patch_for(model, family))
    attention: Any = model.model.diffusion_model.double_blocks[1].img_attn
    attention.heads = lambda x: list(attention.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4))
    with pytest.raises(IncompatibleAdapterError, match=r"double 1 of Flux.*without double_blocks.1.img_attn.norm"):
        prediction(steered)
    assert hooks(model.model) == 0


def test_calls_in_threads_know_their_own_text() -> None:
    """A call with a longer text runs in another thread while one is between its double and its single blocks."""
    model = host()
    mask = torch.rand(1, 5, 3, generator=torch.Generator().manual_seed(1))
    steered = doors.apply(model, patch_for(model, "everywhere", mask=mask))
    longer = {"positive": [conditioning(noise(1, 9, 32, seed=5))]}
    told: list[Tensor] = []

    def elsewhere() -> None:
        told.append(Guider(steered, longer, ("positive",))(X)["positive"])

    def occupant(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        out = extra["original_block"](args)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return out

    interrupted = steered.clone()
    interrupted.set_model_patch_replace(occupant, "dit", "double_block", 1)
    assert torch.equal(prediction(interrupted), prediction(steered))
    assert torch.equal(told[0], Guider(steered, longer, ("positive",))(X)["positive"])


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("others", [False, True])
def test_the_model_reads_its_options_as_without_us(others: bool) -> None:
    """The host drops compiled code's guards on them: code made for our list there would miss it in the next call without."""
    model, seen = host(), list[Any]()

    def occupant(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append(
            {
                name: value
                for name, value in args["transformer_options"].items()
                if name in ("patches", "patches_replace")
            }
        )
        return extra["original_block"](args)

    model.set_model_patch_replace(occupant, "dit", "double_block", 0)
    if others:
        model.set_model_patch("another pack's", "attn1_patch")
    prediction(model)
    prediction(doors.apply(model, patch_for(model, "everywhere")))
    assert seen[0] == seen[1]
    assert ("patches" in seen[0]) == others


# --- what is kept --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kept"), [("everywhere", 0), ("behind", 1)])
def test_a_call_keeps_no_more_than_the_tokens_that_ask(family: str, kept: int) -> None:
    """The block's MLP needs the memory: keys, values and what was joined already are let go before it."""
    model, found = host(), list[tuple[int, int]]()
    block: Any = model.model.diffusion_model.double_blocks[0]

    def look(*_: object) -> None:
        run = blocks._RUNNING.run
        assert run is not None
        found.append((len(run.heard), len(run.sites)))

    block.img_mlp.register_forward_hook(look)
    prediction(doors.apply(model, patch_for(model, family)))
    assert found == [(0, kept)]
    assert blocks._RUNNING.run is None


def test_prompts_on_clones_are_frozen_and_let_go_of_the_device() -> None:
    model = host()
    patch = patch_for(model, "everywhere")
    (prompt,) = blocks.prompts_in(doors.apply(model, patch).model_options["transformer_options"])
    assert copy.deepcopy({"patches": [prompt]})["patches"][0] is prompt
    prediction(doors.apply(model, patch))
    released: list[Any] = []
    object.__setattr__(prompt, "patch", _Releasing(patch, released))
    assert prompt.to(torch.device("meta")) is prompt
    assert released == []
    assert prompt.to(torch.device("cpu")) is prompt
    assert released == list(range(len(patch.layout.sites)))


class _Releasing:
    def __init__(self, patch: AdapterPatch, released: list[Any]) -> None:
        self.layout, self._released = patch.layout, released

    def release(self, site: int, device: torch.device) -> None:
        self._released.append(site)


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query": "projected"}, "the query of a UNet's cross-attention, which Flux lacks"),
        ({"gated": True}, "a gate in every block, which Flux lacks"),
        ({"own_keys": True}, "the picture's own keys beside the image's, which Flux lacks"),
    ],
)
def test_a_reach_that_flux_lacks_is_refused(changes: Mapping[str, Any], said: str) -> None:
    model = host()
    patch = patch_for(model, "everywhere")
    other = replace(patch, reach=replace(patch.reach, **changes))
    assert isinstance(other.reach, Reach)
    with pytest.raises(IncompatibleAdapterError, match=said):
        doors.apply(model, other)


@pytest.mark.parametrize("weight", [1.0, 1e-9])
def test_a_raw_query_is_heard_where_the_norm_cannot_be_undone(weight: float) -> None:
    """The norm's weight goes with the normed query; where part of it is nearly 0 the query itself does."""
    model = host()
    block: Any = model.model.diffusion_model.double_blocks[0]
    block.img_attn.norm.query_norm.weight.data[1] = weight
    given: list[Any] = []

    class Listening:
        layout = doors.comfy_layout(model)
        reach = Reach(query="raw")

        def active(self, site: int) -> bool:
            return site == 0

        def add_to(self, base: Tensor, site: int, at: Any) -> Tensor:
            given.append(at)
            return base

        def release(self, site: int, device: torch.device) -> None: ...

    raw: list[Tensor] = []
    block.img_attn.norm.register_forward_hook(lambda m, args, out: raw.extend((args[0], out[0])))
    steered, patch = model.clone(), patch_for(model, "everywhere")
    steered.set_model_patch(blocks.BlockPrompt(Listening(), doors.DOORS[patch.layout.model.walk].of), blocks.PATCHES)  # type: ignore
    doors.install_notes(steered)
    prediction(steered)
    (at,) = given
    assert (at.query_norm is None) == (weight < 1e-6)
    heard = raw[0] if at.query_norm is None else raw[1]
    assert at.q.shape == (2, 15, WIDTH)
    assert torch.equal(at.q, heard.transpose(1, 2).flatten(2))


# --- compiled ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted() -> Iterator[Mapping[str, Any]]:
    """What torch.compile did, from a fresh start."""
    import torch._dynamo.config as config
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    config.skip_nnmodule_hook_guards = True  # as torch starts
    yield counters
    torch.compiler.reset()


def graphs(counters: Any) -> tuple[int, int]:
    """Graphs that were made since the last time, and breaks in them."""
    found = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    counters.clear()
    return found


def test_a_compiled_model_is_one_graph_for_whatever_acts_in_it(counted: Any) -> None:
    """Other images, strengths and masks need no other code; other sizes, texts and reference pictures do, and get it."""
    model = host()
    inner = model.model.diffusion_model
    patches = [patch_for(model, "everywhere"), patch_for(model, "everywhere", seed=1)]
    masked = patches[0].with_mask(torch.rand(10, 6, generator=torch.Generator().manual_seed(1)))
    inputs = {
        "usual": (X, TEXT, None),
        "small": (X[:1, :, :6], TEXT, None),
        "longer": (X, noise(1, 9, 32, seed=6), None),
        "reference": (X, TEXT, noise(1, 4, 4, 4, seed=5)),
    }

    def predictions(name: str) -> list[Tensor]:
        steered, outs = cases[name](model), list[Tensor]()
        for what, (x, text, inner.reference) in inputs.items():
            if what == "usual" or name == "one":
                outs.append(Guider(steered, {"positive": [conditioning(text)]}, ("positive",))(x)["positive"])
        return outs

    cases: dict[str, Callable[[FakePatcher], FakePatcher]] = {
        "plain": lambda model: model,
        "one": lambda model: doors.apply(model, patches[0]),
        "other": lambda model: doors.apply(model, patches[1]),
        "masked": lambda model: doors.apply(model, masked),
        "plain again": lambda model: model,
    }
    expected = {name: predictions(name) for name in cases}
    model.model.diffusion_model = torch.compile(inner, backend="aot_eager", dynamic=False)
    made: dict[str, tuple[int, int]] = {}
    for name in cases:
        for got, want in zip(predictions(name), expected[name], strict=True):
            assert_close(got, want, rtol=0, atol=2e-5)
        made[name] = graphs(counted)
    # the plain model's code was forgotten once, when the first prompt came
    assert not WHOLE_GRAPHS or made == {
        "plain": (1, 0),
        "one": (4, 0),
        "other": (0, 0),
        "masked": (0, 0),
        "plain again": (1, 0),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_compiled_one_by_one(family: str, counted: Any) -> None:
    """As other packs do it: the join behind a block is outside of its code."""
    model = host()
    steered, inner = doors.apply(model, patch_for(model, family)), model.model.diffusion_model
    expected, plain = prediction(steered), prediction(model)
    for blocks_of in (inner.double_blocks, inner.single_blocks):
        for i, block in enumerate(blocks_of):
            blocks_of[i] = torch.compile(block, backend="aot_eager")
    for want, of in ((plain, model), (expected, steered), (plain, model), (expected, steered)):
        assert_close(prediction(of), want, rtol=0, atol=2e-5)
    assert not WHOLE_GRAPHS or graphs(counted)[1] == 0


def test_code_made_for_one_call_does_not_serve_another_kind(counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the host has it, code is not checked for options, which blocks copy; what stood in them once must not be missed."""
    model = host()
    steered, inner = doors.apply(model, patch_for(model, "behind")), model.model.diffusion_model
    expected, plain = prediction(steered), prediction(model)
    kind: Any = type(inner.single_blocks[0])
    forward = kind.forward

    def copying(self: Any, x: Tensor, transformer_options: Any = None, **more: Any) -> Tensor:
        options, _ = transformer_options.copy(), self.linear1(x)
        torch._dynamo.graph_break()  # as in the host's attention; what was copied is made again behind it
        return forward(self, x, transformer_options=options, **more)

    monkeypatch.setattr(kind, "forward", copying)
    unchecked = {"guard_filter_fn": lambda guards: ["transformer_options" not in guard.name for guard in guards]}
    for i, block in enumerate(inner.single_blocks):  # the prompt acts in double blocks alone
        inner.single_blocks[i] = torch.compile(block, backend="aot_eager", options=unchecked)
    for want, of in ((expected, steered), (plain, model), (expected, steered)):
        assert_close(prediction(of), want, rtol=0, atol=2e-5)


def test_what_needs_more_than_the_query_breaks_the_graph_and_is_right(counted: Any) -> None:
    model = host()
    patch = patch_for(model, "everywhere")
    norms = [
        module.query_norm.weight for module in model.model.diffusion_model.modules() if hasattr(module, "query_norm")
    ]
    for weight in norms:
        weight.data.abs_().add_(0.5)
    raw = replace(patch, reach=replace(patch.reach, query="raw"))
    steered = doors.apply(model, raw)
    expected = prediction(steered)
    model.model.diffusion_model = torch.compile(model.model.diffusion_model, backend="aot_eager")
    for _ in range(2):
        assert_close(prediction(steered), expected, rtol=0, atol=2e-5)
    assert graphs(counted)[1] > 0


def test_a_compiled_model_called_past_the_host_is_told(counted: Any) -> None:
    with pytest.raises(IncompatibleAdapterError, match="past ComfyUI's apply_model"):
        blocks._add_now(X, X, 0, "attention", 0, 1, 0)
