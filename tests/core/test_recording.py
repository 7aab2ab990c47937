"""What is recorded of a sampling run: shares of the attention by token, reference, site and stage, beside the formula in float64.

``test_invariants`` asks the same of every kind of base model on both hosts.
"""

# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import ipadapter_core.attention.recording as recording_module
from benchmarks.attention_cost import Operations, cost_of
from ipadapter_core import (
    AdapterPatch,
    ImagePrompt,
    ModelCall,
    SiteCall,
    WeightSchedule,
    bake,
    layout_of,
    parse_site_factors,
)
from ipadapter_core.attention.batch import Frames
from ipadapter_core.attention.call import COND, UNCOND
from ipadapter_core.attention.recording import AttentionMaps, Recorder, spread
from ipadapter_core.backends.comfy import doors as comfy
from ipadapter_core.backends.comfy.recording import RUNS, Recording, record
from ipadapter_core.backends.diffusers import doors as diffusers
from ipadapter_core.device_cache import DeviceCache
from ipadapter_core.errors import IncompatibleAdapterError, InvalidInputError
from ipadapter_core.models.grids import TokenGrid
from tiny_flux import call_packed, comfy_flux, diffusers_flux
from tiny_models import (  # fmt: skip
    TOKEN_DIM,
    AtEverySite,
    BehindDoubleBlocks,
    Executor,
    FakePatcher,
    Guider,
    HostModel,
    call_unet,
    conditioning,
    noise,
    tiny_adapter,
    tiny_host,
    tiny_prompt,
    tiny_unet,
)

