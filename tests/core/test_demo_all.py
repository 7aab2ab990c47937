"""The demo world by one command: what is drawn on the device, the learner that goes on where it was, all stages at toy scale."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportCallIssue=false, reportPrivateUsage=false

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTokenizer

from ipadapter_core.attention.schedule import WeightSchedule
from ipadapter_core.backends.diffusers.doors import apply
from ipadapter_core.bake import bake
from ipadapter_core.checkpoints import load_adapter
from ipadapter_core.demo import learner, measure, sheet, train_all, train_flux, train_world
from ipadapter_core.demo.build_world import take
from ipadapter_core.demo.easel import NONE, Easel
from ipadapter_core.demo.learner import Learner, StackedMuon, load_parts, save_parts
from ipadapter_core.demo.pictures import BACKGROUNDS, STUDIOS, Pictures, caption
from ipadapter_core.demo.train_adapters import LearningAdapter
from ipadapter_core.demo.train_all import Settings, Workshop
from ipadapter_core.demo.train_parts import (
    TEXT_LENGTH,
    build_autoencoder,
    build_image_encoder,
    build_text_encoder,
    encode,
    world_tokenizer,
)
from ipadapter_core.demo.world import FOLDER, World, load_world
from ipadapter_core.models import layout_of
from ipadapter_core.prompt.image_prompt import ImagePrompt
from ipadapter_core.training.optimizers import Muon
from tiny_world import SMALL, SmallFlux, few_pictures

CPU = torch.device("cpu")


@pytest.fixture
def pictures() -> Pictures:
    return few_pictures()


@pytest.fixture
def easel(pictures: Pictures, tmp_path: Path) -> Easel:
    return Easel(pictures, world_tokenizer(pictures, tmp_path / "tokenizer"), TEXT_LENGTH, CPU)


def test_captions_are_the_worlds_sentences(easel: Easel, tmp_path: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    parts = torch.tensor([[1, 2, 3], [NONE, 0, NONE], [2, NONE, 11], [NONE, NONE, NONE]])
    words = easel.tokens(*parts.unbind(1), torch.tensor([False, False, False, True]))
    names, colours = easel.vocabulary, list(BACKGROUNDS)
    texts = [caption(STUDIOS[1], names[2], colours[3]), names[0], caption(STUDIOS[2], None, colours[11]), ""]
    whole = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    assert torch.equal(words, whole.input_ids)


def test_pairs_name_the_targets_background_where_they_differ(easel: Easel, pictures: Pictures) -> None:
    torch.manual_seed(0)
    index = easel.choose(64)
    assert not pictures.held_out[index].any(), "never what is held out"
    pairs = easel.pairs(index)
    differ = (pairs.references[:, :, 0, 0] - pairs.targets[:, :, 0, 0]).abs().amax(1) > 0.05
    assert 10 < int(differ.sum()) < 54
    told = easel.tokens(*torch.full((3, 1), NONE), torch.tensor([False]))
    assert not (pairs.captions[differ] == told).all(1).any(), "a caption without a background beside another one"


def test_tensors_are_kept_in_parts_of_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "PART", 1000)
    tensors = {f"{i}": torch.randn(50) for i in range(12)}
    for _ in range(2):
        save_parts(tmp_path / "some", tensors, {"steps": "3"})
    files = list((tmp_path / "some").iterdir())
    assert len(files) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"some"}
    found = load_parts(tmp_path / "some")
    assert found is not None
    assert found[1]["steps"] == "3"
    assert found[0].keys() == tensors.keys()
    assert all(torch.equal(found[0][key], value) for key, value in tensors.items())
    assert load_parts(tmp_path / "none") is None


def test_stacked_muon_is_the_trainers() -> None:
    torch.manual_seed(0)
    shapes = [(20, 30), (20, 30), (24, 20, 3, 3), (7,), (4, 40)]
    values = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    mine = StackedMuon(ours, decay=0.0)
    reference = Muon([{"params": theirs, "lr": 1e-2}], weight_decay=0.0, beta2=0.99)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step(torch.tensor(1e-2))
        reference.step()
    for a, b, start in zip(ours, theirs, values, strict=True):
        moved = (b - start).norm()
        assert (a - b).norm() < 0.05 * moved, a.shape  # torch's stays in bfloat16 a little longer


def toy() -> tuple[nn.Linear, Learner]:
    torch.manual_seed(1)
    model = nn.Linear(20, 20)
    x = torch.randn(32, 20)
    return model, Learner(model, lambda: (model(x) - x).square().mean(), CPU, lr=0.02)


def test_a_learner_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, one = toy()
    begin = one.loss().item()
    for _ in range(6):
        one.step(0.5)
    assert one.loss().item() < begin
    _, half = toy()
    for _ in range(3):
        half.step(0.5)
    half.store(tmp_path / "state")
    rest, two = toy()
    two.restore(tmp_path / "state")
    assert two.steps == 3
    for _ in range(3):
        two.step(0.5)
    assert torch.equal(rest.weight, whole.weight)
    assert all(torch.equal(a, b) for a, b in zip(one.mean, two.mean, strict=True))


def test_a_resumed_learner_warms_up_before_it_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new process the libraries have not chosen their kernels yet."""
    _, first = toy()
    for _ in range(5):
        first.step(0.5)
    first.store(tmp_path / "state")
    _, second = toy()
    second.restore(tmp_path / "state")
    second.record = True
    recorded = list[int]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: recorded.append(second.steps))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    for _ in range(6):
        second.step(0.5)
    assert recorded == [5 + learner.WARM_STEPS]


