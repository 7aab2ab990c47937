"""What learns is one class and one line: a toy that is neither an image adapter nor a LoRA goes through the whole trainer."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ipadapter_core.errors import InvalidInputError
from ipadapter_core.training import RunConfig, build_cache, dry_run, prepare, train
from ipadapter_core.training.frozen import FrozenBase, load_base
from ipadapter_core.training.loop import TrainingFailed
from ipadapter_core.training.trainee import Parts, Trainee
from tiny_models import noise
from tiny_training import fingerprint, save_model, save_pictures, tiny_config


class Word(nn.Module):
    """One learned vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))


class LearnedWord(Trainee):
    """A vector added to every token that the cross-attentions read."""

    gain = "word_gain"
    acts = True

    @staticmethod
    def wanted(config: RunConfig) -> bool:
        return config.output.name == "word"

    @classmethod
    def build(cls, config: RunConfig, base: FrozenBase) -> LearnedWord:
        return cls(config, base, Word(base.unet.config.cross_attention_dim))

    def attach(self, learned: nn.Module, parts: Parts) -> None:
        def add(module: nn.Module, args: Any, named: dict[str, Any]) -> Any:
            word = learned.vector if self.acts else 0
            if len(args) > 2:
                return (*args[:2], args[2] + word), named
            return args, named | {"encoder_hidden_states": named["encoder_hidden_states"] + word}

        parts["denoiser"].register_forward_pre_hook(add, with_kwargs=True)

    @contextmanager
    def off(self) -> Generator[None]:
        before, self.acts = self.acts, False
        try:
            yield
        finally:
            self.acts = before

    def save(self, path: Path, state: dict[str, Tensor], metadata: Mapping[str, str]) -> Path:
        dtype = getattr(torch, self.config.output.dtype)
        save_file({key: value.to(dtype).contiguous() for key, value in state.items()}, path, dict(metadata))
        return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"), 10)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "TRAINEES", (*prepare.TRAINEES, LearnedWord))


def word_config(model: Path, pictures: Path, out: Path, **changes: Any) -> RunConfig:
    more = {"output__name": "word", "train__lr": 0.1, "watch__validate_every": 3, "data__cache": str(out / "cache")}
    return tiny_config(model, pictures, out, **(more | changes))


def test_it_trains_and_the_models_stay(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory predicted, validation with its own gain, and a file that says how it was made."""
    used: list[FrozenBase] = []
    monkeypatch.setattr(prepare, "load_base", lambda *where: used.append(load_base(*where)) or used[-1])
    outcome = train(
        word_config(model, pictures, tmp_path, train__ignore_memory=False, train__steps=9, output__dtype="float32")
    )
    before = load_base(str(model))
    assert fingerprint(used[0].unet) == fingerprint(before.unet)
    assert not any(p.requires_grad for p in used[0].unet.parameters())
    assert used[0].vae is None
    assert used[0].text_encoders == (), "captions are in the cache"
    assert float(load_file(outcome.file)["vector"].abs().max()) > 0.01
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    gains = [row["word_gain"] for row in rows if row["event"] == "validation"]
    assert gains[0] == 0
    assert len({*gains}) > 2
    with safe_open(outcome.file, framework="pt") as file:
        told = file.metadata()
    assert (told["prediction"], told["pictures"], told["steps"]) == ("epsilon", "8", "9")


def test_killed_and_resumed_it_ends_with_the_same_bits(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = word_config(model, pictures, tmp_path / "whole")
    whole = load_file(train(config).file)
    halves = word_config(model, pictures, tmp_path / "halves", data__cache=config.data.cache)
    original, calls = torch.optim.AdamW.step, [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise MemoryError("no room")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", failing)
        with pytest.raises(TrainingFailed, match="after step 4"):
            train(halves)
    assert (tmp_path / "halves/state-00000004").is_dir()
    resumed = load_file(train(halves).file)
    assert torch.equal(whole["vector"], resumed["vector"])
    assert bool(whole["vector"].any())


def test_its_cache_and_its_dry_run(model: Path, pictures: Path, tmp_path: Path) -> None:
    """The cache holds captions' embeddings and no features; without one the same losses come out."""
    cached, live = (
        word_config(model, pictures, tmp_path / name, **changes)
        for name, changes in (("cached", {}), ("live", {"data__cache": ""}))
    )
    build_cache(cached)
    (settings,) = (json.loads(file.read_text()) for file in (tmp_path / "cached/cache").glob("*/settings.json"))
    assert "text_encoders" in settings
    assert "feature" not in settings
    for config in (cached, live):
        train(config)
    losses = [
        [
            row["loss"]
            for row in map(json.loads, (tmp_path / name / "progress.jsonl").read_text().splitlines())
            if "loss" in row
        ]
        for name in ("cached", "live")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    text = dry_run(word_config(model, pictures, tmp_path, train__ignore_memory=False))
    assert "trained: 16 parameters" in text
    assert "  vector 16" in text
    assert "memory: about" in text


LEARNERS = {"word": {"output__name": "word"}, "lora": {"lora__rank": 2}, "adapter": {}}


@pytest.fixture(params=LEARNERS)
def learner(request: pytest.FixtureRequest, model: Path, pictures: Path, tmp_path: Path) -> Trainee:
    """Every kind with numbers other than zero."""
    config = tiny_config(model, pictures, tmp_path, **LEARNERS[request.param], output__dtype="bfloat16")
    made = prepare.trainee_of(config).build(config, load_base(str(model)))
    with torch.no_grad():
        for parameter in made.learned.parameters():
            parameter.normal_()
    return made


def test_files_have_the_dtype_of_the_config(learner: Trainee, tmp_path: Path) -> None:
    file = learner.save(tmp_path / "learned.safetensors", dict(learner.learned.state_dict()), {})
    assert {one.dtype for one in load_file(file).values() if one.ndim} == {torch.bfloat16}


def test_a_block_without_it_ends_with_it_whatever_happens(learner: Trainee) -> None:
    """Also where such blocks lie in one another."""

    @torch.no_grad()
    def predicted() -> Tensor:
        return learner.base.unet(noise(1, 4, 8, 8), 500, noise(1, 12, 16, seed=1)).sample

    alone = predicted()
    learner.attach(learner.learned, learner.parts)
    acting = predicted()
    assert not torch.equal(acting, alone)
    with suppress(MemoryError), learner.off():
        off = predicted()
        with suppress(MemoryError), learner.off():
            raise MemoryError("no room")
        assert torch.equal(predicted(), off)
        raise MemoryError("no room")
    assert torch.equal(predicted(), acting)


def test_their_order_does_not_matter_and_two_at_once_are_refused(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word, lora = word_config(model, pictures, tmp_path), tiny_config(model, pictures, tmp_path, lora__rank=2)
    plus = tiny_config(model, pictures, tmp_path, adapter__family="plus")
    plain = tiny_config(model, pictures, tmp_path)
    both = word_config(model, pictures, tmp_path, lora__rank=2)
    for order in permutations(prepare.TRAINEES):
        monkeypatch.setattr(prepare, "TRAINEES", order)
        found = [prepare.trainee_of(config).__name__ for config in (word, lora, plus, plain)]
        assert found == ["LearnedWord", "LoRATrainee", "AdapterTrainee", "AdapterTrainee"]
        with pytest.raises(InvalidInputError, match=r"trains one thing, and this config means \w+ and \w+; leave out"):
            prepare.trainee_of(both)
