"""LoRAs of newer transformers: in every spelling and on both forms of a model the change that diffusers makes of them."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core.backends.diffusers import lora as backend
from ipadapter_core.commands.cli import main
from ipadapter_core.errors import IncompatibleAdapterError, InvalidInputError
from ipadapter_core.lora import inspection, load_lora, match_lora, parse_selector, targets_of
from ipadapter_core.lora import selector as language
from ipadapter_core.lora.convert import KEY_FORMATS, to_tensors
from ipadapter_core.lora.extract import extract
from ipadapter_core.lora.factors import Smaller, combine, resize
from ipadapter_core.lora.forms import in_form
from ipadapter_core.lora.inspection import draw_heat_map, heat_map
from ipadapter_core.lora.names import to_name
from ipadapter_core.models import BASE_MODELS
from tiny_families import FAMILIES, Tiny, Tree, Weights
from tiny_loras import MAKERS
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


def merged(model: nn.Module, file: Weights, selector: str = "") -> Weights:
    """The model's weights with the file merged in, as a state dict."""
    patch = replace(backend.place(model, load_lora(file)), selector=parse_selector(selector))
    with torch.no_grad(), backend.merge(model, patch):
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
    _load_by_peft(reference, shapes, file)
    expected = found.run(reference)
    assert (expected - plain).norm() > 0.05 * plain.norm(), "the file changes nothing that is seen"
    ours = merged(model, file)
    assert_same(converted(family, merged(original, file)), ours)
    other = found.model(original)
    other.load_state_dict(ours)
    assert (found.run(other) - expected).norm() < 1e-4 * expected.norm()


def _load_by_peft(model: Any, shapes: Mapping[str, tuple[int, ...]], file: Weights) -> None:
    """By diffusers, or where its model has no loader by PEFT, which it calls."""
    if hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter({key: tensor.clone() for key, tensor in file.items()}, prefix="transformer")
        return
    config = LoraConfig(r=2, lora_alpha=2, target_modules=list(shapes))
    inject_adapter_in_model(config, model, "default")
    missed: Any = set_peft_model_state_dict(model, {k.removeprefix("transformer."): t for k, t in file.items()})
    assert not missed.unexpected_keys


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
        told = load_lora(peft(linear(named))).base_model
        # diffusers names PixArt's linear layers as LTX-Video's; the widths of published models tell them apart
        assert told == ("PixArt or LTX-Video" if family == "PixArt" and named is model else family)
        assert targets_of(named).family == family
    assert family in {base.name for base in BASE_MODELS}


@EVERY
def test_a_lora_of_another_family_is_refused_with_both_names(family: str) -> None:
    _, _, model = tiny(family)
    file = load_lora(peft(linear(model)))
    for other in FAMILIES.keys() - set(file.base_model.split(" or ")):
        with pytest.raises(
            IncompatibleAdapterError, match=f"this is a LoRA for {file.base_model}, the model is {other}"
        ):
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


# --- selectors -------------------------------------------------------------------------------------------------------

LETTERS = (
    "k: 0",
    "all: 0, q: 1",
    "v: 0.25, k: -0.5",
    "attn out: 0, attn q: 2",
    "ff: 0",
    "mod: 0.5",
    "proj: 0, base: 0.5",
)
WORDS = {
    "Flux": ("double1 img: 0", "txt q: 0.5, single* ff: 0", "double0-1 mod: 0, single1 v: 0"),
    "Chroma": ("double1 img: 0", "txt q: 0.5, single* ff: 0", "guidance*: 0.5"),
    "Flux.2": ("double1 img: 0", "txt q: 0.5, single* ff: 0", "img mod: 0, single1 v: 0"),
    "Z-Image": ("layers0-1: 0.5", "noise_refiner0: 0, layers1 k: 0", "context_refiner* q: 0, txt v: 0.5"),
    "Qwen-Image": ("block1 img: 0", "txt q: 0.5, block0 ff: 0"),
    "Wan": ("self k: 0, cross v: 0.5", "attn1: 0, block1: 1", "attn2 out: 0"),
    "Anima": ("self k: 0, cross v: 0.5", "attn1: 0, block1: 1", "block0 mod: 0"),
    "HunyuanVideo": ("double1 img: 0", "txt q: 0.5, single* ff: 0", "refiner* k: 0, single1 v: 0"),
    "Lumina 2": ("layers0-1: 0.5", "noise_refiner0: 0, layers1 k: 0", "context_refiner* q: 0, txt v: 0.5"),
    "Krea 2": ("block1 ff: 0", "refiner0 q: 0, layerwise* out: 0.5", "txt: 0"),
    "AuraFlow": ("double1 img: 0", "txt q: 0.5, single* ff: 0", "img mod: 0, single1 v: 0"),
    "PixArt": ("self k: 0, cross v: 0.5", "attn1: 0, block1: 1", "attn2 k: 0, attn2 v: 2"),
    "LTX-Video": ("self k: 0, cross v: 0.5", "attn1: 0, block1: 1", "attn2 out: 0"),
}


