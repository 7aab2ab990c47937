"""A new LoRA algorithm is one class and its place in one tuple: it is read, applied, written, inspected and trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ipadapter_core.backends.diffusers import lora as backend
from ipadapter_core.commands.cli import main
from ipadapter_core.errors import CorruptFileError, InvalidInputError
from ipadapter_core.lora import Update, algorithms, load_lora, save_lora
from ipadapter_core.lora.convert import to_tensors
from ipadapter_core.lora.factors import Smaller, combine, resize
from ipadapter_core.lora.fresh import Settings, TrainedAs
from ipadapter_core.lora.inspection import heat_map, lora_facts, verify
from ipadapter_core.lora.parts import Key, Parts, key
from ipadapter_core.training import parse_config, train
from ipadapter_core.training.config import LoRAConfig
from ipadapter_core.training.lora_adapter import fresh_lora
from tiny_models import SD15, TOKEN_DIM, call_unet, noise, tiny_unet
from tiny_training import save_model, save_pictures, tiny_config

BUILT_IN = algorithms.ALGORITHMS
PATH = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
STEM = "lora_unet_" + PATH.replace(".", "_")


@dataclass(frozen=True, slots=True, eq=False)
class Outer(Update):
    """``ΔW = column · row``, with no kernel."""

    algorithm: ClassVar[str] = "Outer"
    keys: ClassVar[tuple[Key, ...]] = (key(".outer_", r"\.outer_(column|row)$", r"outer_\1"),)
    marks: ClassVar[tuple[str, ...]] = ("outer_column",)
    trainings: ClassVar[tuple[TrainedAs, ...]] = (TrainedAs("outer", targets="all: 0, attn2 k: 1"),)
    column: Tensor
    row: Tensor

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return len(self.column), len(self.row)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == self.weight_shape

    def delta(self, weight: Tensor) -> Tensor:
        return torch.outer(self.column.to(weight), self.row.to(weight))

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        return cls(parts["outer_column"], parts["outer_row"])

    def to_parts(self) -> dict[str, Tensor]:
        return {".outer_column": self.column, ".outer_row": self.row}

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.column[:, None].float(), self.row[None].float()

    @classmethod
    def fresh(cls, weight: Tensor, settings: Settings) -> Update:
        return cls(torch.zeros(weight.shape[0]), torch.randn(weight.shape[1]))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one registration."""
    monkeypatch.setattr(algorithms, "ALGORITHMS", (*algorithms.ALGORITHMS, Outer))


def state(rows: int, columns: int = TOKEN_DIM) -> dict[str, Tensor]:
    return {f"{STEM}.outer_column": noise(rows, seed=1), f"{STEM}.outer_row": noise(columns, seed=2)}


def product(tensors: dict[str, Tensor]) -> Tensor:
    return tensors[f"{STEM}.outer_column"][:, None] * tensors[f"{STEM}.outer_row"]


