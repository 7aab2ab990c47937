"""The demo world by one command: what is drawn on the device, the learner that goes on where it was, all stages at toy scale."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportCallIssue=false

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ipadapter_core.attention.schedule import WeightSchedule
from ipadapter_core.demo import learner, train_all, train_parts, train_world
from ipadapter_core.demo.easel import NONE, Easel
from ipadapter_core.demo.learner import Learner, StackedMuon, load_parts, save_parts
from ipadapter_core.demo.pictures import BACKGROUNDS, STUDIOS, Pictures, caption
from ipadapter_core.demo.train_parts import world_tokenizer
from ipadapter_core.demo.world import load_world
from ipadapter_core.training.optimizers import Muon
from tiny_training import six_discs

CPU = torch.device("cpu")


@pytest.fixture
def pictures() -> Pictures:
    discs = six_discs()
    return Pictures(discs.rgba, discs.names, discs.studios, discs.held_out, others=1)


@pytest.fixture
def easel(pictures: Pictures, tmp_path: Path) -> Easel:
    return Easel(pictures, world_tokenizer(pictures, tmp_path / "tokenizer"), train_parts.TEXT_LENGTH, CPU)


def test_captions_are_the_worlds_sentences(easel: Easel, tmp_path: Path) -> None:
    tokenizer = train_parts.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    parts = torch.tensor([[1, 2, 3], [NONE, 0, NONE], [2, NONE, 11], [NONE, NONE, NONE]])
    words = easel.tokens(*parts.unbind(1), torch.tensor([False, False, False, True]))
    names, colours = easel.vocabulary, list(BACKGROUNDS)
    texts = [caption(STUDIOS[1], names[2], colours[3]), names[0], caption(STUDIOS[2], None, colours[11]), ""]
    assert torch.equal(words, train_parts.tokenize(tokenizer, texts))


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


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=16, out_channels=16, layers_per_block=1, block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=train_parts.TEXT_DIM, attention_head_dim=4, norm_num_groups=32,
    )  # fmt: skip


def test_all_stages_make_a_world_that_draws(
    pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_parts, "build_unet", small_unet)
    monkeypatch.setattr(train_all, "FEW", 256)
    monkeypatch.setattr(train_world, "load_pictures", lambda folder, everything: pictures)
    monkeypatch.setattr(train_all, "start_on_grid", lambda projector, features: None)  # of 128 pictures
    command = ["--work", str(tmp_path), "--batch", "4", "--steps", "1", "--device", "cpu", "--seconds", "100"]
    train_world.main(["all", "--pictures", "none", *command])
    assert capsys.readouterr().out.count(": 1 steps in") == 4
    train_world.main(["all", "--pictures", "none", *command])
    assert capsys.readouterr().out == "", "what is finished is read"
    assert max(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) <= 16e6
    train_world.main(["join", "--work", str(tmp_path), "--out", str(tmp_path / "world")])
    world = load_world(tmp_path / "world")
    assert {family: a.spec.num_tokens for family, a in world.adapters.items()} == {"base": 4, "plus": 16}
    for family in world.adapters:
        drawn = world.draw(family, world.references.images[:1], WeightSchedule(), ["a"], seeds=[0], steps=1)
        assert drawn.shape == (1, 3, 64, 64)
        assert drawn.isfinite().all()


def test_a_missing_part_is_named(tmp_path: Path, pictures: Pictures) -> None:
    world_tokenizer(pictures, tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"parts/vae is missing; run `all`"):
        train_world.main(["join", "--work", str(tmp_path)])