@EVERY
def test_a_selector_means_the_same_on_both_forms_of_a_model(family: str) -> None:
    """Also where one fuses q, k and v: the words act on their rows. Whichever form the file was made for."""
    _, original, model = tiny(family)
    for named in (original, model):
        file = peft(linear(named))
        everything = merged(model, file)
        for selector in (*LETTERS, *WORDS[family]):
            first, second = converted(family, merged(original, file, selector)), merged(model, file, selector)
            assert_same(first, second)
            assert any(not torch.equal(tensor, everything[key]) for key, tensor in second.items()), selector


@EVERY
def test_every_layer_that_is_trained_has_a_word(family: str) -> None:
    """And every word of a family's table is one that the selector knows and its documentation has."""
    _, original, model = tiny(family)
    for named in (original, model):
        for target in targets_of(named).targets.values():
            pieces = [piece for _, piece in target.apart()] or [target]
            for piece in pieces:
                assert piece.words <= language.TYPES.keys()
                assert piece.block == "base" or piece.words & {"attn", "ff", "mod"} or len(piece.shape) == 1, piece
            assert parse_selector(f"all: 0, {target.block}: 1").factor(target) == 1
    words = {blocks.word for base in BASE_MODELS if base.naming for blocks in base.naming.lists}
    for word in words:
        assert word in (language.__doc__ or ""), word


