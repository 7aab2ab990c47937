"""What holds for every kind of base model on every host, and for a fake one that the package has never heard of."""

# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import fake_model
import ipadapter_core
from fake_model import CHANNELS, FAKE, HEADS, TAIL, TEXT, FakeDoor, FakeEntry, FakeTransformer, walk_fake
from ipadapter_core import AdapterPatch, AdapterWeights, ModelLayout, WeightSchedule, bake, models
from ipadapter_core.attention.recording import Recorder
from ipadapter_core.attention.schedule import SCALINGS
from ipadapter_core.backends.comfy import doors as comfy
from ipadapter_core.backends.comfy.recording import Recording, record
from ipadapter_core.backends.diffusers import doors as diffusers
from ipadapter_core.checkpoints import format_named
from ipadapter_core.checkpoints.format import Format
from ipadapter_core.errors import AdapterError, IncompatibleAdapterError, InvalidInputError
from ipadapter_core.training.frozen import FrozenBase
from tiny_models import (
    TINY,
    TOKEN_DIM,
    FakePatcher,
    Guider,
    HostModel,
    Tiny,
    conditioning,
    noise,
    tiny_adapter,
    tiny_prompt,
)

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}  # fp32, outputs of size 1
X = noise(2, 4, 10, 16, seed=3)
TEXTS = {name: noise(1, TEXT, TOKEN_DIM, seed=10 + i) for i, name in enumerate(("positive", "negative"))}
Outputs = Mapping[str, Tensor]


class World:
    """One base model on one host: image prompts applied for one call, and the call's outputs by conditioning."""

    def __init__(
        self,
        model: Any,
        layout: ModelLayout,
        form: Format | None = None,
        family: str = "base",
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.model, self.layout, self.form, self.family, self.sizes = model, layout, form, family, sizes or {}
        self.made = 0
        """Calls of the adapter's layers."""
        self.recorder: Recorder | None = None
        """Who hears the calls of ``run``."""

    def adapter(self, seed: int = 0) -> AdapterWeights:
        reached = () if self.form is None else self.form.reach.sites(self.layout)
        own = {} if self.form is None else {"channels": tuple(self.layout.sites[i].channels for i in reached)}
        adapter = tiny_adapter(self.layout, self.family, seed=seed, **own, **self.sizes)
        if self.form is not None:
            adapter = replace(adapter, spec=replace(adapter.spec, format=self.form))
        for layer in adapter.module.to_k_ip:
            layer.register_forward_hook(self._count)
        return adapter

    def _count(self, *_: object) -> None:
        self.made += 1

    def patch(self, *, seed: int = 0, mask: Tensor | None = None, latents: int = 1, **schedule: Any) -> AdapterPatch:
        adapter = self.adapter(seed)
        prompt = tiny_prompt(adapter, seed=seed, latents=latents, tokens=8)
        return bake(adapter, prompt, self.layout, WeightSchedule(**schedule), mask)

    def run(
        self,
        *patches: AdapterPatch,
        x: Tensor = X,
        percent: float = 0.5,
        order: Sequence[str] = ("negative", "positive"),
    ) -> Outputs:
        raise NotImplementedError

    def traces(self) -> object:
        """All that could remember an image prompt."""
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in self.module.modules()]
        return hooks, repr(self.module)

    @property
    def module(self) -> nn.Module:
        return self.model


class ComfyWorld(World):
    def run(self, *patches: AdapterPatch, x: Tensor = X, percent: float = 0.5, order: Sequence[str] = ("negative", "positive"), **how: Any) -> Outputs:  # fmt: skip
        model = self.model
        for patch in patches:
            model = comfy.apply(model, patch)
        assert comfy.applied_patches(model) == tuple(
            patch for patch in patches if any(map(patch.active, range(len(patch.sites))))
        )
        if self.recorder is not None:
            recording = Recording(self.recorder.stages)
            recording.recorder = self.recorder
            model = record(model, recording)
        return Guider(model, {name: [conditioning(TEXTS[name])] for name in order}, order, **how)(x, percent)

    def traces(self) -> object:
        return super().traces(), self.model.wrappers, self.model.model_options

    @property
    def module(self) -> nn.Module:
        return self.model.model


