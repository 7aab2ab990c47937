"""torch.compile around and inside: the pictures of the model that is not compiled, whatever changes between calls."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from ipadapter_core import WeightSchedule, Window, bake, layout_of
from ipadapter_core.attention.maths import split_heads
from ipadapter_core.attention.patch import AdapterPatch
from ipadapter_core.attention.recording import AttentionMaps, Recorder
from ipadapter_core.backends.comfy import compiled as comfy_compiled
from ipadapter_core.backends.comfy import doors as comfy
from ipadapter_core.backends.comfy import lora as comfy_lora
from ipadapter_core.backends.comfy.notes import note_call
from ipadapter_core.backends.comfy.recording import Recording, record
from ipadapter_core.backends.diffusers import doors as images
from ipadapter_core.backends.diffusers import lora as loras
from ipadapter_core.lora.patch import LoRAPatch, masked
from tiny_flux import call_packed, diffusers_flux
from tiny_loras import tiny_lora
from tiny_models import (
    TOKEN_DIM,
    AtEverySite,
    BehindDoubleBlocks,
    Guider,
    TimedWithOwnKeys,
    conditioning,
    noise,
    tiny_adapter,
    tiny_host,
    tiny_prompt,
    tiny_unet,
)
from tiny_sd3 import call_sd3, diffusers_sd3
from torch_versions import GUARD_FILTERS, WHOLE_GRAPHS

CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 2e-5}  # aot_eager decomposes operations; outputs of size 1


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    import torch._dynamo.config as config

    torch.set_num_threads(1)
    torch.compiler.reset()
    config.skip_nnmodule_hook_guards = True  # as torch starts
    yield
    torch.compiler.reset()


class Attention(nn.Module):
    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, channels) for n in (channels, context, context))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (split_heads(t, 2) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out[1](self.to_out[0](out.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(channels, channels), Attention(channels, TOKEN_DIM)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        return x + self.attn2(x, text)


class Part(nn.Module):
    def __init__(self, channels: int, depth: int = 1) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([nn.Identity()])
        self.attentions = nn.ModuleList([nn.Module()])
        self.attentions[0].transformer_blocks = nn.ModuleList(Block(channels) for _ in range(depth))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.attentions[0].transformer_blocks:
            x = block(x, text)
        return x


class SmallUNet(nn.Module):
    """Named and called like a diffusers UNet, and little besides attention: traced twenty times faster."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.conv_out = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.down_blocks = nn.ModuleList([Part(8, 2)])
        self.mid_block = Part(8)
        self.up_blocks = nn.ModuleList()
        self.eval().requires_grad_(False)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        tokens = self.conv_in(sample).flatten(2).transpose(1, 2) + timestep / 1000
        tokens = self.mid_block(self.down_blocks[0](tokens, text), text)
        return self.conv_out(tokens.transpose(1, 2).unflatten(2, sample.shape[-2:]))


WAYS = ["wrapped", "in place", "blocks", "a function around"]


def compiled(unet: Any, way: str) -> Any:
    """What to call; the UNet itself is what adapters are applied on. Blocks are what compile_repeated_blocks compiles."""
    if way == "wrapped":
        return torch.compile(unet, backend="eager")
    if way == "in place":
        unet.compile(backend="eager")
    elif way == "blocks":
        for block in (m for m in unet.modules() if isinstance(m, Block)):
            block.compile(backend="eager")
    else:
        return torch.compile(lambda *args: unet(*args), backend="eager")
    return unet


def call(model: Any, t: float = 500.0, batch: int = 2, size: int = 8) -> Tensor:
    x, text = noise(batch, 4, size, size, seed=3), noise(batch, 7, TOKEN_DIM, seed=4)
    with torch.no_grad():
        found = model(x, torch.tensor(t), text)
    return found if isinstance(found, Tensor) else found.sample


def image_on(unet: nn.Module, *, seed: int = 0, mask: Tensor | None = None, **schedule: Any) -> AdapterPatch:
    layout = layout_of(unet)
    adapter = tiny_adapter(layout, seed=seed)
    return bake(adapter, tiny_prompt(adapter, seed=seed), layout, WeightSchedule(**schedule), mask)