def workshop(base: str, tmp_path: Path) -> Workshop:
    """A workshop that has made nothing yet."""
    return Workshop(few_pictures(), tmp_path, CPU, Settings(100.0, 4), SMALL[base])


def moved(model: nn.Module) -> nn.Module:
    """A model whose blocks do something: those that begin as the identity would hide what acts in them."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize(
    ("base", "name"), [("unet", "plus"), ("unet", "base"), ("flux", "instantx"), ("flux", "xlabs")]
)
def test_what_learns_acts_as_the_finished_adapter(base: str, name: str, tmp_path: Path) -> None:
    """Tokens, keys, values, and where they join: training computes what people will sample with."""
    shop = workshop(base, tmp_path)
    encoder, model, easel = build_image_encoder(), moved(shop.base.build()), shop.easel
    text = build_text_encoder(shop.tokenizer)(easel.tokens(*torch.full((3, 2), NONE), torch.tensor([False, True])))
    noisy, time, _ = shop.base.noised(torch.randn(2, 16, 16, 16), easel.generator)
    plain = shop.base.predicted(model, noisy, time, text)
    learning = LearningAdapter(model, encoder, shop.base.adapters[name], CPU)
    learning.start(0.3)
    dropped = torch.tensor([False, True])
    features = learning.features(easel.scenes(torch.arange(2), 0.0).images, dropped)
    tokens = learning.module.projector(features)
    learning.see(tokens)
    seen = shop.base.predicted(model, noisy, time, text)
    learning.see(tokens, dict.fromkeys(learning.reached, torch.tensor([1.0, 0.0])))
    first = shop.base.predicted(model, noisy, time, text)
    learning.remove()
    assert (seen - plain).abs().max() > 1e-3
    torch.testing.assert_close(first, torch.cat([seen[:1], plain[1:]]))
    adapter = load_adapter({key: value.clone() for key, value in learning.state().items()}, name=name)
    assert adapter.spec.family == {"instantx": "instantx-resampler"}.get(name, name)
    assert adapter.spec == learning.spec
    prompt = ImagePrompt(tokens[:1], tokens[1:], features[:1, None], features[1:, None], name, "custom", 192)
    with torch.no_grad(), apply(model, bake(adapter, prompt, layout_of(model)), branches=("cond", "uncond")):
        torch.testing.assert_close(shop.base.predicted(model, noisy, time, text), seen)
    assert torch.equal(shop.base.predicted(model, noisy, time, text), plain), "nothing stays behind"


def test_nothing_stands_for_no_image_as_its_family_says(tmp_path: Path) -> None:
    shop = workshop("flux", tmp_path)
    model, encoder = shop.base.build(), build_image_encoder()
    adapters = {name: LearningAdapter(model, encoder, of, CPU) for name, of in shop.base.adapters.items()}
    white, black = torch.ones(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    yes, no = torch.tensor([True]), torch.tensor([False])
    xlabs, instantx = adapters["xlabs"], adapters["instantx"]
    assert torch.equal(xlabs.features(white, yes), xlabs.features(black, no))
    assert not torch.equal(instantx.features(white, yes), instantx.features(black, no)), "zero pixels are mean grey"


def test_the_transformer_learns_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    shop = workshop("flux", tmp_path)
    torch.manual_seed(3)
    encoder, vae = build_image_encoder(), build_autoencoder(torch.full((48,), 0.5), torch.randn(16, 48) / 4)
    text = build_text_encoder(shop.tokenizer).requires_grad_(False)
    pairs = shop.easel.pairs(torch.arange(4))

    def learner() -> Learner:
        torch.manual_seed(4)
        model = shop.base.build()
        learning = LearningAdapter(model, encoder, shop.base.adapters["instantx"], CPU)
        learning.start(0.02)

        def loss() -> Tensor:
            learning.see(learning.module.projector(learning.features(pairs.references, pairs.dropped)))
            return shop.denoising_loss(model, encode(vae, pairs.targets), text(pairs.captions))

        return Learner(nn.ModuleDict({"model": model, "adapter": learning.module}), loss, CPU, lr=2e-2)

    whole, losses = learner(), list[float]()
    for step in range(12):
        whole.step(0.5)
        losses.append(whole.last_loss())
        if step == 9:
            whole.store(tmp_path / "state")
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    rest = learner()
    still = [p.clone() for p in rest.parameters]
    rest.restore(tmp_path / "state")
    for _ in range(2):
        rest.step(0.5)
    assert all(torch.equal(a, b) for a, b in zip(rest.parameters, whole.parameters, strict=True))
    unmoved = [p.shape for p, before in zip(rest.parameters, still, strict=True) if torch.equal(p, before)]
    assert not unmoved


def test_flow_matching_leads_from_noise_to_latents(tmp_path: Path) -> None:
    flux, latents = train_all.Flux(CPU), torch.randn(400, 16, 16, 16)
    noisy, time, velocity = flux.noised(latents, torch.default_generator)
    torch.testing.assert_close(noisy - time[:, None, None, None] * velocity, latents)
    assert (noisy + (1 - time[:, None, None, None]) * velocity).std().item() == pytest.approx(1, abs=0.01)
    assert time.median().item() == pytest.approx(0.75, abs=0.05), "where the sampler's shift has half of its steps"


def test_the_transformer_is_small_and_shaped_as_flux() -> None:
    flux = train_all.Flux(CPU)
    with torch.device("meta"):
        model: Any = flux.build()
    assert sum(p.numel() for p in model.parameters()) <= 20e6
    layout = layout_of(model)
    assert layout.name == "Flux"
    assert {site.group for site in layout.sites} == {"double", "single"}
    assert {site.channels // site.heads for site in layout.sites} == {128}, (
        "InstantX' norm of keys is by heads of FLUX.1"
    )
    assert model.config.guidance_embeds


def test_stages_share_all_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a base model with a single adapter, which learns together with it."""
    for base in train_all.BASES.values():
        assert sum(train_all.shares(base).values()) == pytest.approx(1)
    monkeypatch.setattr(SmallFlux, "adapters", {"xlabs": SmallFlux.adapters["xlabs"]})
    assert train_all.shares(SmallFlux) == pytest.approx({"image_encoder": 0.10, "vae": 0.05, "transformer": 0.85})


