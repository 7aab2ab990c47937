"""Files of every key format on models of every naming: the same tiny LoRA gives the same update, or a message that helps."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from host.shrunk import UNETS, unet_shapes
from ipadapter_core import models
from ipadapter_core.backends.diffusers import lora as backend
from ipadapter_core.errors import CorruptFileError, IncompatibleAdapterError, InvalidInputError, UnknownFormatError
from ipadapter_core.lora import (
    Layer,
    MatchedLoRA,
    TargetTable,
    describe_lora,
    load_lora,
    match_lora,
    matching,
    names,
    targets_of,
)
from ipadapter_core.lora.losses import lost_part
from ipadapter_core.lora.trainable import trainable
from ipadapter_core.models import naming
from ipadapter_core.models.sites import BaseModel
from tiny_loras import MAKERS
from tiny_models import SD15, SDXL, noise, tiny_unet

Weights = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


class Skeleton(nn.Module):
    """Modules of given names and shapes on the meta device: a model's names without its size."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        for path, shape in shapes.items():
            layer = (
                nn.Conv2d(shape[1], shape[0], shape[2], device="meta")
                if len(shape) == 4
                else nn.Linear(shape[1], shape[0], device="meta")
                if len(shape) == 2
                else nn.GroupNorm(1, shape[0], device="meta")
            )
            self._place(path.split("."), layer)

    def _place(self, parts: list[str], layer: nn.Module) -> None:
        owner: nn.Module = self
        for part in parts[:-1]:
            if part not in owner._modules:
                kind = "Upsample" if parts[parts.index(part) + 1 :] == ["conv"] and part != "0" else "Container"
                owner.add_module(part, type(kind, (Container,), {})())
            owner = owner.get_submodule(part)
        owner.add_module(parts[-1], layer)


class Container(nn.Module):
    def __getitem__(self, index: int) -> nn.Module:
        return list(self._modules.values())[index]  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Any:
        return iter(self._modules.values())


def ldm(kind: str) -> Skeleton:
    """ComfyUI's UNet by its real names."""
    shapes = {k.removesuffix(".weight"): s for k, s in unet_shapes(UNETS[kind]) if k.endswith(".weight")}
    return Skeleton(shapes)


# diffusers name, LDM name (written out: the walk must find them)
PAIRS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": "input_blocks.2.1.transformer_blocks.0.attn2.to_k",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0": "input_blocks.4.1.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.1.conv1": "input_blocks.8.0.in_layers.2",
    "down_blocks.2.resnets.0.time_emb_proj": "input_blocks.7.0.emb_layers.1",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.1.resnets.2.conv_shortcut": "output_blocks.5.0.skip_connection",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj": "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_v": "output_blocks.9.1.transformer_blocks.0.attn1.to_v",
    "time_embedding.linear_1": "time_embed.0",
    "conv_out": "out.2",
}


def placed(weights: Weights, model: nn.Module, **more: Any) -> MatchedLoRA:
    return match_lora(load_lora(weights, **more), {"denoiser": targets_of(model)})


def changes(found: MatchedLoRA) -> dict[str, Tensor]:
    """Whole delta per parameter."""
    out: dict[str, Tensor] = {}
    for p in found.matches:
        shape = p.target.shape if p.parameter == "weight" else p.target.shape[:1]
        whole = out.setdefault(p.key, torch.zeros(shape))
        start, length = p.rows or (0, shape[0])
        whole[start : start + length] += p.update.delta(whole[start : start + length])
    return out


def pair_of(table: TargetTable, path: str, rank: int = 2) -> tuple[Tensor, Tensor]:
    """down and up for a layer, seeded by its name."""
    out, *rest = table.targets[path].shape
    seed = sum(path.encode())
    return noise(rank, *rest, seed=seed), noise(out, rank, *[1] * (len(rest) - 1), seed=seed + 1)


def under(name: str) -> str:
    return name.replace(".", "_")


KeyFormat = Callable[[str, str, Tensor, Tensor], Weights]


def suffixed(stem: str, up: Tensor, down: Tensor, names: tuple[str, str]) -> Weights:
    return {f"{stem}{names[0]}": down, f"{stem}{names[1]}": up}


KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
ADAPTER = (".lora_A.default.weight", ".lora_B.default.weight")
OLD, LINEAR_LAYER = (
    (".lora.down.weight", ".lora.up.weight"),
    (
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
)
READ_FORMATS: dict[str, KeyFormat] = {
    "kohya, diffusers names": lambda d, s, a, b: suffixed(f"lora_unet_{under(d)}", b, a, KOHYA),
    "kohya, LDM names": lambda d, s, a, b: suffixed(f"lora_unet_{under(s)}", b, a, KOHYA),
    "SimpleTuner": lambda d, s, a, b: suffixed(f"lycoris_{under(d)}", b, a, KOHYA),
    "OneTrainer": lambda d, s, a, b: suffixed(f"lora_transformer_{under(d)}", b, a, KOHYA),
    "diffusers PEFT": lambda d, s, a, b: suffixed(f"unet.{d}", b, a, PEFT),
    "raw PEFT": lambda d, s, a, b: suffixed(f"base_model.model.{d}", b, a, PEFT),
    "raw PEFT, adapter name": lambda d, s, a, b: suffixed(f"base_model.model.{d}", b, a, ADAPTER),
    "diffusers mid": lambda d, s, a, b: suffixed(f"unet.{d}", b, a, OLD),
    "diffusers mid, linear": lambda d, s, a, b: suffixed(f"unet.{d}", b, a, LINEAR_LAYER),
    "generic": lambda d, s, a, b: suffixed(f"diffusion_model.{s}", b, a, KOHYA),
    "generic, no prefix": lambda d, s, a, b: suffixed(d, b, a, PEFT),
}


@pytest.mark.parametrize("key_format", READ_FORMATS)
@pytest.mark.parametrize("naming", ["diffusers", "ldm"])
def test_every_key_format_is_the_same_update(key_format: str, naming: str) -> None:
    model = tiny_unet(SD15) if naming == "diffusers" else ldm("sd15")
    table = targets_of(model)
    state: Weights = {}
    expected: dict[str, Tensor] = {}
    for diffusers, ldm_name in PAIRS.items():
        path = diffusers if naming == "diffusers" else ldm_name
        down, up = pair_of(table, path)
        state |= READ_FORMATS[key_format](diffusers, ldm_name, down, up)
        expected[f"{path}.weight"] = (up.flatten(1) @ down.flatten(1)).reshape(table.targets[path].shape)
    found = placed(state, model)
    assert not found.unmatched
    assert not found.weights.ignored
    actual = changes(found)
    assert actual.keys() == expected.keys()
    for key, delta in expected.items():
        assert_close(actual[key], delta, rtol=1e-5, atol=1e-5)


def test_a_prefix_says_the_part_and_the_key_format(monkeypatch: pytest.MonkeyPatch) -> None:
    new = names.Prefix("novel_dit_", "denoiser", "novel")
    monkeypatch.setattr(names, "PREFIXES", (*names.PREFIXES, new))
    for i, prefix in enumerate(names.PREFIXES):
        assert not any(other.text.startswith(prefix.text) for other in names.PREFIXES[i + 1 :]), (
            "it would never be read"
        )
        weights = load_lora(suffixed(f"{prefix.text}some_layer", torch.ones(4, 2), torch.ones(2, 4), PEFT))
        assert weights.modules[0].component == prefix.part
        assert prefix.key_format in (weights.key_format, ""), "else what follows the name tells it"
    wrapped = suffixed("module._orig_mod.lora_unet_x", torch.ones(4, 2), torch.ones(2, 4), KOHYA)
    assert load_lora(wrapped).key_format == "kohya"


def test_old_attention_processors() -> None:
    """What LoRAAttnProcessor wrote, with and without ``unet.``; to_out there means to_out.0."""
    model = tiny_unet(SD15)
    stem = "mid_block.attentions.0.transformer_blocks.0.attn2"
    table = targets_of(model)
    for prefix in ("", "unet."):
        state: Weights = {}
        for layer, target in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")):
            down, up = pair_of(table, f"{stem}.{target}", 4)
            state |= suffixed(f"{prefix}{stem}.processor.{layer}_lora", up, down, (".down.weight", ".up.weight"))
        found = placed(state, model)
        assert {p.target.path for p in found.matches} == {f"{stem}.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")}
        assert found.weights.key_format == "diffusers attention processors (old)"


@pytest.mark.parametrize("prefix", ["ip_adapter.", ""])
def test_faceid_numbers_are_diffusers_attention_processors(prefix: str) -> None:
    """Number n is the n-th of unet.attn_processors; on the LDM names the same layers."""
    unet = tiny_unet(SD15)
    order = [name.removesuffix(".processor") for name in unet.attn_processors]
    state: Weights = {}
    for i, path in enumerate(order):
        attention: Any = unet.get_submodule(path)
        state |= {
            f"{prefix}{i}.to_q_lora.down.weight": noise(2, attention.to_q.in_features, seed=i),
            f"{prefix}{i}.to_q_lora.up.weight": noise(attention.to_q.out_features, 2, seed=i + 50),
        }
        if path.endswith("attn2"):
            state[f"{prefix}{i}.to_k_ip.weight"] = noise(4, 4)
    state["image_proj.proj.weight"] = noise(4, 4)
    found = placed(state, unet)
    assert [p.target.path for p in found.matches] == [f"{path}.to_q" for path in order]
    assert found.weights.ignored == ()
    numbers = targets_of(ldm("sd15")).names
    pairs = dict(zip(range(len(order)), order, strict=True))
    assert numbers["processor_0_to_q"][0].path == "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    assert numbers[f"processor_{len(order) - 1}_to_q"][0].path == "middle_block.1.transformer_blocks.0.attn2.to_q"
    for number, path in pairs.items():
        label = targets_of(ldm("sd15")).targets[numbers[f"processor_{number}_to_q"][0].path].label
        assert label == f"{path}.to_q"


# --- fused layers ----------------------------------------------------------------------------------------------------