class DiffusersWorld(World):
    def run(self, *patches: AdapterPatch, x: Tensor = X, percent: float = 0.5, order: Sequence[str] = ("negative", "positive")) -> Outputs:  # fmt: skip
        names: dict[str, Any] = {"negative": "uncond", "positive": "cond"}
        text = torch.cat([TEXTS[name].expand(len(x), -1, -1) for name in order])
        timestep = torch.tensor((1 - percent) * (999.0 if self.layout.model.clock == "steps" else 1000.0))

        tiny = TINY[self.layout.model.walk]

        def call() -> Outputs:
            with torch.no_grad():
                given = x.repeat(len(order), 1, 1, 1), timestep, text
                out = self.model(*given) if tiny.call is None else tiny.call(self.model, *given)
            return dict(zip(order, getattr(out, "sample", out).chunk(len(order)), strict=True))

        if not patches:
            return call()
        with diffusers.apply(self.model, *patches, branches=[names[name] for name in order]) as applied:
            assert applied.patches == patches
            applied.record(self.recorder)
            return call()


def fake_transformer() -> FakeTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return FakeTransformer().eval().requires_grad_(False)


def world(name: str) -> World:
    kind, host = name.split(" on ")
    family, _, own = kind.partition(" with ")
    tiny = TINY.get(next(base.walk for base in models.BASE_MODELS if base.name == family))
    if tiny is None:
        pytest.fail(f"{family} has a walk and no tiny model; write one and register it in TINY of tests/tiny_models.py")
    adapters = (format_named(own), own, tiny.families[own]) if own else (tiny.format,)
    if host == "ComfyUI":
        patcher = FakePatcher(HostModel(tiny.comfy()))
        return ComfyWorld(patcher, comfy.comfy_layout(patcher), *adapters)
    module = tiny.diffusers()
    return DiffusersWorld(module, models.layout_of(module), *adapters)