def lora_on(unet: nn.Module, *, seed: int = 0, algorithm: str = "LoRA", **settings: Any) -> LoRAPatch:
    return replace(loras.place(unet, tiny_lora(unet, "attn1: 1, attn2: 1", algorithm, seed=seed)), **settings)


@pytest.fixture
def unet() -> Any:
    return SmallUNet()


@pytest.mark.parametrize("way", WAYS)
def test_an_image_prompt_before_and_after_compiling(unet: Any, way: str) -> None:
    """Off, on, weaker, a curve, a mask, another size and batch, another prompt, none: each as without compiling."""
    plain = copy.deepcopy(unet)
    first, second = image_on(unet), image_on(unet, seed=1, strength=0.6)
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    model = compiled(unet, way)

    def same(**how: Any) -> Tensor:
        expected = call(plain, **how)
        assert_close(call(model, **how), expected, **CLOSE)
        return expected

    without = same()
    with images.apply(unet, first) as ours, images.apply(plain, first) as theirs:
        steered = same()
        assert (steered - without).abs().max() > 0.01
        for strength in (0.0, 1.0):
            for handle in (ours, theirs):
                handle.set_schedule(WeightSchedule(strength))
            same()
        same(batch=4)
        if way == "wrapped":  # a graph break at every site, which takes seconds to trace
            for handle in (ours, theirs):
                handle.set_schedule(WeightSchedule(curve=((0.0, 1.0), (1.0, 0.0)), end_percent=0.9))
            for t in (999.0, 10.0):
                same(t=t)
        for handle in (ours, theirs):
            handle.set_mask(mask)
        same()
        with images.apply(unet, second), images.apply(plain, second):
            same()
    assert torch.equal(same(), without)


@pytest.mark.parametrize(("way", "algorithm"), [*((way, "LoRA") for way in WAYS), ("wrapped", "DoRA out")])
def test_a_live_lora_before_and_after_compiling(unet: Any, way: str, algorithm: str) -> None:
    plain = copy.deepcopy(unet)
    patch, scheduled = (
        lora_on(unet, algorithm=algorithm),
        lora_on(unet, seed=1, window=Window(curve=((0.0, 1.0), (1.0, 0.0)))),
    )
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    regional = masked(lora_on(unet, seed=2), mask)
    early = [loras.apply(m, scheduled, regional, branches=("uncond", "cond")) for m in (unet, plain)]
    model = compiled(unet, way)

    def same(**how: Any) -> Tensor:
        expected = call(plain, **how)
        assert_close(call(model, **how), expected, **CLOSE)
        return expected

    before = same()
    same(t=900.0)
    with ExitStack() as stack:
        late = [stack.enter_context(loras.apply(m, patch)) for m in (unet, plain)]
        on = same()
        assert (on - before).abs().max() > 0.01
        for strength in (0.0, 1.0):
            for handle in late:
                handle.set_strength(strength)
            same()
    assert torch.equal(same(), before)
    for handle in early:
        handle.remove()
    assert (same() - before).abs().max() > 1e-3


def test_the_wrapped_model_takes_adapters_as_the_model_inside(unet: Any) -> None:
    """``pipe.unet = torch.compile(pipe.unet)``: image prompts, live and merged LoRAs on what the pipeline holds."""
    plain = copy.deepcopy(unet)
    without = call(plain)
    model = torch.compile(unet, backend="eager")
    image, lora = image_on(unet), lora_on(unet)
    assert layout_of(unet) == image.layout
    for apply, patch in ((images.apply, image), (loras.apply, lora), (loras.merge, lora)):
        with apply(plain, patch):  # type: ignore[operator]
            expected = call(plain)
        with apply(model, patch):  # type: ignore[operator]
            assert_close(call(model), expected, **CLOSE)
        assert torch.equal(call(model), without)
    assert loras.place(type("Pipeline", (), {"unet": model})(), tiny_lora(unet, "attn1")).matched.matches