@pytest.mark.parametrize("kind", ["LoRA", "DoRA out", "DoRA in", "LoHa", "LoKr", "OFT", "BOFT", "full"])
def test_rows_of_a_fused_layer_have_factors_of_their_own(kind: str) -> None:
    """They are what the layer is at the strength times its factor, merged and live, whatever the algorithm reads."""
    block: Any = nn.Module()
    block.attention = nn.Module()
    block.attention.qkv = nn.Linear(8, 24)

    class ZImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([block])

        def forward(self, x: Tensor) -> Tensor:
            return block.attention.qkv(x)

    torch.manual_seed(0)
    model, x = ZImage(), noise(2, 5, 8)
    assert targets_of(model).family == "Z-Image"
    boft = {"oft_blocks": noise(2, 6, 4, 4), "alpha": torch.tensor(0.0)}
    tensors = boft if kind == "BOFT" else MAKERS[kind]((24, 8), 2, 0)
    file = {f"diffusion_model.layers.0.attention.qkv.{key}": t for key, t in tensors.items()}
    patch = replace(backend.place(model, load_lora(file)), strength=0.7)
    chosen = replace(patch, selector=parse_selector("k: 0, v: -0.5"))
    with torch.no_grad():
        plain, weight = model(x), block.attention.qkv.weight.clone()
        rows = [weight[:8], weight[8:16], weight[16:]]
        for i, factor in ((0, 1.0), (2, -0.5)):
            with backend.merge(model, patch.with_strength(0.7 * factor)):
                rows[i] = block.attention.qkv.weight[8 * i : 8 * i + 8].clone()
        with backend.merge(model, chosen):
            expected = model(x)
            assert_close(block.attention.qkv.weight, torch.cat(rows), rtol=1e-5, atol=1e-6)
        with backend.apply(model, chosen):
            live = model(x)
    assert_close(live, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(live[..., 8:16], plain[..., 8:16])
    assert (live - plain).abs().max() > 0.01


# --- inspection ------------------------------------------------------------------------------------------------------


@EVERY
def test_a_heat_map_has_the_family_s_blocks_and_columns(family: str) -> None:
    """From names alone, with the selector's words; none for kinds of layers that the family lacks."""
    _, original, model = tiny(family)
    maps = [heat_map(load_lora(peft(linear(named)))) for named in (original, model)]
    blocks = {target.block for target in targets_of(original).targets.values() if len(target.shape) == 2}
    for heat in maps:
        assert set(heat.blocks) == blocks
        (naming,) = (base.naming for base in BASE_MODELS if base.naming and base.naming.family == family)
        words = [set(of.split()) for blocks in naming.lists for row in blocks.rows for of in row.words]
        for column in ("attn1 q", "attn2 out", "img q", "txt out", "mod", "ff"):
            assert (column in heat.columns) == any(
                set(column.split()) <= of and (len(column.split()) > 1 or not of & {"img", "txt"}) for of in words
            ) or column == "mod"
        assert not np.isnan(heat.values).all(axis=0).any()
    assert maps[0].columns == maps[1].columns


def test_a_fused_layer_is_three_cells() -> None:
    file = peft({"layers.1.attention.qkv": (72, 24)}, "diffusion_model.")
    down, up = pair("layers.1.attention.qkv", (72, 24))
    apart: Weights = {}
    for part, rows in zip("qkv", up.split(24), strict=True):
        stem = f"transformer.layers.1.attention.to_{part}"
        apart |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": rows}
    first, second = heat_map(load_lora(file)), heat_map(load_lora(apart))
    assert (first.blocks, first.columns) == (("layers1",), ("q", "k", "v"))
    np.testing.assert_allclose(first.values, second.values, rtol=1e-5)
    loha = {f"diffusion_model.layers.1.attention.qkv.{key}": t for key, t in MAKERS["LoHa"]((72, 24), 2, 0).items()}
    assert set(heat_map(load_lora(loha)).columns) <= {"q", "k", "v", "qkv"}


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_the_map_of_an_unknown_model_has_rows_by_its_names(prefix: str) -> None:
    paths = ("stages.3.self_attn.to_q", "stages.3.mlp.fc1", "stages.12.self_attn.out_proj", "head.x")
    names = {path if prefix.endswith(".") else path.replace(".", "_"): (8, 8) for path in paths}
    heat = heat_map(load_lora(peft(names, prefix)))
    assert heat.blocks == ("base", "block3", "block12")
    assert heat.columns == ("attn1 q", "attn1 out", "ff", "other")


def test_the_title_is_drawn_whole_and_without_letters_that_no_font_has() -> None:
    heat = heat_map(load_lora(peft({"layers.1.attention.to_q": (8, 8)})))
    wide, short = draw_heat_map(heat, "a long name of a file " * 4), draw_heat_map(heat, "x")
    assert wide.width > 500
    assert short.width > 120
    letters = [piece for piece in inspection._runs("x: RMS of ΔW × 1000, détail") if not piece.isascii()]  # pyright: ignore[reportPrivateUsage]
    assert letters == ["Δ", "×"]
    with_sign = np.asarray(draw_heat_map(heat, "Δ×").convert("L"))[:20]
    assert (with_sign < 128).sum() > (np.asarray(draw_heat_map(heat, "").convert("L"))[:20] < 128).sum() + 20


def test_the_picture_of_a_file_of_the_package_is_not_written_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = Path(inspection.__file__).parents[1] / "demo/world/loras/demo-world-style.safetensors"
    assert main(["lora", "heatmap", str(shipped)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["demo-world-style.heatmap.png"]
    assert not list(shipped.parent.glob("*.png"))


# --- convert, merge, extract -----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("key_format", KEY_FORMATS)
def test_a_converted_file_changes_the_same(family: str, key_format: Any) -> None:
    """From the names of either form to those that the key format has, fused layers cut and put together."""
    _, original, model = tiny(family)
    wanted = {"kohya": original, "generic": original, "diffusers": model}[key_format]
    for named in (original, model):
        file = kohya(linear(named), lambda path: f"diffusion_model.{path}")
        tensors, _ = to_tensors(load_lora(file), key_format)
        assert_same(merged(model, tensors), merged(model, file))
        assert_same(merged(original, tensors), merged(original, file))
        stems = {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in tensors}
        prefix = {"kohya": "lora_unet_", "generic": "diffusion_model.", "diffusers": "transformer."}[key_format]
        paths = linear(wanted)
        assert stems == {prefix + (path.replace(".", "_") if key_format == "kohya" else path) for path in paths}


def test_parts_of_one_fused_layer_get_back_what_they_were() -> None:
    down, up = pair("qkv", (72, 24))
    file = {
        "lora_unet_layers_0_attention_qkv.lora_down.weight": down,
        "lora_unet_layers_0_attention_qkv.lora_up.weight": up,
    }
    apart, _ = to_tensors(load_lora(file), "diffusers")
    assert apart["transformer.layers.0.attention.to_k.lora_A.weight"].shape == (2, 24)
    again, _ = to_tensors(load_lora(apart), "kohya")
    assert torch.equal(again["lora_unet_layers_0_attention_qkv.lora_down.weight"], down)
    assert torch.equal(again["lora_unet_layers_0_attention_qkv.lora_up.weight"], up)
    two = {key: tensor for key, tensor in apart.items() if "to_v" not in key}
    two["transformer.layers.0.attention.to_k.lora_A.weight"] = 2 * down
    (module,) = load_lora(to_tensors(load_lora(two), "generic")[0]).modules
    assert module.weight is not None
    assert (module.weight.rank, module.weight.weight_shape) == (4, (72, 24))
    assert_close(
        module.weight.delta(torch.zeros(72, 24)),
        torch.cat([up[:24] @ down, up[24:48] @ (2 * down), torch.zeros(24, 24)]),
    )


@pytest.mark.parametrize(
    ("kind", "stem", "shape", "key_format", "message"),
    [
        (
            "LoKr",
            "diffusion_model.layers.0.attention.qkv",
            (72, 24),
            "diffusers",
            "on a fused layer, which cannot be cut",
        ),
        (
            "DoRA in",
            "diffusion_model.layers.0.attention.qkv",
            (72, 24),
            "diffusers",
            "on a fused layer, which cannot be cut",
        ),
        (
            "DoRA out",
            "transformer.layers.0.attention.to_q",
            (24, 24),
            "kohya",
            "only products of matrices can be put together",
        ),
        (
            "LoKr",
            "transformer.layers.0.attention.to_q",
            (24, 24),
            "generic",
            "only products of matrices can be put together",
        ),
        ("LoRA", "transformer.single_transformer_blocks.0.proj_mlp", (50, 24), "kohya", "another variant of the model"),
    ],
)
def test_what_algebra_does_not_allow_is_said(
    kind: str, stem: str, shape: tuple[int, int], key_format: Any, message: str
) -> None:
    weights = load_lora({f"{stem}.{key}": tensor for key, tensor in MAKERS[kind](shape, 2, 0).items()})
    with pytest.raises(InvalidInputError, match=message):
        to_tensors(weights, key_format)


@pytest.mark.parametrize("kind", ["DoRA out", "LoHa", "full"])
def test_what_can_be_cut_by_rows_is(kind: str) -> None:
    """And whole differences are put together again."""
    stem = "diffusion_model.layers.0.attention.qkv"
    file = {f"{stem}.{key}": tensor for key, tensor in MAKERS[kind]((72, 24), 2, 0).items()}
    weight = noise(72, 24)
    (whole,) = load_lora(file).modules
    parts = in_form(load_lora(file).modules, "Z-Image", "diffusers")
    changes = [m.weight.delta(weight[24 * i : 24 * i + 24]) for i, m in enumerate(parts) if m.weight is not None]
    assert whole.weight is not None
    assert_close(torch.cat(changes), whole.weight.delta(weight), rtol=1e-5, atol=1e-5)
    if kind != "DoRA out":
        (again,) = in_form(parts, "Z-Image", "original")
        assert again.weight is not None
        assert_close(again.weight.delta(weight), whole.weight.delta(weight), rtol=1e-5, atol=1e-5)
        if whole.bias is not None:
            assert again.bias is not None
            assert torch.equal(again.bias.delta(weight[:, 0]), whole.bias.delta(weight[:, 0]))


@EVERY
def test_a_merge_of_fused_layers_and_parts_is_the_sum(family: str) -> None:
    _, original, model = tiny(family)
    fused, apart = peft(linear(original), "diffusion_model."), peft(linear(model))
    both, _ = combine([load_lora(fused), load_lora(apart)], [1.0, -0.5])
    plain = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    first, second = merged(model, fused), merged(model, apart)
    expected = {key: first[key] - 0.5 * (second[key] - tensor) for key, tensor in plain.items()}
    for key_format in KEY_FORMATS:
        assert_same(merged(model, to_tensors(both, key_format)[0]), expected)
    smaller, errors = resize(both, Smaller(rank=1))
    assert all(m.weight is None or m.weight.rank == 1 for m in smaller.modules)
    assert max(errors.values()) > 0


@EVERY
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_lora_out_of_two_checkpoints_in_either_form(family: str, prefix: str) -> None:
    _, original, model = tiny(family)
    for named in (original, model) if not prefix else (original,):
        base = {f"{prefix}{key}": tensor.detach() for key, tensor in named.state_dict().items()}
        changed = merged(named, peft(linear(named), "diffusion_model."))
        tuned = {f"{prefix}{key}": tensor for key, tensor in changed.items()}
        found, errors = extract(tuned, base, Smaller(rank=2))
        assert max(errors.values()) < 1e-3
        assert {m.name for m in found.modules} == {to_name(path) for path in linear(named)}
        assert family in found.base_model.split(" or ")
        again = merged(named, to_tensors(found, "generic")[0])
        for key, tensor in changed.items():
            assert_close(again[key], tensor, rtol=1e-3, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_a_fused_attention_of_an_unknown_model_is_selected_by_thirds() -> None:
    model = Tree({"stages.1.attn.qkv": (72, 24), "stages.1.attn.proj": (24, 24)})
    assert targets_of(model).family == "unknown"
    file = peft({"stages.1.attn.qkv": (72, 24)}, "diffusion_model.")
    weight = model.get_parameter("stages.1.attn.qkv.weight").detach()
    change = merged(model, file, "all: 0, block1 k: 0.5")["stages.1.attn.qkv.weight"] - weight
    down, up = pair("stages.1.attn.qkv", (72, 24))
    assert_close(change, torch.cat([0 * up[:24], 0.5 * up[24:48], 0 * up[48:]]) @ down, rtol=1e-4, atol=1e-6)