WALKED = {base.walk: base.name for base in reversed((*models.BASE_MODELS, FAKE)) if base.walk}
"""Every walk and the first family that has it: related families are one kind of model."""
HOSTS: dict[str, Mapping[Any, object]] = {"ComfyUI": comfy.DOORS, "diffusers": diffusers.ENTRIES}
WORLDS = [
    f"{family} on {host}"
    for walk, family in reversed(WALKED.items())
    for host, ways_in in HOSTS.items()
    if walk in ways_in or family == "Fake"
]
WORLDS += [
    f"{WALKED[walk]} with {own} on {host}"
    for walk, tiny in TINY.items()
    for own in tiny.families
    for host, ways_in in HOSTS.items()
    if walk is not None and walk in ways_in
]
"""Every kind of model on the hosts where image prompts can enter it, and every family whose files people have for it."""


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line in BASE_MODELS, and one door for each host."""
    torch.set_num_threads(1)
    monkeypatch.setattr(models, "BASE_MODELS", (*models.BASE_MODELS, FAKE))
    monkeypatch.setitem(TINY, walk_fake, Tiny(fake_transformer, fake_transformer, fake_model.FORMAT))
    monkeypatch.setitem(comfy.DOORS, walk_fake, FakeDoor())
    monkeypatch.setitem(diffusers.ENTRIES, walk_fake, FakeEntry.of)


@pytest.fixture(params=WORLDS)
def any_world(request: pytest.FixtureRequest, _registered: None) -> World:
    return world(request.param)


@pytest.fixture(params=["Fake on ComfyUI", "Fake on diffusers"])
def fake_world(request: pytest.FixtureRequest, _registered: None) -> World:
    return world(request.param)


def same(got: Outputs, expected: Outputs) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        assert_close(got[name], expected[name], **TOLERANCE)


def identical(got: Outputs, expected: Outputs) -> bool:
    return all(torch.equal(got[name], expected[name]) for name in expected)


def apart(got: Outputs, expected: Outputs) -> float:
    return min(float((got[name] - expected[name]).abs().max()) for name in expected)


def test_every_kind_of_model_is_entered_on_every_host_that_has_it() -> None:
    """A line that is missing would leave its worlds out without a word."""
    real = {walk: name for walk, name in WALKED.items() if name != "Fake"}
    without = [f"{name} on {host}" for walk, name in real.items() for host, ways in HOSTS.items() if walk not in ways]
    assert without == ["Anima on diffusers"], "diffusers has no pipeline of Anima"


# --- the package does not know it -------------------------------------------------------------------------------------


def test_no_file_of_the_package_names_the_fake_model() -> None:
    files = sorted(Path(ipadapter_core.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    names = ("FakeTransformer", "fake_model", "walk_fake", '"Fake"', "'Fake'", "FAKE")
    assert [path for path in files if any(name in path.read_text() for name in names)] == []


def test_an_unregistered_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "BASE_MODELS", models.BASE_MODELS[:-1])
    with pytest.raises(IncompatibleAdapterError, match="FakeTransformer"):
        models.layout_of(fake_transformer())


@pytest.mark.parametrize("host", ["ComfyUI", "diffusers"])
def test_a_walk_without_a_door_says_so(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = world(f"Fake on {host}")
    monkeypatch.delitem(comfy.DOORS, walk_fake)
    monkeypatch.delitem(diffusers.ENTRIES, walk_fake)
    with pytest.raises(
        IncompatibleAdapterError, match=f"cannot act in Fake in {host} yet; use a model of the SD1.5, SD2"
    ):
        here.run(here.patch())


def test_a_model_that_cannot_be_trained_is_refused_with_those_that_can() -> None:
    base: Any = FrozenBase(fake_transformer(), (), (), None, None, "")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"nothing can be trained on Fake yet; choose a model of SD1\.5, SD2"):
        _ = base.training


def test_a_kind_of_model_without_a_tiny_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TINY, walk_fake)
    with pytest.raises(pytest.fail.Exception, match="Fake has a walk and no tiny model"):
        world("Fake on diffusers")


# --- the formula ------------------------------------------------------------------------------------------------------


def by_hand(model: FakeTransformer, world: World, seed: int, weight: float, percent: float, name: str) -> Tensor:
    """The fake model with the formula written out: x = block(x); image tokens += weight · attend(normed q, K(t), V(t))."""
    adapter = world.adapter(seed)
    prompt = tiny_prompt(adapter, seed=seed)
    tokens = prompt.cond if name == "positive" else prompt.uncond
    t = round((1 - percent) * 999.0) if isinstance(world, ComfyWorld) else (1 - percent) * 1000.0
    blocks: list[Any] = list(model.blocks)

    class Steered(nn.Module):
        def __init__(self, i: int) -> None:
            super().__init__()
            self.i = i

        def forward(self, x: Tensor) -> Tensor:
            block, part = blocks[self.i], slice(TEXT, x.shape[1] - TAIL)
            q = block.norm_q(block.to_q(x))[:, part]
            k = adapter.module.to_k_ip[self.i](tokens).expand(len(x), -1, -1)
            v = adapter.module.to_v_ip[self.i](tokens).expand(len(x), -1, -1) * (1 + t / 1000)
            heads = [tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2) for tensor in (q, k, v)]
            x = block(x).clone()
            x[:, part] += weight * F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            return x

    twin = fake_transformer()
    twin.blocks = nn.ModuleList(Steered(i) for i in range(len(blocks)))
    called_with = (
        world.model.model.model_sampling.sigma(torch.tensor((1 - percent) * 999.0)) if isinstance(world, ComfyWorld) else torch.tensor(t)
    )  # fmt: skip
    with torch.no_grad():
        return twin(X, called_with.expand(len(X)), TEXTS[name].expand(len(X), -1, -1))


def check_formula(fake_world: World) -> None:
    for percent in (0.25, 0.8):
        got = fake_world.run(fake_world.patch(strength=0.7), percent=percent)
        assert apart(got, fake_world.run(percent=percent)) > 1e-2, "the adapter hardly acts"
        module: Any = fake_world.module
        model = module if isinstance(module, FakeTransformer) else module.diffusion_model
        for name in got:
            assert_close(got[name], by_hand(model, fake_world, 0, 0.7, percent, name), rtol=0, atol=1e-4)


def test_the_output_is_the_plain_formula(fake_world: World) -> None:
    check_formula(fake_world)


@pytest.mark.parametrize("broken", ["all tokens", "the timestep of the first call", "text query"])
def test_the_comparison_with_the_formula_can_fail(
    fake_world: World, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "all tokens":
        monkeypatch.setattr(fake_model, "image_tokens", lambda call, length: slice(0, length))
    elif broken == "text query":
        rows = 5 * 8
        monkeypatch.setattr(fake_model, "image_tokens", lambda call, length: slice(TEXT - 1, TEXT - 1 + rows))
    else:
        real: Any = fake_model.FakeFormat.key_value
        monkeypatch.setattr(fake_model.FakeFormat, "key_value", lambda s, m, i, t, timestep: real(s, m, i, t, 750.0))
    with pytest.raises((AssertionError, AdapterError)):
        check_formula(fake_world)


# --- invariants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
def test_strength_zero_changes_no_bit(any_world: World, scaling: str) -> None:
    assert identical(any_world.run(any_world.patch(strength=0.0, scaling=scaling)), any_world.run())
    assert apart(any_world.run(any_world.patch(strength=0.5, scaling=scaling)), any_world.run()) > 1e-4


def test_outside_the_window_no_bit_changes(any_world: World) -> None:
    patch = any_world.patch(start_percent=0.6, end_percent=0.8)
    for percent in (0.5, 0.9):
        assert identical(any_world.run(patch, percent=percent), any_world.run(percent=percent))
    assert apart(any_world.run(patch, percent=0.7), any_world.run(percent=0.7)) > 1e-3


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_mask_of_ones_is_no_mask_and_of_zeros_no_prompt(any_world: World, scaling: str) -> None:
    for x in (X, X[..., :7, :11]):  # sizes that neither halve nor part into patches
        ones, zeros = (any_world.patch(scaling=scaling, mask=torch.full((50, 70), float(n))) for n in (1, 0))
        same(any_world.run(ones, x=x), any_world.run(any_world.patch(scaling=scaling), x=x))
        same(any_world.run(zeros, x=x), any_world.run(x=x))


def test_complementary_masks_add_up(any_world: World) -> None:
    mask = torch.rand(20, 32, generator=torch.Generator().manual_seed(0))
    halves = any_world.patch(mask=mask), any_world.patch(mask=1 - mask)
    same(any_world.run(*halves), any_world.run(any_world.patch()))


def test_the_order_of_adapters_is_no_matter(any_world: World) -> None:
    a, b = any_world.patch(seed=1), any_world.patch(seed=2, strength=0.5)
    both = any_world.run(a, b)
    same(any_world.run(b, a), both)
    assert min(apart(both, any_world.run(patch)) for patch in (a, b)) > 1e-3


def test_nothing_is_left_behind(any_world: World) -> None:
    """Applied and removed, or applied to a clone: the model is as it was, and runs to the same bits."""
    before, plain = any_world.traces(), any_world.run()
    with_one = any_world.run(any_world.patch())
    assert apart(with_one, plain) > 1e-3
    any_world.run(any_world.patch(seed=1), any_world.patch(seed=2, mask=torch.ones(8, 8)))
    assert any_world.traces() == before
    assert identical(any_world.run(), plain)
    assert identical(any_world.run(any_world.patch()), with_one)


def test_clones_are_apart() -> None:
    for name in (name for name in WORLDS if name.endswith("ComfyUI")):
        for deep in (False, True):
            here = world(name)
            here.model.deepcopy_options = deep
            a, b, c = (here.patch(seed=seed) for seed in range(3))
            start = here.model
            here.model = comfy.apply(start, a)
            alone = here.model
            expected = Guider(alone, conds(), ("positive",))(X)
            with_b, with_c = comfy.apply(alone, b), comfy.apply(alone, c)
            assert [comfy.applied_patches(m) for m in (start, alone, with_b, with_c)] == [(), (a,), (a, b), (a, c)]
            assert identical(Guider(alone, conds(), ("positive",))(X), expected)
            assert apart(Guider(with_b, conds(), ("positive",))(X), Guider(with_c, conds(), ("positive",))(X)) > 1e-3


def conds() -> dict[str, Any]:
    return {"positive": [conditioning(TEXTS["positive"])]}


def test_a_batch_of_two_is_two_batches_of_one(any_world: World) -> None:
    patch = any_world.patch(mask=torch.rand(96, 128, generator=torch.Generator().manual_seed(0)))
    together = any_world.run(patch)
    for i in (0, 1):
        same(any_world.run(patch, x=X[i : i + 1]), {name: out[i : i + 1] for name, out in together.items()})


def test_the_order_of_conditionings_is_no_matter(any_world: World) -> None:
    patch = any_world.patch()
    swapped = any_world.run(patch, order=("positive", "negative"))
    same({name: swapped[name] for name in ("negative", "positive")}, any_world.run(patch))
    same(any_world.run(patch, order=("positive",)), {"positive": swapped["positive"]})


def test_a_curve_scales_the_strength(any_world: World) -> None:
    curved = any_world.patch(strength=2.0, curve=((0.0, 1.0), (1.0, 0.0)))
    same(any_world.run(curved, percent=0.25), any_world.run(any_world.patch(strength=1.5), percent=0.25))


@pytest.mark.parametrize("preset", ["style transfer", "composition", "strong style transfer", "weak input"])
def test_a_preset_that_the_model_lacks_is_refused(fake_world: World, preset: str) -> None:
    """Never a silent zero at every site."""
    with pytest.raises(AdapterError, match="Fake"):
        fake_world.patch(preset=preset)
    assert apart(fake_world.run(fake_world.patch(preset="ease in")), fake_world.run()) > 1e-3


# --- what is recorded ---------------------------------------------------------------------------------------------------


def recorded(here: World, *patches: AdapterPatch, **how: Any) -> Recorder:
    here.recorder = Recorder(1)
    here.run(*patches, **how)
    recorder, here.recorder = here.recorder, None
    return recorder


def test_a_recorded_run_is_the_same_to_the_bit_and_knows_its_tokens(any_world: World) -> None:
    mask = torch.zeros(10, 16)
    mask[:, :8] = 1  # ends at a token of every level
    patch = any_world.patch(mask=mask)
    plain = any_world.run(patch)
    any_world.recorder = Recorder(1)
    assert identical(any_world.run(patch), plain)
    maps = any_world.recorder.maps()
    assert [str(reference) for reference in maps.references] == [patch.name]
    assert (maps.latent, maps.latents, maps.notes) == ((10, 16), 2, ())
    share = maps.map(0)
    assert bool((share[..., 8:] == 0).all()), "shares outside of the mask"
    assert bool((share[..., :8] > 0).all())
    assert 1e-3 < float(share.max()) < 1
    weights = [patch.sites[i] is not None and weight.weight != 0 for i, weight in enumerate(patch.weights)]
    assert [bool(row.sum() > 0) for row in maps.by_site()[0]] == weights
    assert_close(maps.by_site().mean(1), maps.map().flatten(1).mean(1)[None], rtol=0, atol=1e-5)


def test_shares_of_prompts_are_additive_and_follow_their_masks(any_world: World) -> None:
    left = torch.zeros(10, 16)
    left[:, :8] = 1
    a, b = any_world.patch(seed=1, mask=left), any_world.patch(seed=1, mask=left.flip(1))
    maps = recorded(any_world, a, b).maps()
    assert [str(reference) for reference in maps.references] == [f"{a.name} (1)", f"{b.name} (2)"]
    assert_close(maps.map(0) + maps.map(1), maps.map(), rtol=0, atol=1e-6)
    assert bool((maps.map(0)[..., 8:] == 0).all())
    assert bool((maps.map(1)[..., :8] == 0).all())
    twice = recorded(any_world, a, any_world.patch(seed=1, mask=left)).maps()
    assert_close(twice.map(0), twice.map(1), rtol=0, atol=1e-5)


# --- what the fake model has and UNets have not ---------------------------------------------------------------------------


def test_keys_and_values_are_made_once_per_timestep(fake_world: World) -> None:
    patch, sites = fake_world.patch(), len(fake_world.layout.sites)
    assert fake_world.made == 0, "nothing can be made before the timestep is known"
    runs: list[Callable[[], object]] = [lambda: fake_world.run(patch, percent=0.5)]
    if isinstance(fake_world, ComfyWorld):
        runs.append(lambda: fake_world.run(patch, percent=0.5, chunks=1))
    for run in runs:
        run()
        assert fake_world.made == sites
    for percent in (0.4, 0.5, 0.4):  # a sampler of second order comes back
        fake_world.run(patch, percent=percent)
        assert fake_world.made == 2 * sites
    fake_world.run(patch, percent=0.3)
    fake_world.run(patch, percent=0.5)
    assert fake_world.made == 4 * sites, "only the last timesteps are kept"


def test_a_foreign_hook_on_the_block_is_called_first() -> None:
    here = world("Fake on ComfyUI")

    def doubling(args: dict[str, Any], block: Any) -> Tensor:
        return 2 * block(args["img"])

    model = here.model.clone()
    model.set_model_patch_replace(doubling, "dit", "block", 1)
    patch = here.patch()
    plain = Guider(model, conds(), ("positive",))(X)
    steered = Guider(comfy.apply(model, patch), conds(), ("positive",))(X)
    assert apart(steered, plain) > 1e-3
    assert apart(steered, Guider(comfy.apply(here.model, patch), conds(), ("positive",))(X)) > 1e-3


def test_an_area_sees_its_part_of_the_mask() -> None:
    here = world("Fake on ComfyUI")
    mask = torch.zeros(10, 16)
    mask[:, 8:] = 1
    area = {"positive": [conditioning(TEXTS["positive"], (10, 8, 0, 8))]}
    left = {"positive": [conditioning(TEXTS["positive"], (10, 8, 0, 0))]}
    masked, everywhere = comfy.apply(here.model, here.patch(mask=mask)), comfy.apply(here.model, here.patch())
    same(Guider(masked, area, ("positive",))(X), Guider(everywhere, area, ("positive",))(X))
    same(Guider(masked, left, ("positive",))(X), Guider(here.model, left, ("positive",))(X))


@pytest.mark.parametrize("host", ["ComfyUI", "diffusers"])
def test_a_door_refuses_what_it_does_not_know(host: str) -> None:
    here = world(f"SD1.5 on {host}")
    patch = replace(here.patch(), reach=fake_model.FORMAT.reach)
    with pytest.raises(IncompatibleAdapterError, match="residual of a transformer"):
        here.run(patch)
    assert here.layout.sites[0].channels != CHANNELS