def test_another_dtype_between_calls(unet: Any) -> None:
    dtype = torch.bfloat16
    plain = copy.deepcopy(unet)
    model = torch.compile(unet, backend="eager")
    image, lora = image_on(unet), lora_on(unet)

    def run(model: Any, dtype: torch.dtype) -> Tensor:
        x, text = noise(2, 4, 8, 8).to(dtype), noise(2, 7, TOKEN_DIM).to(dtype)
        with torch.no_grad():
            return model(x, torch.tensor(500.0, dtype=dtype), text)

    with ExitStack() as stack:
        for m in (unet, plain):
            stack.enter_context(images.apply(m, image))
            stack.enter_context(loras.apply(m, lora))
        for now in (torch.float32, dtype, torch.float32):
            for m in (unet, plain):
                m.to(now)
            out = run(model, now)
            assert out.dtype == now
            assert_close(out, run(plain, now), **CLOSE)


def test_a_lora_on_one_of_the_blocks_that_share_code(unet: Any) -> None:
    """Compiled code of one block serves the next of its class, unless hooks are looked at."""
    plain = copy.deepcopy(unet)
    model = compiled(unet, "blocks")
    assert_close(call(model), call(plain), **CLOSE)
    for where in ("mid attn1", "*.transformer_blocks.1.*"):
        only = replace(loras.place(plain, tiny_lora(plain, where)), strength=2.0)
        with loras.apply(unet, only), loras.apply(plain, only):
            assert_close(call(model), call(plain), **CLOSE)


def test_a_diffusers_unet() -> None:
    unet = tiny_unet("one site")
    plain = copy.deepcopy(unet)
    model = torch.compile(unet, backend="aot_eager")
    without = call(model)
    image = image_on(unet)
    with images.apply(unet, image) as ours, images.apply(plain, image) as theirs:
        for strength in (0.0, 1.0):
            for handle in (ours, theirs):
                handle.set_schedule(WeightSchedule(strength))
            assert_close(call(model), call(plain), **CLOSE)
    assert torch.equal(call(model), without)


@pytest.mark.parametrize("way", ["wrapped", "blocks"])
def test_a_recorded_run_of_a_compiled_model(unet: Any, way: str) -> None:
    """Maps and pictures of the model that is not compiled. Recording breaks no graph and is one more code for all calls; without it nothing is
    made anew, and the picture is the same to the bit."""
    from torch._dynamo.utils import counters

    counters.clear()
    plain = copy.deepcopy(unet)
    mask = torch.zeros(8, 8)
    mask[:, :5] = 1
    patches = image_on(unet, mask=mask), image_on(unet, seed=1, strength=0.6)
    model = compiled(unet, way)

    def recorded(model: Any, handle: Any) -> tuple[AttentionMaps, list[Tensor]]:
        recorder = Recorder(2)
        handle.record(recorder)
        out = [call(model, t) for t in (900.0, 600.0, 300.0)]
        handle.record(None)
        return recorder.maps(), out

    with images.apply(plain, *patches) as handle:
        expected, pictures = recorded(plain, handle)
    with images.apply(unet, *patches) as handle:
        before = call(model, 300.0)
        broken, made = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        for _ in range(2):
            maps, out = recorded(model, handle)
            for got, want in zip(out, pictures, strict=True):
                assert_close(got, want, **CLOSE)
            for r in range(2):
                for stage in (0, 1):
                    assert_close(maps.map(r, stage), expected.map(r, stage), rtol=0, atol=1e-6)
            assert_close(maps.by_site(), expected.by_site(), rtol=0, atol=1e-6)
            assert torch.equal(call(model, 300.0), before)
        assert float((maps.map(0) - maps.map(1)).abs().max()) > 0.01, "nothing tells the two apart"
        if WHOLE_GRAPHS:
            assert sum(counters["graph_break"].values()) == broken
            assert counters["stats"]["unique_graphs"] == 2 * made
        if way == "blocks":  # gradients pass through a call that is recorded
            recorder, x = Recorder(1), noise(2, 4, 8, 8, seed=3).requires_grad_()
            handle.record(recorder)
            model(x, torch.tensor(300.0), noise(2, 7, TOKEN_DIM, seed=4)).square().mean().backward()
            assert x.grad is not None
            assert len(recorder.maps().references) == 2