LATENT = (6, 10)
X = noise(2, 4, *LATENT, seed=3)
TEXT = noise(4, 7, TOKEN_DIM, seed=4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def several(*prompts: ImagePrompt) -> ImagePrompt:
    """References side by side, as an encoder makes them of a batch of pictures."""

    def beside(name: str) -> Tensor:
        return torch.cat([getattr(prompt, name) for prompt in prompts], 1)

    names = ("cond", "uncond", "features", "uncond_features")
    return replace(prompts[0], **{name: beside(name) for name in names})


def run(unet: Any, recorder: Recorder, *patches: AdapterPatch, percents: Sequence[float] = (0.5,)) -> AttentionMaps:
    with diffusers.apply(unet, *patches) as applied:
        applied.record(recorder)
        for percent in percents:
            call_unet(unet, X.repeat(2, 1, 1, 1).to(unet.dtype), TEXT.to(unet.dtype), (1 - percent) * 999.0)
    return recorder.maps()


# --- the formula in float64 -------------------------------------------------------------------------------------------


@contextmanager
def overheard(unet: Any, layout: Any) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Queries and attention outputs of every site in a call, before an image prompt is added."""
    count = len(layout.sites)
    queries, bases = [torch.empty(0)] * count, [torch.empty(0)] * count
    handles: list[Any] = []
    for i, site in enumerate(layout.sites):
        attention = unet.get_submodule(site.path)

        def ask(_: object, __: object, output: Tensor, i: int = i) -> None:
            queries[i] = output

        def join(_: object, args: tuple[Tensor, ...], i: int = i) -> None:
            bases[i] = args[0].clone()

        handles += [attention.to_q.register_forward_hook(ask)]
        handles += [attention.to_out[0].register_forward_pre_hook(join)]
    yield queries, bases
    for handle in handles:
        handle.remove()


Heard = tuple[int, Tensor, Tensor, Sequence[int]]
"""A place where images join: its site, queries ``b l c`` and base ``b l c`` of the positive prompt's picture, numbers of its prompts."""


def by_hand(heard: Sequence[Heard], patches: Sequence[AdapterPatch], counts: Sequence[int]) -> Tensor:
    """``references latents y x``: the docstring of ``recording``, one head and token at a time where it matters."""
    layout = patches[0].layout
    total = torch.zeros(sum(counts), len(X), *LATENT, dtype=torch.float64)
    for i, q, base, numbers in heard:
        cell = round(math.sqrt(LATENT[0] * LATENT[1] / q.shape[1]))
        rows, columns = -(-LATENT[0] // cell), -(-LATENT[1] // cell)
        assert rows * columns == q.shape[1]
        lengths: list[Tensor] = []
        parts: list[Tensor] = []
        for number in numbers:
            patch = patches[number]
            kv: Any = patch.sites[i]
            k, v = kv.k[COND, 0], kv.v[COND, 0]  # h n d
            heads = q.unflatten(-1, (layout.sites[i].heads, -1)).transpose(1, 2)  # b h l d
            chances = torch.softmax(torch.einsum("bhld,hnd->bhln", heads, k) / math.sqrt(k.shape[-1]), -1)
            image = torch.einsum("bhln,hnd->blhd", chances, v).flatten(2) * patch.weights[i].weight
            if patch.mask is not None:
                grid = torch.nn.functional.avg_pool2d(
                    torch.nn.functional.adaptive_avg_pool2d(patch.mask.values[:, None].double(), LATENT), cell, ceil_mode=True, count_include_pad=False
                )  # fmt: skip
                image = image * grid.reshape(1, -1, 1)
            lengths.append(image.square().sum(-1).sqrt())
            parts.append(chances.mean(1).unflatten(-1, (counts[number], -1)).sum(-1))  # b l r
        whole = base.square().sum(-1).sqrt() + sum(lengths)
        y, x = torch.meshgrid(torch.arange(LATENT[0]) // cell, torch.arange(LATENT[1]) // cell, indexing="ij")
        for number, length, part in zip(numbers, lengths, parts, strict=True):
            shares = ((length / whole)[..., None] * part)[:, y * columns + x].permute(3, 0, 1, 2)
            first = sum(counts[:number])
            total[first : first + counts[number]] += shares
    return total / len(layout.sites)


@pytest.mark.parametrize("masked", [False, True])
def test_the_maps_are_the_formula(masked: bool) -> None:
    unet = tiny_unet("small").double()
    layout = layout_of(unet)
    adapters = [tiny_adapter(layout, seed=seed) for seed in (0, 1)]
    for adapter in adapters:
        adapter.module.double()
    prompts = [
        several(*(tiny_prompt(adapters[0], seed=seed) for seed in (0, 1, 2))),
        several(*(tiny_prompt(adapters[1], seed=seed) for seed in (3, 4))),
    ]
    mask = torch.rand(24, 40, generator=torch.Generator().manual_seed(0)) if masked else None
    patches = [
        bake(adapter, prompt, layout, WeightSchedule(strength), mask if strength < 0 else None)
        for adapter, prompt, strength in zip(adapters, prompts, (0.7, -1.3), strict=True)
    ]
    with overheard(unet, layout) as (queries, bases):
        maps = run(unet, Recorder(1), *patches)
    heard = [(i, q[2:], base[2:], (0, 1)) for i, (q, base) in enumerate(zip(queries, bases, strict=True))]
    expected = by_hand(heard, patches, (3, 2))
    got = torch.stack([maps.map(r) for r in range(5)])
    assert [r.number for r in maps.references] == [1, 2, 3, 1, 2]
    assert [line.split(": mean ")[0] for line in maps.summary().split("\n\n")] == [str(r) for r in maps.references]
    assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-2, "the references ask nothing different"
    with pytest.raises(AssertionError):
        assert_close(got.double(), by_hand(heard, patches[::-1], (2, 3)), rtol=1e-5, atol=1e-6)


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("masked", [False, True])
def test_the_maps_of_flux_are_the_formula(masked: bool) -> None:
    """Double blocks before the projection and behind the block, where different prompts join, and single blocks behind the text."""
    model = diffusers_flux().double()
    layout = layout_of(model)
    mask = torch.rand(24, 40, generator=torch.Generator().manual_seed(0)) if masked else None
    forms, strengths, seeds = (
        (AtEverySite(), BehindDoubleBlocks(), AtEverySite()),
        (0.7, -1.3, 0.4),
        ((0, 1, 2), (3, 4), (5,)),
    )
    patches: list[AdapterPatch] = []
    for form, strength, numbers in zip(forms, strengths, seeds, strict=True):
        adapter = tiny_adapter(layout, channels=tuple(layout.sites[i].channels for i in form.reach.sites(layout)))
        adapter = replace(adapter, spec=replace(adapter.spec, format=form))
        adapter.module.double()
        prompt = several(*(tiny_prompt(adapter, seed=number) for number in numbers))
        patches.append(bake(adapter, prompt, layout, WeightSchedule(strength), mask if strength < 0.6 else None))
    x, text = noise(2, 4, *LATENT, seed=3).repeat(2, 1, 1, 1), noise(4, 7, TOKEN_DIM, seed=4)
    queries: dict[int, Tensor] = {}
    bases: dict[tuple[int, str], Tensor] = {}

    def note(kept: dict[Any, Tensor], key: object, picture: Callable[[Any], Tensor]) -> Callable[..., None]:
        return lambda module, args, output=None: kept.update({key: picture(args if output is None else output).clone()})  # type: ignore[arg-type]

    for i, site in enumerate(layout.sites):
        block, attention = (model.get_submodule(path) for path in (site.path.rpartition(".")[0], site.path))
        behind = 7 if site.group == "single" else 0
        attention.norm_q.register_forward_hook(note(queries, i, lambda out, n=behind: out.flatten(2)[2:, n:]))  # type: ignore[union-attr]
        if site.group == "double":
            attention.to_out[0].register_forward_pre_hook(note(bases, (i, "attention"), lambda args: args[0][2:]))  # type: ignore[index,union-attr]
            block.register_forward_hook(note(bases, (i, "residual"), lambda out: out[1][2:]))
        else:
            attention.register_forward_hook(note(bases, (i, "attention"), lambda out: out[2:, 7:]))
    recorder = Recorder(1)
    with diffusers.apply(model, *patches) as applied:
        applied.record(recorder)
        call_packed(model, x, torch.tensor(500.0), text)
    maps = recorder.maps()
    joined = {"attention": (0, 2), "residual": (1,)}
    expected = by_hand([(i, queries[i], base, joined[join]) for (i, join), base in bases.items()], patches, (3, 2, 1))
    got = torch.stack([maps.map(r) for r in range(6)])
    assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-3, "the references ask nothing different"


# --- invariants -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet() -> Any:
    return tiny_unet("small")


def patch_of(unet: Any, *seeds: int, mask: Tensor | None = None, **schedule: Any) -> AdapterPatch:
    layout = layout_of(unet)
    adapter = tiny_adapter(layout)
    prompt = several(*(tiny_prompt(adapter, seed=seed) for seed in seeds))
    return bake(adapter, prompt, layout, WeightSchedule(**schedule), mask)


def test_references_sum_to_what_one_prompt_of_them_takes(unet: Any) -> None:
    patch = patch_of(unet, 0, 1, 2)
    maps = run(unet, Recorder(1), patch)
    whole = run(
        unet,
        Recorder(1),
        replace(patch, sites=tuple(replace(kv, images=1, _prepared=DeviceCache()) for kv in patch.sites)),
    )  # type: ignore[arg-type,type-var]
    assert len(whole.references) == 1
    assert_close(sum(maps.map(r) for r in range(3)), whole.map(), rtol=0, atol=1e-6)
    assert_close(maps.by_site().sum(0), whole.by_site()[0], rtol=0, atol=1e-6)


def test_two_identical_references_share_equally(unet: Any) -> None:
    maps = run(unet, Recorder(1), patch_of(unet, 5, 5))
    assert_close(maps.map(0), maps.map(1), rtol=0, atol=1e-6)
    assert float(maps.map(0).min()) > 0


def test_more_references_than_a_head_is_wide(unet: Any) -> None:
    """Their parts of the attention come in the columns of a head, so several times."""
    seeds = list(range(9))
    width = layout_of(unet).sites[0].channels // layout_of(unet).sites[0].heads
    assert len(seeds) > width
    maps = run(unet, Recorder(1), patch_of(unet, *seeds))
    few = run(unet, Recorder(1), patch_of(unet, *seeds[::-1]))
    assert_close(torch.stack([maps.map(r) for r in range(9)]), torch.stack([few.map(8 - r) for r in range(9)]), rtol=0, atol=1e-5)  # fmt: skip


def test_a_rotated_mask_rotates_the_map(unet: Any) -> None:
    top = torch.zeros(LATENT)
    top[:2, :2] = 1
    for turned in (top, top.rot90(2)):
        share = run(unet, Recorder(1), patch_of(unet, 0, mask=turned)).map()
        assert torch.equal((share > 0).all(0), turned > 0)


def test_strength_zero_is_nothing(unet: Any) -> None:
    maps = run(unet, Recorder(2), patch_of(unet, 0, strength=0.0))
    assert maps.references == ()
    assert torch.equal(maps.map(), torch.zeros(1, *LATENT))
    assert maps.text() == maps.summary() == "no image prompt acted in this run"


def test_the_stronger_takes_more_and_a_tenth_acts_at_a_tenth_of_the_sites(unet: Any) -> None:
    weak, strong = (run(unet, Recorder(1), patch_of(unet, 0, strength=s)) for s in (0.2, 2.0))
    assert float(strong.map().min()) > float(weak.map().max())
    layout = layout_of(unet)
    label = layout.label(layout.sites[0])
    one = run(
        unet, Recorder(1), patch_of(unet, 0, site_factors=parse_site_factors(f"all: 0, {label.split('.')[0]}: 1"))
    )
    by_site = one.by_site()[0].mean(-1)
    assert float(by_site[0]) > 0
    assert torch.equal(by_site[1:], torch.zeros(len(by_site) - 1))
    assert_close(one.map().mean(), by_site.mean(), rtol=0, atol=1e-6)


def test_only_the_positive_prompt_counts(unet: Any) -> None:
    """Whatever else is in the batch, and in whatever order."""
    patch = patch_of(unet, 0)
    both = run(unet, Recorder(1), patch)
    recorder = Recorder(1)
    with diffusers.apply(unet, patch, branches=("cond",)) as applied:
        applied.record(recorder)
        call_unet(unet, X, TEXT[2:], 499.5)
    assert_close(both.map(), recorder.maps().map(), rtol=0, atol=1e-6)
    recorder = Recorder(1)
    with diffusers.apply(unet, patch, branches=("uncond",)) as applied:
        applied.record(recorder)
        call_unet(unet, X, TEXT[:2])
        with pytest.raises(InvalidInputError, match="was not called"):
            recorder.maps()


def test_each_latent_has_its_map(unet: Any) -> None:
    maps = run(unet, Recorder(1), patch_of(unet, 0))
    alone = Recorder(1)
    with diffusers.apply(unet, patch_of(unet, 0), branches=("cond",)) as applied:
        applied.record(alone)
        call_unet(unet, X[1:], TEXT[3:], 499.5)
    assert maps.latents == 2
    assert_close(maps.map()[1:], alone.maps().map(), rtol=0, atol=1e-6)


def test_stages_are_parts_of_the_progress(unet: Any) -> None:
    patch = patch_of(unet, 0, start_percent=0.4)
    maps = run(unet, Recorder(2), patch, percents=(0.0, 0.1, 0.3, 0.6, 1.0))
    assert [(stage.start, stage.end, stage.calls) for stage in maps.stages] == [(0.0, 0.5, 3.0), (0.5, 1.0, 2.0)]
    assert torch.equal(maps.map(stage=0), torch.zeros(2, *LATENT))
    assert float(maps.map(stage=1).min()) > 0
    assert_close(5 * maps.map(), 2 * maps.map(stage=1), rtol=0, atol=1e-6)
    assert_close(5 * maps.by_site(), 2 * maps.by_site(stage=1), rtol=0, atol=1e-6)


def test_references_are_in_the_order_of_their_prompts(unet: Any) -> None:
    """Not in that of the sites where they act first."""
    late = patch_of(unet, 0, 1, site_factors=parse_site_factors("all: 0, output: 1"))
    early = patch_of(unet, 2, site_factors=parse_site_factors("all: 0, input: 1"))
    maps = run(unet, Recorder(1), late, early)
    assert [str(one) for one in maps.references] == [
        f"{late.name} (1), reference 1",
        f"{late.name} (1), reference 2",
        f"{late.name} (2)",
    ]
    assert [[group for group in maps.groups if float(maps.map(r, group=group).max())] for r in range(3)] == [
        ["output"],
        ["output"],
        ["input"],
    ]
    assert [{maps.sites[i].group for i in row.mean(-1).nonzero().flatten()} for row in maps.by_site()] == [
        {"output"},
        {"output"},
        {"input"},
    ]


def test_groups_average_to_the_whole(unet: Any) -> None:
    maps = run(unet, Recorder(1), patch_of(unet, 0))
    assert len(maps.groups) == 3
    sizes = [sum(site.group == group for site in maps.sites) for group in maps.groups]
    whole = sum(size * maps.map(group=group) for size, group in zip(sizes, maps.groups, strict=True)) / sum(sizes)
    assert_close(whole, maps.map(), rtol=0, atol=1e-6)
    with pytest.raises(InvalidInputError, match="no group 'double'"):
        maps.map(group="double")


def test_another_size_is_another_run(unet: Any) -> None:
    patch, recorder = patch_of(unet, 0), Recorder(1)
    run(unet, recorder, patch)
    with diffusers.apply(unet, patch, branches=("cond",)) as applied:
        applied.record(recorder)
        call_unet(unet, noise(1, 4, 8, 8), TEXT[2:3])
    maps = recorder.maps()
    assert (maps.latent, maps.latents, maps.stages[0].calls) == ((8, 8), 1, 1.0)


def test_a_recorder_starts_over_and_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(InvalidInputError, match="1 to 20 stages, not 21"):
        Recorder(21)
    with pytest.raises(InvalidInputError, match="was not called"):
        Recorder().maps()


# --- in ComfyUI -------------------------------------------------------------------------------------------------------


def flux_host() -> Any:
    return FakePatcher(HostModel(comfy_flux()))


def host_run(patches: Sequence[AdapterPatch], *, areas: Sequence[Any] = (None,), recording: Recording | None = None, percent: float = 0.5, host: Callable[[], Any] = tiny_host, **how: Any) -> AttentionMaps:  # fmt: skip
    recording = recording or Recording(1)
    model = host()
    for patch in patches:
        model = comfy.apply(model, patch)
    model = record(model, recording)
    conds: Any = {
        "positive": [conditioning(TEXT[:1], area) for area in areas],
        "negative": [conditioning(TEXT[1:2])],
    }
    Guider(model, conds, **how)(X, percent)
    return recording.recorder.maps()


def host_patch(*seeds: int, host: Callable[[], Any] = tiny_host, **more: Any) -> AdapterPatch:
    layout = comfy.comfy_layout(host())
    adapter, mask = tiny_adapter(layout), more.pop("mask", None)
    if host is not tiny_host:
        adapter = replace(adapter, spec=replace(adapter.spec, format=AtEverySite()))
    prompt = several(*(tiny_prompt(adapter, seed=seed) for seed in seeds))
    return bake(adapter, prompt, layout, WeightSchedule(**more), mask)


@pytest.mark.parametrize("host", [tiny_host, flux_host])
def test_areas_are_recorded_where_they_lie(host: Callable[[], Any]) -> None:
    """Height, width, top, left: what an area sees is put there, and what two see is their mean."""
    left, right = (6, 6, 0, 0), (6, 6, 0, 4)
    mask = torch.zeros(LATENT)
    mask[:, 8:] = 1
    maps = host_run([host_patch(0, host=host, mask=mask)], host=host, areas=(left, right))
    assert torch.equal((maps.map() > 0).all(0), mask > 0)
    everywhere = host_run([host_patch(0, host=host)], host=host, areas=(left, right))
    assert float(everywhere.map().min()) > 0
    one = host_run([host_patch(0, host=host)], host=host, areas=(left,)).map()
    other = host_run([host_patch(0, host=host)], host=host, areas=(right,)).map()
    assert torch.equal(one > 0, (torch.arange(10) < 6).expand_as(one))
    together = everywhere.map()
    assert_close(together[..., :4], one[..., :4], rtol=0, atol=1e-6)
    assert_close(together[..., 6:], other[..., 6:], rtol=0, atol=1e-6)
    assert_close(together[..., 4:6], (one + other)[..., 4:6] / 2, rtol=0, atol=1e-6)


def test_a_step_in_several_calls_is_the_same() -> None:
    together, apart = (host_run([host_patch(0, 1)], chunks=chunks) for chunks in (8, 1))
    assert_close(together.map(0), apart.map(0), rtol=0, atol=1e-6)
    assert together.stages == apart.stages


def test_clones_record_into_the_same() -> None:
    """Also on hosts that deep-copy what is on a model."""
    for deep in (False, True):
        recording, model = Recording(1), tiny_host(deepcopy_options=deep)
        model = record(comfy.apply(model, host_patch(0)), recording).clone()
        Guider(model, {"positive": [conditioning(TEXT[:1])]}, ("positive",))(X)
        assert float(recording.recorder.maps().map().min()) > 0


def sampled(recording: Recording, model: Any, percents: Sequence[float], shift: float = 0.0) -> Tensor:
    """A sampler of the host's: its run goes through the wrappers of OUTER_SAMPLE."""

    def sample(*_: object) -> Tensor:
        for percent in percents:
            Guider(model, {"positive": [conditioning(TEXT[:1])]}, ("positive",))(X, percent)
        return X + shift

    return Executor(sample, None, model.wrappers["outer_sample"])()


def test_runs_are_apart_and_known_by_their_results() -> None:
    recording = Recording(2)
    with pytest.raises(InvalidInputError, match="nothing was recorded"):
        recording.of()
    model = record(comfy.apply(tiny_host(), host_patch(0)), recording)
    first = sampled(recording, model, (0.1, 0.2))
    second = sampled(recording, model, (0.7,), shift=1.0)
    assert [stage.calls for stage in recording.of().stages] == [0.0, 1.0]
    assert [stage.calls for stage in recording.of(first).stages] == [2.0, 0.0]
    assert recording.of(second.half()) is recording.of()
    with pytest.raises(InvalidInputError, match="none of the last 2 recorded runs made this latent"):
        recording.of(X - 1)
    for i in range(RUNS):
        sampled(recording, model, (0.5,), shift=float(2 + i))
    assert len(recording.runs) == RUNS
    with pytest.raises(InvalidInputError, match="none of the last"):
        recording.of(first)


def test_a_second_recorder_takes_the_place_of_the_first() -> None:
    first, second = Recording(1), Recording(1)
    model = record(record(comfy.apply(tiny_host(), host_patch(0)), first), second)
    sampled(second, model, (0.5,))
    assert (len(first.runs), len(second.runs)) == (0, 1)


def test_a_sampler_without_guiders_has_one_stage() -> None:
    recorder = Recorder(3)

    def unknown() -> float:
        raise IncompatibleAdapterError("unknown")

    recorder.begin(ModelCall((COND,), unknown, latent=LATENT))
    maps = recorder.maps()
    assert [stage.calls for stage in maps.stages] == [1.0, 0.0, 0.0]
    assert "tells no progress" in maps.text()


# --- animations, other token counts, limits ---------------------------------------------------------------------------


def site_call(patch: AdapterPatch, recorder: Recorder, latents: int, tokens: int = 60, **more: Any) -> None:
    """One attention of one model call."""
    call = recorder.begin(ModelCall((COND,), latent=more.pop("latent", LATENT), **more))
    site = patch.layout.sites[0]
    q = noise(latents, tokens, site.channels)
    patch.add_to(q, 0, SiteCall(call, q, site.heads))


def test_windows_of_an_animation_fill_their_frames() -> None:
    patch, recorder = host_patch(0), Recorder(1)
    site_call(patch, recorder, 3, frames=Frames((0, 1, 2), 5))
    site_call(patch, recorder, 3, frames=Frames((4, 0, 2), 5))
    maps = recorder.maps()
    assert maps.latents == 5
    seen = maps.map().flatten(1).mean(1) > 0
    assert seen.tolist() == [True, True, True, False, True]
    assert maps.stages[0].calls == pytest.approx(6 / 5)


def test_of_a_window_those_are_recorded_that_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they stand in it."""
    patch, recorder, alone = host_patch(0), Recorder(1), Recorder(1)
    site_call(patch, alone, 3)
    monkeypatch.setattr(recording_module, "MOST_OF_ONE", 3 * 4 * 60)
    site_call(patch, recorder, 3, frames=Frames((4, 0, 2), 5))
    got, each = recorder.maps().map(), alone.maps().map()
    assert_close(got, torch.stack([each[1], torch.zeros(LATENT), each[2]]), rtol=0, atol=1e-7)
    assert float((each[1] - each[2]).abs().max()) > 1e-3


def test_windows_are_looked_up_once() -> None:
    """Counted: numbers of a window that become a tensor on the device, which waits for them."""
    patch, recorder = host_patch(0, 1), Recorder(1)

    def numbers_copied(*numbers: int) -> tuple[int, int]:
        with Operations() as operations:
            site_call(patch, recorder, 3, frames=Frames(numbers, 5))
            recorder._run.close(threading.get_ident())
        return operations.seen["aten.lift_fresh"], operations.seen["aten.index_add_"]

    assert numbers_copied(4, 0, 2) == (1, 4), "once for a map and a mean of both references"
    assert numbers_copied(4, 0, 2) == (0, 4)
    assert numbers_copied(1, 4, 2) == (1, 4)
    assert numbers_copied(0, 1, 2) == (0, 0), "a window in a row needs none"


def test_merged_tokens_are_left_out_of_the_maps_and_said() -> None:
    patch, recorder = host_patch(0), Recorder(1)
    site_call(patch, recorder, 1, tokens=37)
    maps = recorder.maps()
    assert float(maps.map().max()) == 0
    assert float(maps.by_site().max()) > 0
    assert "37 tokens are no level of the latent" in maps.text()


def test_memory_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    patch, recorder = host_patch(0, 1), Recorder(1)
    monkeypatch.setattr(recording_module, "MOST_OF_ONE", 2 * 4 * 60)
    site_call(patch, recorder, 4)
    maps = recorder.maps()
    assert maps.latents == 2
    assert "the first 2 of 4 images" in maps.text()
    monkeypatch.setattr(recording_module, "BUDGET", 600)
    recorder.start()
    site_call(patch, recorder, 2)
    maps = recorder.maps()
    assert "not all is recorded" in maps.text()
    assert float(maps.map(0).max()) > 0
    assert float(maps.map(1).max()) == 0


def test_more_steps_keep_no_more() -> None:
    patch, recorder = host_patch(0, 1), Recorder(2)

    def kept() -> int:
        held = recorder._run
        return sum(t.numel() for t in (*held._maps.values(), *held._means.values()))

    site_call(patch, recorder, 2)
    site_call(patch, recorder, 2)
    first = kept()
    assert first > 0
    for _ in range(20):
        site_call(patch, recorder, 2)
    assert kept() == first


def test_tokens_cover_their_latents() -> None:
    tokens = torch.arange(6.0)[None]
    assert spread(tokens, TokenGrid(2, 3, 2), (3, 5)).tolist() == [
        [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]],
    ]
    odd = spread(tokens, TokenGrid(2, 3, 1), (4, 6))  # deep shrink: no level of the latent
    assert odd[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5]]
    frames = torch.cat([tokens, tokens + 2], 1)
    assert torch.equal(spread(frames, TokenGrid(2, 3, 2), (4, 6))[0, ::2, ::2], (tokens + 1).view(2, 3))


def test_threads_record_together() -> None:
    patch, recorder = host_patch(0), Recorder(1)
    alone = Recorder(1)
    site_call(patch, alone, 1)
    threads = [threading.Thread(target=lambda: [site_call(patch, recorder, 1) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    maps = recorder.maps()
    assert maps.stages[0].calls == 80
    assert_close(maps.map(), alone.maps().map(), rtol=0, atol=1e-5)


# --- what it costs who does not record --------------------------------------------------------------------------------


def functions_of(call: Callable[[], object]) -> list[str]:
    """Every Python function of ours that runs in a call, in order."""
    seen: list[str] = []

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call" and "ipadapter_core" in frame.f_code.co_filename:
            seen.append(f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return seen


def test_who_does_not_record_pays_nothing() -> None:
    """Counted: the functions of ours that an attention with an image prompt runs, and its operations; the same after a recorded run."""
    patch = host_patch(0, 1)
    site = patch.layout.sites[0]
    q = noise(2, 60, site.channels)

    def attention(call: ModelCall) -> Callable[[], object]:
        return lambda: patch.add_to(q, 0, SiteCall(call, q, site.heads))

    call = ModelCall((UNCOND, COND), latent=LATENT)
    attention(call)()  # what is kept of a kind of call
    functions, cost = functions_of(attention(call)), cost_of(attention(call))
    assert functions == ["patch.py:add_to", "call.py:rows", "maths.py:query_rows", "adding.py:add"]
    recorder = Recorder(1)
    recorded = attention(recorder.begin(call))
    assert "recording.py:telling" in functions_of(recorded)
    recorded_cost = cost_of(recorded)
    assert recorded_cost.operations > 2 * cost.operations
    assert recorded_cost.synchronisations == 0
    assert recorder.maps().references
    assert functions_of(attention(call)) == functions, "what is ready for calls that nobody hears was changed"
    assert cost_of(attention(call)) == cost


def test_a_recorded_run_waits_for_nothing() -> None:
    """Counted: operations after which the host waits for the device; with stages, sigma is read once a step."""
    model = comfy.apply(comfy.apply(tiny_host(), host_patch(0, 1)), host_patch(2, mask=torch.ones(8, 8)))
    conds: Any = {name: [conditioning(TEXT[i : i + 1])] for i, name in enumerate(("positive", "negative"))}
    Guider(model, conds)(X)
    plain = cost_of(lambda: Guider(model, conds)(X)).synchronisations
    for stages, expected in ((1, 0), (3, 1)):
        recorded = record(model, Recording(stages))
        Guider(recorded, conds)(X)
        assert cost_of(lambda recorded=recorded: Guider(recorded, conds)(X)).synchronisations - plain == expected
