"""LoRAs of newer transformers: in every spelling and on both forms of a model the change that diffusers makes of them."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core.backends.diffusers import lora as backend
from ipadapter_core.errors import IncompatibleAdapterError
from ipadapter_core.lora import load_lora, match_lora, targets_of
from ipadapter_core.models import BASE_MODELS
from tiny_families import FAMILIES, Tiny, Tree, Weights
from tiny_models import noise

EVERY = pytest.mark.parametrize("family", FAMILIES)


@cache
def tiny(family: str) -> tuple[Tiny, Tree, nn.Module]:
    found = FAMILIES[family]
    original = found.original()
    return found, original, found.model(original)


def linear(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {path: tuple(m.weight.shape) for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def pair(path: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """down and up for a layer, seeded by its name."""
    seed = sum(path.encode())
    return 0.2 * noise(2, shape[1], seed=seed), 0.2 * noise(shape[0], 2, seed=seed + 1)


def peft(shapes: Mapping[str, tuple[int, ...]], prefix: str = "transformer.") -> Weights:
    found: Weights = {}
    for path, shape in shapes.items():
        down, up = pair(path, shape)
        found |= {f"{prefix}{path}.lora_A.weight": down, f"{prefix}{path}.lora_B.weight": up}
    return found


def kohya(shapes: Mapping[str, tuple[int, ...]], stem: Callable[[str], str]) -> Weights:
    found: Weights = {}
    for path, shape in shapes.items():
        down, up = pair(path, shape)
        found |= {f"{stem(path)}.lora_down.weight": down, f"{stem(path)}.lora_up.weight": 2 * up}
        found[f"{stem(path)}.alpha"] = torch.tensor(1.0)
    return found


def merged(model: nn.Module, file: Weights) -> Weights:
    """The model's weights with the file merged in, as a state dict."""
    with torch.no_grad(), backend.merge(model, backend.place(model, load_lora(file))):
        return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def added(shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> Weights:
    """The model's weights and the formula of ``pair``."""
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    for path, shape in shapes.items():
        down, up = pair(path, shape)
        state[f"{path}.weight"] += up @ down
    return state


def converted(family: str, state: Weights) -> Weights:
    """Weights of the original as diffusers' model has them."""
    found, original, _ = tiny(family)
    original = FAMILIES[family].original()
    original.load_state_dict(state)
    return dict(found.model(original).state_dict().items())


def assert_same(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert_close(tensor, b[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@EVERY
def test_what_diffusers_loads_we_load_on_both_forms(family: str) -> None:
    """The output of its model with the file in PEFT's layers is that of merged weights, its own and converted ones of the original."""
    found, original, model = tiny(family)
    shapes = linear(model)
    file = peft(shapes)
    reference: Any = found.model(original)
    plain = found.run(reference)
    reference.load_lora_adapter({key: tensor.clone() for key, tensor in file.items()}, prefix="transformer")
    expected = found.run(reference)
    assert (expected - plain).norm() > 0.05 * plain.norm(), "the file changes nothing that is seen"
    ours = merged(model, file)
    assert_same(converted(family, merged(original, file)), ours)
    other = found.model(original)
    other.load_state_dict(ours)
    assert (found.run(other) - expected).norm() < 1e-4 * expected.norm()


SPELLINGS: dict[str, Callable[[Mapping[str, tuple[int, ...]]], Weights]] = {
    "generic": lambda shapes: kohya(shapes, lambda path: f"diffusion_model.{path}"),
    "transformer": lambda shapes: kohya(shapes, lambda path: f"transformer.{path}"),
    "diffusers PEFT": lambda shapes: peft(shapes),
    "raw PEFT": lambda shapes: peft(shapes, "base_model.model."),
    "kohya": lambda shapes: kohya(shapes, lambda path: f"lora_unet_{path.replace('.', '_')}"),
    "OneTrainer": lambda shapes: kohya(shapes, lambda path: f"lora_transformer_{path.replace('.', '_')}"),
    "SimpleTuner": lambda shapes: kohya(shapes, lambda path: f"lycoris_{path.replace('.', '_')}"),
    "bare": lambda shapes: peft(shapes, ""),
}


@EVERY
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_either_form_s_names_on_either_form(family: str, spelling: str) -> None:
    _, original, model = tiny(family)
    spelled = SPELLINGS[spelling]
    for named in (original, model):
        shapes = linear(named)
        file = spelled(shapes)
        expected = added(shapes, named)
        in_diffusers = expected if named is model else converted(family, expected)
        assert_same(merged(model, file), in_diffusers)
        on_original = merged(original, file)
        assert_same(converted(family, on_original), in_diffusers)
        if named is original:
            assert_same(on_original, expected)


@EVERY
def test_the_family_is_told_from_names_alone(family: str) -> None:
    _, original, model = tiny(family)
    for named in (original, model):
        assert load_lora(peft(linear(named))).base_model == family
        assert targets_of(named).family == family
    assert family in {base.name for base in BASE_MODELS}


@EVERY
def test_a_lora_of_another_family_is_refused_with_both_names(family: str) -> None:
    _, _, model = tiny(family)
    file = load_lora(peft(linear(model)))
    for other in FAMILIES.keys() - {family}:
        with pytest.raises(IncompatibleAdapterError, match=f"this is a LoRA for {family}, the model is {other}"):
            match_lora(file, {"denoiser": targets_of(tiny(other)[1])})


@pytest.mark.parametrize(
    ("family", "alias", "path", "first", "rows"),
    [
        ("Flux", "single_transformer_blocks.1.attn.to_out", "single_blocks.1.linear2", 0, 24),
        ("Flux", "single_blocks.1.linear1_qkv", "single_blocks.1.linear1", 0, 72),
        ("Flux", "transformer_blocks.0.ff.linear_in", "double_blocks.0.img_mlp.0", 0, 96),
        ("Flux.2", "single_blocks.1.linear1_qkv", "single_blocks.1.linear1", 0, 72),
        ("Flux.2", "single_transformer_blocks.0.attn.to_k", "single_blocks.0.linear1", 24, 24),
        ("Flux.2", "single_transformer_blocks.0.proj_mlp", "single_blocks.0.linear1", 72, 144),
        ("Chroma", "transformer_blocks.0.attn.to_qkv", "double_blocks.0.img_attn.qkv", 0, 72),
        ("Anima", "text_conditioner.blocks.1.mlp.0", None, 0, 96),
    ],
)
def test_further_names_that_hosts_accept(family: str, alias: str, path: str | None, first: int, rows: int) -> None:
    found, original, model = tiny(family)
    if path is None:  # Anima's adapter of the text, a model of its own in diffusers
        path = "llm_adapter.blocks.1.mlp.0"
        original = Tree({**found.layers, path: (rows, 24)})
    weight = original.get_parameter(f"{path}.weight").detach()
    columns = weight.shape[1]
    file = peft({alias: (rows, columns)})
    down, up = pair(alias, (rows, columns))
    change = merged(original, file)[f"{path}.weight"] - weight
    assert_close(change[first : first + rows], up @ down, rtol=1e-4, atol=1e-5)
    assert change.count_nonzero() == rows * columns
    if "text" not in alias:
        assert_same(merged(model, file), converted(family, merged(original, file)))