def test_a_recorded_run_of_a_compiled_copy(unet: Any) -> None:
    """A copy of a steered model records its own calls, also while the first model is gone on with."""
    with images.apply(unet, image_on(unet)) as handle:
        other, copied = copy.deepcopy((unet, handle))
        maps: list[Tensor] = []
        for model in (other, compiled(other, "wrapped")):
            recorder = Recorder(1)
            copied.record(recorder)
            call(model, 300.0)
            call(unet, 900.0)
            maps.append(recorder.maps().map())
    assert_close(maps[1], maps[0], rtol=0, atol=1e-6)
    assert float(maps[0].min()) > 0


def test_gradients_through_a_compiled_checkpointed_model(unet: Any) -> None:
    """Two forwards, one backward, each at its own progress."""
    curve = WeightSchedule(curve=((0.0, 1.0), (1.0, 0.1)))
    image = image_on(unet).with_schedule(curve)
    lora = lora_on(unet, window=curve.window)

    def gradients(model: Any) -> list[Tensor]:
        inputs = [noise(2, 4, 8, 8, seed=i).requires_grad_() for i in (0, 1)]
        text = noise(2, 7, TOKEN_DIM)
        losses = [model(x, torch.tensor(t), text).square().mean() for x, t in zip(inputs, (900.0, 50.0), strict=True)]
        (losses[0] + losses[1]).backward()
        return [x.grad for x in inputs if x.grad is not None]

    def checkpointed(model: nn.Module) -> Any:
        def run(block: Any, x: Tensor, text: Tensor) -> Tensor:
            return checkpoint(type(block).__call__, block, x, text, use_reentrant=False)  # type: ignore[return-value]

        for part in (m for m in model.modules() if isinstance(m, Part)):
            blocks = part.attentions[0].transformer_blocks

            def forward(x: Tensor, text: Tensor, blocks: Any = blocks) -> Tensor:
                for block in blocks:
                    x = run(block, x, text)
                return x

            part.forward = forward  # type: ignore[method-assign]
        return model

    with images.apply(unet, image), loras.apply(unet, lora):
        expected = gradients(unet)
        assert (expected[0] - expected[1]).abs().max() > 1e-5
        for way in ("wrapped", "blocks"):
            for want, got in zip(expected, gradients(compiled(checkpointed(unet), way)), strict=True):
                assert_close(got, want, rtol=1e-3, atol=1e-8)


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


def compiled_host(host: Any, models: Sequence[Any]) -> Counter[str]:
    """Let models of a host run compiled code, as its own node does it; what was made and what runs is counted."""
    counted: Counter[str] = Counter()

    def backend(graph: Any, inputs: Any) -> Any:
        counted["made"] += 1

        def run(*args: Any) -> Any:
            counted["run"] += 1
            return graph.forward(*args)

        return run

    module = host.model.diffusion_model
    skip = {"guard_filter_fn": lambda guards: ["transformer_options" not in guard.name for guard in guards]}
    code = torch.compile(module, backend=backend, options=skip if GUARD_FILTERS else None)

    def through_compiled(executor: Any, *args: Any) -> Any:
        host.model.diffusion_model = code
        try:
            return executor(*args)
        finally:
            host.model.diffusion_model = module

    for model in models:
        model.add_wrapper_with_key("apply_model", "torch.compile", through_compiled)
    return counted