def test_it_is_unknown_without_its_place_in_the_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    load_lora(state(8))
    monkeypatch.setattr(algorithms, "ALGORITHMS", algorithms.ALGORITHMS[:-1])
    with pytest.raises(Exception, match="has no LoRA in it"):
        load_lora(state(8))


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_it_is_read_and_applied_unfused_and_merged(strength: float) -> None:
    unet = tiny_unet(SD15)
    tensors = state(unet.get_submodule(PATH).weight.shape[0])
    patch = backend.place(unet, load_lora(tensors)).with_strength(strength)
    x, text = noise(2, 4, 8, 8), noise(2, 5, TOKEN_DIM)
    with torch.no_grad():
        plain = call_unet(unet, x, text)
        with backend.apply(unet, patch):
            beside = call_unet(unet, x, text)
        with backend.merge(unet, patch):
            merged = call_unet(unet, x, text)
        unet.get_submodule(PATH).weight += strength * product(tensors)
        expected = call_unet(unet, x, text)
    assert not torch.allclose(expected, plain, atol=1e-3)
    torch.testing.assert_close(beside, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_damage_is_told(tmp_path: Path) -> None:
    tensors = state(8)
    del tensors[f"{STEM}.outer_row"]
    with pytest.raises(CorruptFileError, match="no 'outer_row' that belongs to it"):
        load_lora(tensors)
    with pytest.raises(CorruptFileError, match="NaN or infinite"):
        load_lora(state(8) | {f"{STEM}.outer_row": torch.full((4,), float("nan"))})


@pytest.mark.parametrize("form", ["kohya", "generic"])
def test_it_is_written_and_comes_back(form: Any, tmp_path: Path) -> None:
    weights = load_lora(state(8, 768))
    save_lora(weights, tmp_path / "a.safetensors", key_format=form)
    (module,) = load_lora(tmp_path / "a.safetensors").modules
    assert isinstance(module.weight, Outer)
    assert torch.equal(module.weight.column, noise(8, seed=1))
    with pytest.raises(InvalidInputError, match="is Outer, which PEFT's"):
        to_tensors(weights, "diffusers")


def test_it_is_inspected_resized_and_summed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.safetensors"
    save_file(state(8, 768), file)
    facts = lora_facts(file)
    assert facts["algorithms"] == {"Outer": 1}
    assert facts["base_model"] == "SD1.5"
    assert main(["lora", "inspect", str(file)]) == 0
    assert "Outer" in capsys.readouterr().out
    assert verify(file).problems == ()
    delta = product(state(8, 768))
    assert heat_map(load_lora(file)).values.item() == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-5)
    weights = load_lora(file)
    (small,), (twice,) = resize(weights, Smaller(1))[0].modules, combine([weights, weights], [1, 1])[0].modules
    assert small.weight is not None
    assert twice.weight is not None
    torch.testing.assert_close(small.weight.delta(torch.zeros(8, 768)), delta, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twice.weight.delta(torch.zeros(8, 768)), 2 * delta, rtol=1e-4, atol=1e-5)


def test_layers_that_it_cannot_change_are_told_before_the_training() -> None:
    with pytest.raises(
        InvalidInputError,
        match=r"down_blocks\S+ \(\d+×\d+×3×3\), which lora.algorithm 'outer' cannot change .* leave such layers out",
    ):
        fresh_lora(
            {"denoiser": tiny_unet(SD15)}, LoRAConfig(rank=1, algorithm="outer", targets="all: 0, resnet conv: 1")
        )


def test_a_role_or_mark_of_another_algorithm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its files would silently load as the other's."""
    for name, claims in {
        "role 'down'": {"keys": (key(".outer_", r"\.outer_column$", "down"),)},
        "mark 'up'": {"marks": ("up",)},
    }.items():
        monkeypatch.setattr(algorithms, "ALGORITHMS", (*BUILT_IN, type("Other", (Outer,), claims)))
        with pytest.raises(TypeError, match=f"Other and LowRank both have the {name}"):
            load_lora(state(8))


def test_a_member_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unfinished(Update):
        def delta(self, weight: Tensor) -> Tensor:
            return weight

    monkeypatch.setattr(algorithms, "ALGORITHMS", (*BUILT_IN, Unfinished))
    with pytest.raises(TypeError, match="Unfinished has no fits, from_parts, weight_shape; see"):
        load_lora(state(8))


def test_it_is_trained_under_its_name(tmp_path: Path) -> None:
    assert parse_config({"lora": {"rank": 1, "algorithm": "outer"}}, "here").lora.algorithm == "outer"
    with pytest.raises(InvalidInputError, match=r"choose one of lora, .*, dora, outer; did you mean 'outer'"):
        parse_config({"lora": {"rank": 1, "algorithm": "outre"}}, "here")
    unet = tiny_unet(SD15)
    lora = fresh_lora({"denoiser": unet}, LoRAConfig(rank=1, algorithm="outer"))
    assert all(target.path.endswith("attn2.to_k") for target in lora.targets)
    config = tiny_config(
        save_model(tmp_path / "model"), save_pictures(tmp_path / "pictures", 4), tmp_path / "run", lora__rank=1,
        lora__algorithm="outer", output__name="style", train__steps=3, train__lr=0.1,
    )  # fmt: skip
    trained = load_lora(train(config).file)
    assert {module.weight.title for module in trained.modules if module.weight is not None} == {"Outer"}
    assert trained.metadata["ss_network_module"] == "lycoris.kohya"
    assert any(module.weight.norm() for module in trained.modules if module.weight is not None), "it has learned"