H, MLP = 8, 24
FLUX_ORIGINAL = {
    "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.0.img_attn.proj": (H, H),
    "double_blocks.0.txt_attn.qkv": (3 * H, H),
    "double_blocks.0.img_mlp.0": (MLP, H),
    "single_blocks.0.linear1": (3 * H + MLP, H),
    "single_blocks.0.linear2": (H, H + MLP),
    "final_layer.adaLN_modulation.1": (2 * H, H),
}
FLUX_DIFFUSERS = {
    **{f"transformer_blocks.0.attn.{n}": (H, H) for n in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"transformer_blocks.0.attn.add_{n}_proj": (H, H) for n in "qkv"},
    "transformer_blocks.0.ff.net.0.proj": (MLP, H),
    **{f"single_transformer_blocks.0.attn.{n}": (H, H) for n in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.0.proj_mlp": (MLP, H),
    "single_transformer_blocks.0.proj_out": (H, H + MLP),
    "norm_out.linear": (2 * H, H),
}
SD3_ORIGINAL = {
    "joint_blocks.0.x_block.attn.qkv": (3 * H, H),
    "joint_blocks.0.context_block.attn.qkv": (3 * H, H),
    "joint_blocks.0.x_block.attn.proj": (H, H),
}


def lora_for(stem: str, shape: tuple[int, ...], seed: int = 0) -> Weights:
    seed += sum(stem.encode())
    return {
        f"{stem}.lora_down.weight": noise(2, shape[1], seed=seed),
        f"{stem}.lora_up.weight": noise(shape[0], 2, seed=seed + 1),
    }


def product(state: Weights, stem: str) -> Tensor:
    return state[f"{stem}.lora_up.weight"] @ state[f"{stem}.lora_down.weight"]


def test_a_file_for_fused_flux_layers_on_diffusers_layers() -> None:
    model = Skeleton(FLUX_DIFFUSERS)
    state: Weights = {}
    for path, shape in FLUX_ORIGINAL.items():
        state |= lora_for(f"lora_unet_{under(path)}", shape)
    found = placed(state, model)
    assert not found.unmatched
    actual = changes(found)
    qkv = product(state, "lora_unet_double_blocks_0_img_attn_qkv").split(H)
    for part, delta in zip("qkv", qkv, strict=True):
        assert_close(actual[f"transformer_blocks.0.attn.to_{part}.weight"], delta)
    *single, mlp = product(state, "lora_unet_single_blocks_0_linear1").split([H, H, H, MLP])
    for part, delta in zip("qkv", single, strict=True):
        assert_close(actual[f"single_transformer_blocks.0.attn.to_{part}.weight"], delta)
    assert_close(actual["single_transformer_blocks.0.proj_mlp.weight"], mlp)
    shift, scale = product(state, "lora_unet_final_layer_adaLN_modulation_1").split(H)
    assert_close(actual["norm_out.linear.weight"], torch.cat([scale, shift]))


@pytest.mark.parametrize("prefix", ["transformer.", "lora_transformer_", "lycoris_"])
def test_a_file_for_diffusers_flux_on_fused_layers(prefix: str) -> None:
    model = Skeleton(FLUX_ORIGINAL)
    spelled = {path: prefix + (path if prefix.endswith(".") else under(path)) for path in FLUX_DIFFUSERS}
    state: Weights = {}
    for path, stem in spelled.items():
        state |= lora_for(stem, FLUX_DIFFUSERS[path])
    found = placed(state, model)
    assert not found.unmatched
    actual = changes(found)
    parts = [product(state, spelled[f"transformer_blocks.0.attn.to_{n}"]) for n in "qkv"]
    assert_close(actual["double_blocks.0.img_attn.qkv.weight"], torch.cat(parts))
    single = [product(state, spelled[f"single_transformer_blocks.0.attn.to_{n}"]) for n in "qkv"]
    single.append(product(state, spelled["single_transformer_blocks.0.proj_mlp"]))
    assert_close(actual["single_blocks.0.linear1.weight"], torch.cat(single))
    scale, shift = product(state, spelled["norm_out.linear"]).split(H)
    assert_close(actual["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_xlabs_names(naming: str) -> None:
    """Its numbers say picture (1) and text (2); in single blocks qkv leaves the MLP's rows of linear1 alone."""
    model = Skeleton(FLUX_ORIGINAL if naming == "original" else FLUX_DIFFUSERS)
    shapes = {"double_blocks.0.processor.qkv_lora1": (3 * H, H), "double_blocks.0.processor.qkv_lora2": (3 * H, H)}
    shapes["double_blocks.0.processor.proj_lora1"] = (H, H)
    shapes |= {"single_blocks.0.processor.qkv_lora": (3 * H, H), "single_blocks.0.processor.proj_lora": (H, H + MLP)}
    state: Weights = {}
    products: dict[str, Tensor] = {}
    for i, (stem, (rows, columns)) in enumerate(shapes.items()):
        down, up = noise(2, columns, seed=i), noise(rows, 2, seed=i + 20)
        state |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        products[stem.split(".", 1)[0] + stem.rsplit(".", 1)[1]] = up @ down
    found = placed(state, model)
    assert found.weights.key_format == "XLabs"
    assert not found.unmatched
    assert not found.weights.ignored
    actual = changes(found)
    if naming == "original":
        expected = {
            "double_blocks.0.img_attn.qkv": products["double_blocksqkv_lora1"],
            "double_blocks.0.txt_attn.qkv": products["double_blocksqkv_lora2"],
            "double_blocks.0.img_attn.proj": products["double_blocksproj_lora1"],
            "single_blocks.0.linear1": torch.cat([products["single_blocksqkv_lora"], torch.zeros(MLP, H)]),
            "single_blocks.0.linear2": products["single_blocksproj_lora"],
        }
    else:
        expected = {
            "transformer_blocks.0.attn.to_out.0": products["double_blocksproj_lora1"],
            "single_transformer_blocks.0.proj_out": products["single_blocksproj_lora"],
        }
        for form, source in (
            ("transformer_blocks.0.attn.to_{}", "double_blocksqkv_lora1"),
            ("transformer_blocks.0.attn.add_{}_proj", "double_blocksqkv_lora2"),
            ("single_transformer_blocks.0.attn.to_{}", "single_blocksqkv_lora"),
        ):
            expected |= {form.format(n): p for n, p in zip("qkv", products[source].split(H), strict=True)}
    assert actual.keys() == {f"{path}.weight" for path in expected}
    for path, delta in expected.items():
        assert_close(actual[f"{path}.weight"], delta)


class Fused(nn.Module):
    """The start of a Flux whose q, k and v are one layer, with numbers in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block: Any = nn.Module()
        block.img_attn = nn.Module()
        block.img_attn.qkv = nn.Linear(H, 3 * H)
        self.double_blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self.double_blocks[0]
        return block.img_attn.qkv(x)


@pytest.mark.parametrize("kind", ["DoRA out", "DoRA in", "OFT"])
def test_what_reads_the_weight_runs_live_on_a_part_of_a_fused_layer(kind: str) -> None:
    model, x = Fused(), noise(2, 5, H)
    state = {
        f"transformer.transformer_blocks.0.attn.to_{n}.{key}": value
        for i, n in enumerate("qv")
        for key, value in MAKERS[kind]((H, H), 2, 7 * i).items()
    }
    patch = replace(backend.place(model, load_lora(state)), strength=0.7)
    plain = model(x)
    with torch.no_grad(), backend.merge(model, patch):
        merged = model(x)
    with torch.no_grad(), backend.apply(model, patch):
        live = model(x)
    assert_close(live, merged, rtol=1e-5, atol=1e-5)
    assert torch.equal(live[..., H : 2 * H], plain[..., H : 2 * H]), "k is left alone"
    assert (live - plain).abs().max() > 0.01


@pytest.mark.parametrize("constraint", [0.0, 0.002])
def test_oft_of_a_fused_layer_on_separate_layers(constraint: float) -> None:
    """Whole blocks go with their rows, shortened by the norm of all; a block across two layers is refused."""
    model = Skeleton(FLUX_DIFFUSERS)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    blocks = noise(3 * H // 4, 4, 4)
    state = {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(constraint)}
    fused = load_lora(state).modules[0].weight
    assert fused is not None
    weight = noise(3 * H, H)
    whole = fused.delta(weight)
    found = placed(state, model)
    assert [p.target.path.rsplit(".", 1)[1] for p in found.matches] == ["to_q", "to_k", "to_v"]
    for i, p in enumerate(found.matches):
        rows = slice(i * H, (i + 1) * H)
        assert_close(p.update.delta(weight[rows]), whole[rows], rtol=1e-5, atol=1e-6)
    across = {f"{stem}.oft_blocks": noise(2, 12, 12), f"{stem}.alpha": torch.tensor(0.0)}
    columns = lora_for(stem, (3 * H, H)) | {f"{stem}.dora_scale": torch.ones(1, H)}  # its norms need all rows
    for state in (across, columns):
        with pytest.raises(IncompatibleAdapterError, match="does not fit"):
            placed(state, model)


def test_sd3_names() -> None:
    model = Skeleton(SD3_ORIGINAL)
    state: Weights = {}
    for name in ("to_q", "add_k_proj", "to_out.0"):
        state |= lora_for(f"transformer.transformer_blocks.0.attn.{name}", (H, H))
    actual = changes(placed(state, model))
    stem = "transformer.transformer_blocks.0.attn"
    assert_close(actual["joint_blocks.0.x_block.attn.qkv.weight"][:H], product(state, f"{stem}.to_q"))
    assert_close(
        actual["joint_blocks.0.context_block.attn.qkv.weight"][H : 2 * H], product(state, f"{stem}.add_k_proj")
    )
    assert actual["joint_blocks.0.x_block.attn.qkv.weight"][H:].abs().max() == 0
    assert_close(actual["joint_blocks.0.x_block.attn.proj.weight"], product(state, f"{stem}.to_out.0"))


def test_a_new_base_model_is_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file has a table of its layers; every key format, the blocks' words and the family follow."""
    rows = (naming.fused("mix.qkv", "attn.to_{}", "attn"), naming.layer("mix.proj", "attn.to_out.0", "attn out"))
    signs = naming.Signs(("trunk.0.mix.qkv",)), naming.Signs(("cubes.0.attn.to_q",))
    fake = BaseModel(
        name="Fake", naming=naming.Naming("Fake", *signs, (naming.Blocks("trunk", "cubes", "trunk", rows),), ())
    )
    monkeypatch.setattr(models, "BASE_MODELS", (*models.BASE_MODELS, fake))
    model = Skeleton({"trunk.0.mix.qkv": (3 * H, H), "trunk.0.mix.proj": (H, H)})
    table = targets_of(model)
    assert (table.family, {target.block for target in table.targets.values()}) == ("Fake", {"trunk0"})
    stems = [f"transformer.cubes.0.attn.to_{part}" for part in ("q", "k", "v", "out.0")]
    state = {key: tensor for stem in stems for key, tensor in lora_for(stem, (H, H)).items()}
    found = placed(state, model)
    assert (found.weights.base_model, found.unmatched) == ("Fake", ())
    actual = changes(found)
    assert_close(actual["trunk.0.mix.qkv.weight"], torch.cat([product(state, stem) for stem in stems[:3]]))
    assert_close(actual["trunk.0.mix.proj.weight"], product(state, stems[3]))
    with pytest.raises(IncompatibleAdapterError, match=r"not with .*Fake, or others"):
        models.layout_of(model)


def test_text_encoders() -> None:
    """Three key formats, on a transformers encoder with and without its wrapper, and on ComfyUI's pair."""
    layer = "encoder.layers.0.self_attn.q_proj"
    shape = (H, H)
    bare, wrapped = Skeleton({layer: shape}), Skeleton({f"text_model.{layer}": shape})
    comfy = Skeleton({f"{clip}.transformer.text_model.{layer}": shape for clip in ("clip_l", "clip_g")})
    for stem in (
        f"lora_te1_text_model_{under(layer)}",
        f"text_encoder.text_model.{layer}",
        f"text_encoders.clip_l.transformer.text_model.{layer}",
    ):
        weights = load_lora(lora_for(stem, shape))
        assert weights.components == ("te1",)
        for model in (bare, wrapped, comfy):
            (found,) = match_lora(weights, {"te1": targets_of(model, "te1")}).matches
            assert "clip_g" not in found.target.path
    second = load_lora(lora_for(f"lora_te2_text_model_{under(layer)}", shape))
    (found,) = match_lora(second, {"te2": targets_of(comfy, "te2")}).matches
    assert found.target.path.startswith("clip_g.")


# --- alpha -----------------------------------------------------------------------------------------------------------

STEM = "unet.conv_in"


def scale_of(state: Weights, metadata: Mapping[str, str] | None = None, source: Path | None = None) -> float:
    weights = load_lora(source or {**state, "__metadata__": dict(metadata or {})})  # type: ignore[dict-item]
    (module,) = weights.modules
    return module.weight.scale  # type: ignore[union-attr]


def header(**table: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps(table)}


def test_alpha_from_tensor_then_header_then_rank() -> None:
    pair = {f"{STEM}.lora_A.weight": noise(4, 4, 3, 3), f"{STEM}.lora_B.weight": noise(8, 4, 1, 1)}
    assert scale_of(pair) == 1.0
    assert scale_of(pair | {f"{STEM}.alpha": torch.tensor(2.0)}) == 0.5
    assert scale_of(pair | {f"{STEM}.alpha": torch.tensor(0.0)}) == 1.0, "kohya: alpha 0 is the rank"
    known = header(**{"unet.lora_alpha": 8, "unet.r": 4})
    assert scale_of(pair, known) == 2.0
    assert scale_of(pair | {f"{STEM}.alpha": torch.tensor(2.0)}, known) == 0.5, "the tensor wins"
    assert scale_of(pair, header(**{"unet.lora_alpha": 8, "unet.use_rslora": True})) == 8 / math.sqrt(4)
    assert scale_of(pair, header(**{"unet.lora_alpha": 8, "unet.alpha_pattern": {"conv_in": 1}})) == 0.25
    assert scale_of(pair, header(**{"unet.lora_alpha": "many"})) == 1.0
    assert scale_of(pair, {"lora_adapter_metadata": "{broken"}) == 1.0


def test_alpha_from_the_config_beside_a_peft_file(tmp_path: Path) -> None:
    state = {
        f"base_model.model.conv_in.{k}": noise(*s)
        for k, s in (("lora_A.weight", (4, 4, 3, 3)), ("lora_B.weight", (8, 4, 1, 1)))
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    assert scale_of({}, source=tmp_path / "adapter_model.safetensors") == 4.0


def test_ranks_are_read_per_module() -> None:
    unet = tiny_unet(SD15)
    table = targets_of(unet)
    state: Weights = {}
    for rank, path in ((1, "conv_in"), (5, "conv_out")):
        down, up = pair_of(table, path, rank)
        state |= suffixed(f"lora_unet_{path}", up, down, KOHYA) | {f"lora_unet_{path}.alpha": torch.tensor(1.0)}
    assert [m.weight.rank for m in load_lora(state).modules] == [1, 5]  # type: ignore[union-attr]
    assert [m.weight.scale for m in load_lora(state).modules] == [1.0, 0.2]  # type: ignore[union-attr]


# --- what does not fit -----------------------------------------------------------------------------------------------


def whole(model: nn.Module, prefix: str = "lora_unet_", only: str = "attn2.to_k") -> Weights:
    table = targets_of(model)
    state: Weights = {}
    for path in table.targets:
        if path.endswith(only):
            down, up = pair_of(table, path)
            state |= suffixed(prefix + under(path), up, down, KOHYA)
    return state


def test_a_lora_for_another_model_says_so_and_places_nothing() -> None:
    sdxl = whole(ldm("sdxl"))
    with pytest.raises(IncompatibleAdapterError, match=r"this is a LoRA for SDXL, the model is SD1\.5"):
        placed(sdxl, ldm("sd15"))
    with pytest.raises(IncompatibleAdapterError, match="Choose a LoRA for SDXL"):
        placed(whole(ldm("sd15")), ldm("sdxl"))
    with pytest.raises(IncompatibleAdapterError, match="LoRA for Flux"):
        placed(lora_for("lora_unet_double_blocks_0_img_attn_qkv", (3 * H, H)), ldm("sd15"))


def test_a_control_lora_is_told_from_a_wrong_one() -> None:
    """BFL's Canny and Depth LoRAs: bare names, biases, norms replaced, and an input layer twice as wide."""
    model = Skeleton({"img_in": (H, 4), **FLUX_ORIGINAL})
    state: Weights = {"double_blocks.0.img_attn.norm.query_norm.scale": noise(4)}
    for path, (rows, columns) in {"img_in": (H, 8), **FLUX_ORIGINAL}.items():
        state[f"{path}.lora_A.weight"] = noise(2, columns)
        state[f"{path}.lora_B.weight"] = noise(rows, 2)
        state[f"{path}.lora_B.bias"] = noise(rows)
    with pytest.raises(IncompatibleAdapterError, match=r"control LoRA \(Flux Canny or Depth\).*LoraLoader"):
        placed(state, model)


def test_one_wrong_shape_refuses_the_whole_file() -> None:
    unet = tiny_unet(SD15)
    state = whole(unet) | lora_for("lora_unet_time_embedding_linear_1", (7, 7))
    with pytest.raises(
        IncompatibleAdapterError, match=r"1 of 17 updates have other shapes, such as .*7×7, time_embedding"
    ):
        placed(state, unet)


def test_unmatched_modules_are_counted_with_the_nearest_name() -> None:
    unet = tiny_unet(SD15)
    found = placed(whole(unet) | lora_for("lora_unet_mid_block_attentions_0_proj_inn", (16, 16)), unet)
    assert len(found.matches) == 16
    (lost,) = found.unmatched
    assert lost.nearest == "mid_block_attentions_0_proj_in"
    assert "1 modules have no place" in found.summary()


def test_a_refusal_looks_for_one_similar_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up compares with every name of the model; for 2,000 modules of a foreign file that took a minute."""
    asked: list[str] = []

    def close(name: str, names: object, *_: object) -> list[str]:
        asked.append(name)
        return []

    monkeypatch.setattr(matching, "get_close_matches", close)
    strangers = [f"lora_unet_{'x' * 400}_{i}_to_q" for i in range(50)]
    foreign = {key: value for name in strangers for key, value in lora_for(name, (8, 8)).items()}
    with pytest.raises(IncompatibleAdapterError, match="50 of 50 modules have no place"):
        placed(foreign, tiny_unet(SD15))
    assert len(asked) == 1
    assert len(asked[0]) <= 200


def test_keys_of_nothing_known_are_listed() -> None:
    state = whole(tiny_unet(SD15)) | {"some.random.key": noise(1), "lora_unet_conv_in.alpha": torch.tensor(1.0)}
    assert load_lora(state).ignored == ("some.random.key", "lora_unet_conv_in (alpha)")


# --- OneTrainer's open names (OMI) -----------------------------------------------------------------------------------

CLIP_LAYERS = {"text_model.encoder.layers.0.mlp.fc1": (H, H), "text_projection": (H, H)}
T5_LAYERS = {"encoder.block.0.layer.0.SelfAttention.q": (H, H), "encoder.block.0.layer.1.DenseReluDense.wi_0": (MLP, H)}


def composite(*parts: tuple[str, Shapes]) -> Skeleton:
    """ComfyUI's text encoders in one module."""
    return Skeleton({f"{name}.transformer.{path}": shape for name, shapes in parts for path, shape in shapes.items()})


def test_open_names_of_an_sdxl_file_are_those_of_kohya() -> None:
    """UNet by LDM names, CLIP-L and CLIP-G under their own prefixes: every tensor where kohya's names put it."""
    unet = ldm("sdxl")
    clip = composite(("clip_l", CLIP_LAYERS), ("clip_g", CLIP_LAYERS))
    tables: dict[Any, TargetTable] = {"denoiser": targets_of(unet), **{c: targets_of(clip, c) for c in ("te1", "te2")}}
    block = "output_blocks.0.1.transformer_blocks.0.attn2.to_k"
    layers = {("denoiser", block): tables["denoiser"].targets[block].shape}
    layers |= {(te, path): shape for te in ("te1", "te2") for path, shape in CLIP_LAYERS.items()}
    opened, kohya = (
        {"denoiser": "unet.", "te1": "clip_l.", "te2": "clip_g."},
        {"denoiser": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_"},
    )
    for algorithm in ("LoRA", "DoRA out", "LoHa", "LoKr"):
        one: Weights = {"bundle_emb.tok.clip_l": noise(1, 8)}
        two: Weights = {}
        for seed, ((component, path), shape) in enumerate(layers.items()):
            tensors = MAKERS[algorithm](shape, 2, seed)
            one |= {f"{opened[component]}{path}.{key}": t for key, t in tensors.items()}
            two |= {f"{kohya[component]}{under(path)}.{key}": t for key, t in tensors.items()}
        first, second = (match_lora(load_lora(state), tables) for state in (one, two))
        assert len(first.matches) == len(second.matches) == 5
        assert first.weights.key_format == "OneTrainer (OMI)"
        for a, b in zip(first.matches, second.matches, strict=True):
            assert a.key == b.key
            assert a.update.tensors().keys() == b.update.tensors().keys()
            assert all(torch.equal(t, b.update.tensors()[key]) for key, t in a.update.tensors().items())
        assert [(item.name, "textual inversions" in item.why) for item in first.left_out] == [
            ("bundle_emb.tok.clip_l", True)
        ]


@pytest.mark.parametrize("family", ["Flux", "SD3"])
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_open_names_number_the_parts_of_fused_layers(family: str, naming: str) -> None:
    """``img_attn.qkv.1`` is diffusers' ``to_k``; the same places as diffusers' names have."""
    pairs = {
        "Flux": {
            **{f"double_blocks.0.img_attn.qkv.{i}": f"transformer_blocks.0.attn.to_{n}" for i, n in enumerate("qkv")},
            **{
                f"double_blocks.0.txt_attn.qkv.{i}": f"transformer_blocks.0.attn.add_{n}_proj"
                for i, n in enumerate("qkv")
            },
            **{f"single_blocks.0.linear1.{i}": f"single_transformer_blocks.0.attn.to_{n}" for i, n in enumerate("qkv")},
            "single_blocks.0.linear1.3": "single_transformer_blocks.0.proj_mlp",
            "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
            "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
            "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.net.0.proj",
        },
        "SD3": {
            **{
                f"joint_blocks.0.x_block.attn.qkv.{i}": f"transformer_blocks.0.attn.to_{n}" for i, n in enumerate("qkv")
            },
            **{
                f"joint_blocks.0.context_block.attn.qkv.{i}": f"transformer_blocks.0.attn.add_{n}_proj"
                for i, n in enumerate("qkv")
            },
            "joint_blocks.0.x_block.attn.proj": "transformer_blocks.0.attn.to_out.0",
        },
    }[family]
    sd3 = {
        "transformer_blocks.0.attn." + n: (H, H)
        for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
    }
    separate = FLUX_DIFFUSERS if family == "Flux" else sd3
    model = Skeleton({"Flux": FLUX_ORIGINAL, "SD3": SD3_ORIGINAL}[family] if naming == "original" else separate)
    opened: Weights = {}
    usual: Weights = {}
    for i, (name, diffusers) in enumerate(pairs.items()):
        module = lora_for("x", separate[diffusers], i)
        opened |= {key.replace("x.", f"transformer.{name}.", 1): t for key, t in module.items()}
        usual |= {key.replace("x.", f"transformer.{diffusers}.", 1): t for key, t in module.items()}
    first, second = placed(opened, model), placed(usual, model)
    assert not first.left_out
    assert len(first.matches) == len(pairs)
    one, two = changes(first), changes(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(delta, two[key]) for key, delta in one.items())


def test_t5_in_the_second_and_third_place() -> None:
    clip = composite(("clip_l", CLIP_LAYERS), ("t5xxl", T5_LAYERS))
    table: dict[Any, TargetTable] = {"te3": targets_of(clip, "te3")}
    for prefix in ("t5.", "lora_te2_", "lora_te3_", "text_encoder_2.", "text_encoders.t5xxl.transformer."):
        path = "encoder.block.0.layer.0.SelfAttention.q"
        stem = prefix + (path if prefix.endswith(".") else under(path))
        (found,) = match_lora(load_lora(lora_for(stem, (H, H))), table).matches
        assert found.target.path == f"t5xxl.transformer.{path}"


# --- what training wrapped around a model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "unet._orig_mod.", "module.unet.", "unet.module.",
        "base_model.model._orig_mod.", "_orig_mod.base_model.model.", "unet.base_model.model.", "base_model.model.unet.",
        "diffusion_model.", "model.diffusion_model.", "base_model.model.diffusion_model.", "diffusion_model._orig_mod.",
        "_fsdp_wrapped_module.unet.", "lora_unet__orig_mod_", "module.transformer._orig_mod.",
    ],
)  # fmt: skip
def test_wrappers_in_front_are_no_part_of_a_name(prefix: str) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    inside = "mid_block._orig_mod.attentions.0.transformer_blocks.0._orig_mod.attn2.to_q"
    unet = tiny_unet(SD15)
    for spelled in (path, inside):
        stem = prefix + (spelled if prefix.endswith(".") else under(spelled))
        found = placed(lora_for(stem, targets_of(unet).targets[path].shape), unet)
        assert [p.target.path for p in found.matches] == [path]


def test_a_bare_text_encoder_is_known_by_its_names() -> None:
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    for prefix in ("base_model.model.", "base_model.model.module.", ""):
        assert load_lora(lora_for(prefix + layer, (H, H))).components == ("te1",)


def test_comfyui_saves_embeddings_of_text_encoders() -> None:
    """LoraSave: ``text_encoders.`` before the model's own path; tables as factors or as whole differences."""
    layers: Shapes = {"text_model.encoder.layers.0.self_attn.q_proj": (H, H)}
    clip = composite(("clip_l", layers))
    inner: Any = clip.get_submodule("clip_l.transformer.text_model")
    inner.embeddings = nn.Module()
    inner.embeddings.token_embedding = nn.Embedding(20, H)
    inner.embeddings.position_embedding = nn.Embedding(7, H)
    table = targets_of(clip, "te1")
    stem = "text_encoders.clip_l.transformer.text_model.embeddings."
    state = lora_for(f"{stem}token_embedding", (20, H)) | {f"{stem}position_embedding.diff": noise(7, H)}
    found = match_lora(load_lora(state), {"te1": table})
    assert not found.left_out
    token, position = found.matches
    weight = noise(20, H, seed=5)
    assert_close(token.update.delta(weight), product(state, f"{stem}token_embedding"))
    assert_close(position.update.delta(noise(7, H)), state[f"{stem}position_embedding.diff"])
    embedding = inner.embeddings.token_embedding
    ids = torch.tensor([[3, 19]])
    y = embedding(ids)
    live = token.update.unfused(Layer(embedding), y)(ids, y, 0.5)
    assert_close(live, 0.5 * product(state, f"{stem}token_embedding")[ids])
    assert not trainable([t for t in table.targets.values() if t.is_embedding])


# --- GLoRA's two orders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(8, 8, 4), (8, 12, 4), (12, 8, 3), (4, 4, 2)])
def test_the_layer_tells_glora_s_order(old: bool, rows: int, columns: int, rank: int) -> None:
    new = {"a1": (columns, rank), "a2": (rank, columns), "b1": (rows, rank), "b2": (rank, columns)}
    tensors = {name: noise(*shape, seed=i) for i, (name, shape) in enumerate(new.items())}
    stored = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"} if old else {name: name for name in new}
    state = {f"lora_unet_x.{stored[name]}.weight": t for name, t in tensors.items()} | {
        "lora_unet_x.alpha": torch.tensor(2.0)
    }
    found = placed(state, Skeleton({"x": (rows, columns)}))
    weight = noise(rows, columns, seed=9)
    expected = (weight @ tensors["a1"] @ tensors["a2"] + tensors["b1"] @ tensors["b2"]) * 2 / rank
    assert_close(found.matches[0].update.delta(weight), expected)


# --- what is lost ----------------------------------------------------------------------------------------------------


def named(*counts: tuple[str, int]) -> list[tuple[Any, str]]:
    return [("denoiser", f"down_blocks_{i}_{kind}") for kind, n in counts for i in range(n)]


@pytest.mark.parametrize(
    ("there", "lost", "matters"),
    [
        (named(("attn1_to_q", 16)), [], None),
        (named(("attn1_to_q", 16)), [("denoiser", "time_embed_7")], None),
        (named(("attn1_to_q", 15)), [("denoiser", "time_embed_7")], "1 of 16"),
        (named(("attn1_to_q", 100)), named(("attn1_to_k", 1)), None),
        (named(("attn1_to_q", 100)), named(("attn1_to_k", 2)), "all 2 modules of the kind 'attn1_to_k'"),
        (named(("attn1_to_q", 100)), [("denoiser", f"down_blocks_{i}_attn1_to_q") for i in range(100, 106)], None),
        (
            named(("attn1_to_q", 100)),
            [("denoiser", f"down_blocks_{i}_attn1_to_q") for i in range(100, 107)],
            "7 of 107",
        ),
        (named(("attn1_to_q", 2)), [("te1", "encoder_layers_0_mlp_fc1")], None),
        (named(("attn1_to_q", 1)), named(("attn1_to_k", 5)), "5 of 6"),
        ([], [("denoiser", "x")], "1 of 1"),
    ],
)
def test_what_loss_matters(there: list[Any], lost: list[Any], matters: str | None) -> None:
    found = lost_part(there, lost, {"denoiser"})
    assert found is None if matters is None else found is not None and matters in found


def test_half_a_file_is_refused_or_allowed(caplog: pytest.LogCaptureFixture) -> None:
    unet = tiny_unet(SD15)
    state = whole(unet) | {key.replace("to_k", "to_kk"): t for key, t in whole(unet).items()}
    with pytest.raises(
        IncompatibleAdapterError, match=r"in part only: 16 of 32 modules of denoiser.*nearest name.*'allow'"
    ):
        placed(state, unet)
    caplog.clear()
    found = match_lora(load_lora(state, name="half"), {"denoiser": targets_of(unet)}, partial="allow")
    assert len(found.matches) == len(found.unmatched) == len(found.left_out) == 16
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'half': not applied: 16 × modules that the model does not have" in caplog.text
    with pytest.raises(InvalidInputError, match="partial is 'maybe'"):
        match_lora(load_lora(state), {"denoiser": targets_of(unet)}, partial="maybe")  # type: ignore[arg-type]


def test_layers_with_tensors_of_nothing_known_are_lost_too() -> None:
    unet = tiny_unet(SD15)
    keys = whole(unet, only="attn1.to_q")
    state = whole(unet) | {
        key.replace("lora_up.weight", "new_thing_a"): t for key, t in keys.items() if "lora_up" in key
    }
    with pytest.raises(IncompatibleAdapterError, match="16 of 32 modules of denoiser"):
        placed(state, unet)
    assert len(match_lora(load_lora(state), {"denoiser": targets_of(unet)}, partial="allow").matches) == 16


def test_other_shapes_are_left_out_where_that_is_allowed() -> None:
    unet = tiny_unet(SD15)
    state = whole(unet) | lora_for("lora_unet_time_embedding_linear_1", (7, 7))
    found = match_lora(load_lora(state), {"denoiser": targets_of(unet)}, partial="allow")
    assert len(found.matches) == 16
    assert [item.why for item in found.left_out] == ["modules of another shape than the model's layer"]


def test_files_that_lose_nothing_that_matters() -> None:
    """Text encoders without a CLIP, Flux files with both encoders, stray keys, layers that one variant has not."""
    unet = tiny_unet(SD15)
    text = {f"lora_te_text_model_encoder_layers_{i}_mlp_fc1": (8, 8) for i in range(12)}
    state = whole(unet)
    for stem, shape in text.items():
        state |= lora_for(stem, shape)
    found = match_lora(load_lora(state | {"epoch": noise(1)}), {"denoiser": targets_of(unet)}, ("te1",))
    assert len(found.matches) == 16
    assert len(found.left_out) == 13
    assert sum("first text encoder" in item.why for item in found.left_out) == 12
    assert not found.unmatched
    flux = lora_for("lora_unet_double_blocks_0_img_attn_qkv", (3 * H, H)) | lora_for(
        "lora_te1_text_model_encoder_layers_0_mlp_fc1", (H, H)
    )
    flux |= lora_for("lora_te2_encoder_block_0_layer_0_SelfAttention_q", (H, H))
    assert len(match_lora(load_lora(flux), {"denoiser": targets_of(Skeleton(FLUX_ORIGINAL))}).matches) == 1


def test_everything_left_out_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = Skeleton({f"blocks.{i}.to_q": (H, H) for i in range(20)})
    for i in range(20):
        cast(Any, model.get_submodule(f"blocks.{i}.to_q")).bias = None
    state: Weights = {"bundle_emb.x.t5": noise(1), "stray\u200bkey": noise(1), "blocks.0.to_q.hada_t1": noise(1)}
    state |= {
        "blocks.1.to_q.scalar": noise(1),
        "blocks.2.to_q.diff_b": noise(H),
        "blocks.3.to_q.on_input": torch.tensor(1),
    }
    for i in range(20):
        state |= lora_for(f"blocks.{i}.to_q", (H, H))
    found = placed(state, model)
    assert len(found.matches) == 20
    whys = {item.name: item.why for item in found.left_out}
    assert len(whys) == 6
    assert "LyCORIS scalars" in whys["blocks.1.to_q.scalar"]
    assert whys["blocks.2.to_q"] == "changes of a bias that the model's layer does not have"
    assert "no use for" in whys["blocks.0.to_q (hada_t1)"]
    assert len(caplog.records) == 1
    assert "\u200b" not in caplog.text


def test_files_that_are_no_lora() -> None:
    with pytest.raises(UnknownFormatError, match="has no LoRA in it"):
        load_lora({"model.diffusion_model.out.2.weight": noise(4, 4)})
    with pytest.raises(UnknownFormatError, match="no tensors"):
        load_lora({})
    with pytest.raises(UnknownFormatError, match="alphas but no weights"):
        load_lora({"lora_unet_conv_in.alpha": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_up.weight": None}, "no 'up' that belongs to it"),
        ({"lora_down.weight": None}, "no 'down' that belongs to it"),
        ({"lora_up.weight": noise(8, 3)}, "do not multiply"),
        ({"lora_up.weight": torch.full((8, 2), float("nan"))}, "NaN or infinite"),
        ({"lora_up.weight": torch.empty(0, 2)}, "is empty"),
        ({"alpha": torch.ones(3)}, "one number was expected"),
        ({"hada_w1_a": noise(3, 3)}, None),
    ],
)
def test_damaged_modules(change: dict[str, Tensor | None], message: str | None) -> None:
    state = {"lora_down.weight": noise(2, 8), "lora_up.weight": noise(8, 2)} | change
    file = {f"lora_unet_x.{key}": t for key, t in state.items() if t is not None}
    if message is None:
        assert load_lora(file).modules[0].weight.title == "LoRA"  # type: ignore[union-attr]
        return
    with pytest.raises(CorruptFileError, match=message):
        load_lora(file)


def test_inconsistent_factors_of_other_algorithms() -> None:
    broken: tuple[Weights, ...] = (
        {"hada_w1_a": noise(4, 2), "hada_w1_b": noise(3, 4), "hada_w2_a": noise(4, 2), "hada_w2_b": noise(2, 4)},
        {"lokr_w1": noise(2, 2), "lokr_w2_a": noise(2, 2)},
        {"a1.weight": noise(4, 2), "a2.weight": noise(3, 4), "b1.weight": noise(4, 2), "b2.weight": noise(5, 6)},
        {"oft_blocks": noise(2, 3, 4)},
    )
    for tensors in broken:
        with pytest.raises(CorruptFileError):
            load_lora({f"lora_unet_x.{key}": t for key, t in tensors.items()})


def test_a_header_alone_tells_modules_ranks_and_family(tmp_path: Path) -> None:
    save_file(whole(ldm("sdxl_small")), tmp_path / "x.safetensors", metadata={"ss_network_dim": "2"})
    found = describe_lora(tmp_path / "x.safetensors")
    assert found.base_model == "SDXL"
    assert found.metadata["ss_network_dim"] == "2"
    assert all(m.weight.rank == 2 and m.weight.down.is_meta for m in found.modules)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [SD15, SDXL])
def test_names_lead_to_one_place_each(kind: str) -> None:
    """No two layers share a name, so a module can never be placed on a wrong layer."""
    table = targets_of(tiny_unet(kind))
    assert all(len(places) == 1 for places in table.names.values())
    assert {places[0].path for places in table.names.values()} == set(table.targets)