def test_image_prompts_break_no_graph_of_a_compiled_comfyui_model() -> None:
    """One graph per model call, made once: neither steps, strengths, prompts nor regions are part of it. Other sites are,
    and so is another node's hook below ours, which is left to break the graph as it does by itself."""
    host = tiny_host()
    layout = comfy.comfy_layout(host)
    adapter = tiny_adapter(layout)
    patch = bake(adapter, tiny_prompt(adapter), layout, WeightSchedule(0.7, end_percent=0.5))
    other = bake(adapter, tiny_prompt(adapter, seed=3), layout, WeightSchedule(1.3), noise(64, 64))
    theirs = host.clone()
    text = comfy.torch_attention
    theirs.set_model_attn2_replace(lambda q, k, v, extra: 0.5 * text(q, k, v, extra["n_heads"]), "middle", 0)
    models: list[Any] = [
        comfy.apply(host, patch),
        comfy.apply(comfy.apply(host, patch), other),
        comfy.apply(theirs, patch),
    ]
    conds: Any = {
        name: [conditioning(noise(1, 7, TOKEN_DIM, seed=i))] for i, name in enumerate(("positive", "negative"))
    }
    x = noise(1, 4, 8, 8)
    calls = [(0, 0.2), (0, 0.8), (1, 0.2), (1, 0.8), (0, 0.2), (2, 0.2), (2, 0.8), (0, 0.8)]
    with torch.no_grad():
        expected = [Guider(models[i], conds)(x, percent) for i, percent in calls]
        counted = compiled_host(host, models)
        made: list[int] = []
        for (i, percent), want in zip(calls, expected, strict=True):
            before = counted["run"]
            for name, out in Guider(models[i], conds)(x, percent).items():
                assert_close(out, want[name], rtol=0, atol=1e-4)
            made.append(counted["made"])
            if i < 2 and WHOLE_GRAPHS:
                assert counted["run"] - before == 1, "a graph broke"
        if WHOLE_GRAPHS:
            assert made[:5] == [1] * 5, "code was made anew"
            assert made[5] > 1, "another node's hook is part of the code, and shares none"
            assert made[5:] == made[5:6] * 3, "code was made anew"


def test_a_recorded_run_of_a_compiled_comfyui_model() -> None:
    """The same code with and without a recorder, and the maps of the model that is not compiled."""
    host = tiny_host()
    layout = comfy.comfy_layout(host)
    adapter = tiny_adapter(layout)
    steered = comfy.apply(host, bake(adapter, tiny_prompt(adapter), layout, WeightSchedule(0.7)))
    recordings = [Recording(2), Recording(2)]
    models = [record(steered, recording) for recording in recordings]
    conds: Any = {
        name: [conditioning(noise(1, 7, TOKEN_DIM, seed=i))] for i, name in enumerate(("positive", "negative"))
    }
    x = noise(1, 4, 8, 8)
    with torch.no_grad():
        for percent in (0.2, 0.8):
            Guider(models[0], conds)(x, percent)
        counted = compiled_host(host, [steered, models[1]])
        before = Guider(steered, conds)(x, 0.2)
        made = counted["made"]
        for percent in (0.2, 0.8):
            run = counted["run"]
            got = Guider(models[1], conds)(x, percent)
            assert not WHOLE_GRAPHS or counted["run"] == run + 1, "a graph broke"
            if percent == 0.2:
                assert all(torch.equal(got[name], before[name]) for name in before)
        assert not WHOLE_GRAPHS or counted["made"] == made, "code was made anew"
        assert all(torch.equal(one, before[name]) for name, one in Guider(steered, conds)(x, 0.2).items())
    want, have = (recording.recorder.maps() for recording in recordings)
    for stage in (0, 1):
        assert_close(have.map(stage=stage), want.map(stage=stage), rtol=0, atol=1e-5)
    assert float(want.map().min()) > 0.01