class Recordable(TorchDispatchMode):
    """Fails where a step copies numbers from Python to its device or reads what is there, which no CUDA graph records."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select"), name
        return func(*args, **(kwargs or {}))


def test_one_command_makes_worlds_that_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_world, "BASES", SMALL)
    monkeypatch.setattr(train_all, "FEW", 256)
    monkeypatch.setattr(train_world, "load_pictures", lambda folder, everything: few_pictures())
    monkeypatch.setattr(train_all, "start_on_grid", lambda projector, features: None)  # of 128 pictures
    monkeypatch.setattr(train_flux, "start_still", lambda model: None)  # two steps would not wake it
    step = Learner._step

    def watched(self: Learner) -> Tensor:
        with Recordable() if self.steps else nullcontext():  # what is looked up once comes before the recording
            return step(self)

    monkeypatch.setattr(Learner, "_step", watched)
    command = ["--work", str(tmp_path), "--batch", "4", "--steps", "2", "--device", "cpu", "--seconds", "100"]
    drawn: dict[str, World] = {}
    for base, stages in (("unet", 4), ("flux", 2)):  # the second takes what the first made
        train_world.main(["all", "--base", base, "--pictures", "none", *command])
        assert capsys.readouterr().out.count(": 2 steps in") == stages
        train_world.main(["all", "--base", base, "--pictures", "none", *command])
        assert capsys.readouterr().out == "", "what is finished is read"
        train_world.main(["join", "--base", base, "--work", str(tmp_path), "--out", str(tmp_path / base)])
        drawn[base] = load_world(tmp_path / base)
    assert max(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) <= 16e6
    families = {name: a.spec.family for world in drawn.values() for name, a in world.adapters.items()}
    assert families == {"base": "base", "plus": "plus", "instantx": "instantx-resampler", "xlabs": "xlabs"}
    for world in drawn.values():
        for name in world.adapters:

            def draw(strength: float | None, world: World = world, name: str = name) -> Tensor:
                images = None if strength is None else world.references.images[:1]
                return world.draw(name, images, WeightSchedule(strength=strength or 0.0), ["a"], seeds=[0], steps=1)

            plain = draw(None)
            assert plain.shape == (1, 3, 64, 64)
            assert plain.isfinite().all()
            assert torch.equal(draw(0.0), plain)
            assert not torch.equal(draw(1.0), plain)


def test_a_transformers_world_is_drawn_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sheet leaves out what needs roles of sites, which nobody knows of FLUX.1."""
    take(FOLDER, tmp_path)
    shop = workshop("flux", tmp_path)
    model, adapter = shop.base.build(), shop.base.adapters["xlabs"]
    save_parts(tmp_path / "parts/xlabs", LearningAdapter(model, build_image_encoder(), adapter, CPU).state())
    save_parts(tmp_path / "parts/transformer", model.state_dict())
    monkeypatch.setattr(SmallFlux, "adapters", {"xlabs": adapter})
    monkeypatch.setattr(train_world, "BASES", SMALL)
    train_world.main(["join", "--base", "flux", "--work", str(tmp_path), "--out", str(tmp_path / "world")])
    few = load_world(tmp_path / "world")
    few = replace(few, references=few.references[:6])
    monkeypatch.setattr(sheet, "load_world", lambda folder: few)
    monkeypatch.setattr(measure, "NAMED", measure.NAMED[:6])
    monkeypatch.setattr(sheet, "measure", partial(measure.measure, strengths=()))
    train_world.main(["sheet", "--base", "flux", "--work", str(tmp_path), "--steps", "1"])
    with Image.open(tmp_path / "sheet-xlabs/demo.png") as drawn:
        assert drawn.width == sheet.LABELS + 6 * 136
    facts = json.loads((tmp_path / "sheet-xlabs/demo.json").read_text())
    assert set(facts["similarity_to_reference"]) == {"0.0", "1.0"}


def test_a_missing_part_is_named(tmp_path: Path, pictures: Pictures) -> None:
    world_tokenizer(pictures, tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"parts/vae is missing; run `all`"):
        train_world.main(["join", "--work", str(tmp_path)])