def test_clones_of_a_compiled_comfyui_model() -> None:
    """The host compiles the module that all clones share and drops the guards on transformer_options, where prompts are."""
    host = tiny_host()
    layout = comfy.comfy_layout(host)
    adapter = tiny_adapter(layout)
    patch = bake(adapter, tiny_prompt(adapter), layout)
    last = patch.with_schedule(WeightSchedule(preset="style transfer"))
    weights = tiny_lora(host.get_model_object("diffusion_model"), "attn1: 1")
    lora = LoRAPatch(comfy_lora.place(weights, host), window=Window(end_percent=0.5))
    models: list[tuple[Any, float]] = [(host, 0.2), (comfy.apply(host, patch), 0.2), (comfy.apply(host, last), 0.2)]
    models += [(comfy_lora.apply_unfused(host, lora), percent) for percent in (0.2, 0.8)]
    conds: Any = {
        name: [conditioning(noise(1, 7, TOKEN_DIM, seed=i))] for i, name in enumerate(("positive", "negative"))
    }
    x = noise(1, 4, 8, 8)
    expected = [Guider(model, conds)(x, percent) for model, percent in models]
    compiled_host(host, [model for model, _ in models])
    for i in (1, 0, 2, 3, 4, 0, 1):
        model, percent = models[i]
        for name, out in Guider(model, conds)(x, percent).items():
            assert_close(out, expected[i][name], rtol=0, atol=1e-4, msg=f"model {i}: {{}}".format)
    assert not any(m._forward_hooks for m in host.model.diffusion_model.modules())


def test_a_hook_is_found_in_any_slot_of_the_host() -> None:
    """A transformer's hooks sit in other slots than a UNet's, or in the host's lists of patches."""

    class Hook:
        kind = "image prompts"

        def __init__(self, index: int) -> None:
            self.index = index

        def at_site(self, call: object, base: Tensor, q: Tensor, heads: int, shape: tuple[int, int]) -> Tensor:
            return base + self.index

    class Executor:
        class_obj = None

        def __call__(self, *args: object, **kwargs: object) -> object:
            return [comfy_compiled._add(torch.zeros(1), torch.zeros(1), site, 1, 0, 0).item() for site in (1, 2, 3)]

    options = {
        "patches_replace": {"attn2": {("input", 1): Hook(1)}, "dit": {("block", 0): Hook(2), ("block", 1): len}},
        "patches": {"double_block": [len, Hook(3)]},
    }
    assert note_call(Executor(), torch.zeros(1, 4, 8, 8), transformer_options=options) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("kind", "way"), [("Flux", "wrapped"), ("Flux", "blocks"), ("SD3", "blocks")])
def test_a_transformer_of_diffusers(kind: str, way: str) -> None:
    """Behind the block, before the output projection of both kinds of blocks, and joined with own keys at every timestep."""
    if kind == "SD3":
        model, form = diffusers_sd3(num_layers=1), TimedWithOwnKeys()
    else:
        form = BehindDoubleBlocks() if way == "wrapped" else AtEverySite()
        model = diffusers_flux(num_layers=1, num_single_layers=1)
    plain = copy.deepcopy(model)
    if way == "wrapped":
        run: Any = torch.compile(model, backend="eager")
    else:
        run = model
        for block in (*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())):
            block.compile(backend="eager")

    def same(weigh: float | None = None) -> Tensor:
        for handle in handles if weigh is not None else ():
            handle.set_schedule(WeightSchedule(weigh))
        x, text = noise(2, 4, 6, 10, seed=3), noise(2, 7, TOKEN_DIM, seed=4)
        with torch.no_grad():
            calls = call_sd3 if kind == "SD3" else call_packed
            expected, got = (calls(m, x, torch.tensor(500.0), text) for m in (plain, run))
        assert_close(got, expected, **CLOSE)
        return expected

    layout = layout_of(plain)
    adapter = tiny_adapter(layout, channels=tuple(layout.sites[i].channels for i in form.reach.sites(layout)))
    adapter = replace(adapter, spec=replace(adapter.spec, format=form))
    patch = bake(adapter, tiny_prompt(adapter), layout)
    without = same()
    with images.apply(run, patch) as ours, images.apply(plain, patch) as theirs:
        handles = ours, theirs
        assert (same() - without).abs().max() > 0.01
        assert torch.equal(same(0.0), without)
        if way == "wrapped":
            same(0.5)
    assert torch.equal(same(), without)
