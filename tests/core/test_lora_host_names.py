"""ComfyUI's own map of names as a second source: rows, functions of rows, parameters of no layer, names that prefixes tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core.backends.comfy import lora as backend
from ipadapter_core.backends.comfy.lora_names import encoders_of
from ipadapter_core.errors import CorruptFileError, IncompatibleAdapterError, InvalidInputError
from ipadapter_core.lora import load_lora
from ipadapter_core.lora.losses import kind_of
from ipadapter_core.lora.names import canonical
from ipadapter_core.lora.patch import LoRAPatch, choose_mode
from tiny_models import noise


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.last = nn.Linear(4, 8, bias=False)
        self.norm = nn.RMSNorm(4)
        self.gate = nn.Parameter(torch.ones(6))


class Novel(nn.Module):
    """A model that no table of ours knows."""

    def __init__(self) -> None:
        super().__init__()
        self.things = nn.ModuleList(Block() for _ in range(2))
        self.img_in = nn.Linear(4, 4)
        self.token = nn.Parameter(torch.zeros(1, 4))


class Host:
    """As much of a MODEL as placing asks for."""

    def __init__(self, model: nn.Module) -> None:
        self.unet = model

    def get_model_object(self, name: str) -> nn.Module:
        assert name == "diffusion_model"
        return self.unet


def swapped(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])


BLOCK = "diffusion_model.things.0"
NAMES: dict[str, Any] = {
    "transformer.blocks.0.to_k": (f"{BLOCK}.qkv.weight", (0, 4, 4)),
    "transformer.norm_out": (f"{BLOCK}.last.weight", None, swapped),
    "diffusion_model.token": "diffusion_model.token",
    f"{BLOCK}.gate": f"{BLOCK}.gate",
    f"{BLOCK}.qkv.bias": f"{BLOCK}.qkv.bias",
    "diffusion_model.same": f"{BLOCK}.qkv.weight",
    "transformer.same": "diffusion_model.things.1.qkv.weight",
    "transformer.beyond": ("diffusion_model.things.1.last.weight", (0, 6, 4)),
    "transformer.within": ("diffusion_model.things.1.last.weight", (0, 0, 4)),
    "transformer.sums": (f"{BLOCK}.last.weight", None, lambda rows: rows + 1),
    "transformer.columns": (f"{BLOCK}.last.weight", (1, 0, 2)),
    "lora_unet_things_0_qkv": f"{BLOCK}.qkv.weight",
}


@pytest.fixture(scope="module")
def host() -> Any:
    torch.manual_seed(0)
    return Host(Novel())


def place(host: Any, tensors: Mapping[str, Tensor], **more: Any) -> Any:
    return backend.place(load_lora(dict(tensors)), host, names=NAMES, **more)


def change(host: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a LoRA changes of every weight."""
    parameters, found = dict(host.unet.named_parameters()), dict[str, list[Any]]()
    for match in place(host, tensors).matches:
        found.setdefault(match.key, []).append((match, 1.0))
    return {key: backend.merge_parts(parameters[key], parts).detach() for key, parts in found.items()}


def pair(name: str, rows: int, columns: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    up, down = noise(rows, 2, seed=1), noise(2, columns, seed=2)
    return {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}, up @ down


def test_rows_of_a_fused_layer(host: Any) -> None:
    tensors, delta = pair("transformer.blocks.0.to_k", 4)
    (found,) = change(host, tensors).values()
    assert_close(found[4:8], delta)
    assert not found[:4].any()
    assert not found[8:].any()


def test_a_function_that_moves_rows(host: Any) -> None:
    tensors, delta = pair("transformer.norm_out", 8)
    (found,) = change(host, tensors).values()
    assert_close(found, swapped(delta))


def test_parameters_of_no_layer_and_single_biases(host: Any) -> None:
    token, gate, bias = noise(1, 4), noise(6), noise(12)
    tensors = {"diffusion_model.token.diff": token, f"{BLOCK}.gate.diff": gate, f"{BLOCK}.qkv.bias.diff": bias}
    found = change(host, tensors)
    assert_close(found, {"token": token, "things.0.gate": gate, "things.0.qkv.bias": bias})
    patch = LoRAPatch(place(host, tensors))
    assert choose_mode([patch]).mode == "merged"
    with pytest.raises(
        InvalidInputError, match=r"changes things.0.gate, which is no layer that a side path could stand beside"
    ):
        choose_mode([patch], "live")
    beside = patch.beside_layers()
    assert [match.key for match in beside.matched.matches] == ["things.0.qkv.bias"]
    assert choose_mode([beside], "live").mode == "live"
    assert "only the merged mode can do" in beside.matched.report()[-1]


def test_a_low_rank_change_of_a_vector(host: Any) -> None:
    tensors, delta = pair(f"{BLOCK}.gate", 6, 1)
    assert_close(change(host, tensors), {"things.0.gate": delta.flatten()})


def test_two_prefixes_of_one_name(host: Any) -> None:
    for prefix, key in (("diffusion_model", "things.0.qkv.weight"), ("transformer", "things.1.qkv.weight")):
        tensors, delta = pair(f"{prefix}.same", 12)
        assert_close(change(host, tensors), {key: delta})


@pytest.mark.parametrize("name", ["beyond", "within", "sums", "columns"])
def test_what_our_places_cannot_say_has_none(host: Any, name: str) -> None:
    """Rows beyond the last show that all of that layer's ranges are another model's."""
    with pytest.raises(IncompatibleAdapterError, match="no place in the model"):
        change(host, pair(f"transformer.{name}", 4)[0])


def test_more_rows_than_the_name_has_are_no_fit(host: Any) -> None:
    with pytest.raises(IncompatibleAdapterError, match="other shapes"):
        change(host, pair("transformer.blocks.0.to_k", 6)[0])


def test_rms_norms_are_merged_in_comfyui(host: Any) -> None:
    """Its models hand their weights to kernels without a call of the layer."""
    patch = LoRAPatch(place(host, {"diffusion_model.things.1.norm.w_norm": noise(4)}))
    assert patch.needs_merged is not None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([4, 2**40], "but its reshape_weight says 4×1099511627776"),
        ([0, 8], "no shape of a weight"),
        ([4, 8, 1, 1, 1, 1], "no shape of a weight"),
        ([4.0, 8.0], "no shape of a weight"),
        ([8], "says 8; the file is damaged"),
    ],
)
def test_damaged_shapes(sizes: list[int], message: str) -> None:
    tensors = pair("diffusion_model.img_in", 4, 8)[0] | {"diffusion_model.img_in.reshape_weight": torch.tensor(sizes)}
    with pytest.raises(CorruptFileError, match=message):
        load_lora(tensors)


def test_more_inputs(host: Any) -> None:
    tensors, delta = pair("diffusion_model.img_in", 4, 12)
    shaped = tensors | {"diffusion_model.img_in.reshape_weight": torch.tensor([4, 12])}
    assert_close(change(host, shaped), {"img_in.weight": delta})
    patch = LoRAPatch(place(host, shaped))
    assert choose_mode([patch]).reason == "it gives img_in more inputs than the model was built with"
    assert "takes 12 inputs instead of 4" in patch.matched.report()[0]
    with pytest.raises(IncompatibleAdapterError, match="is for 4×12"):
        place(host, tensors)
    wide = pair("diffusion_model.img_in", 4, 68)[0] | {"diffusion_model.img_in.reshape_weight": torch.tensor([4, 68])}
    with pytest.raises(IncompatibleAdapterError, match="is for 4×68"):
        place(host, wide)


def test_text_encoders_of_any_name() -> None:
    for names, parts in (
        (("clip_l", "clip_g", "t5xxl"), ("te1", "te2", "te3")),
        (("clip_g",), ("te1",)),
        (("qwen3_4b",), ("te1",)),
        (("clip_l", "llama"), ("te1", "te2")),
        (("clip_l", "clip_g", "t5xxl", "llama"), ("te1", "te2", "te3", "te3")),
    ):
        holder = nn.Module()
        for name in names:
            inner = nn.Module()
            inner.add_module("transformer", nn.Linear(2, 2))
            holder.add_module(name, inner)
        assert tuple(encoders_of(holder).values()) == parts
    assert canonical("text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj") == (
        "te1",
        "qwen3_4b_transformer_model_layers_0_mlp_up_proj",
    )
    assert canonical("lora_unet__blocks_0_cross_attn_k") == ("denoiser", "blocks_0_cross_attn_k")
    assert canonical("lora_prior_unet_down_blocks_0_1") == ("denoiser", "down_blocks_0_1")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("layers_3_attention_to_q", "attention_to_q"),
        ("noise_refiner_0_attention_to_q", "attention_to_q"),
        ("context_refiner_1_feed_forward_w1", "feed_forward_w1"),
        ("blocks_12_cross_attn_k", "cross_attn_k"),
        ("double_blocks_0_img_attn_qkv", "img_attn_qkv"),
        ("single_transformer_blocks_37_attn_to_q", "attn_to_q"),
        ("transformer_blocks_3_ff_net_0_proj", "ff_net_0_proj"),
        ("joint_blocks_3_x_block_attn_qkv", "x_block_attn_qkv"),
        ("visual_transformer_blocks_0_cross_attention_key", "cross_attention_key"),
        ("txt_in_individual_token_refiner_blocks_0_mlp_0", "mlp_0"),
        ("img_in", None),
        ("final_layer_linear", None),
    ],
)
def test_kinds_of_layers(name: str, kind: str | None) -> None:
    """By which the loss of a whole kind is seen."""
    assert kind_of(name) == kind


def test_a_kind_that_is_lost_is_named(host: Any) -> None:
    tensors: dict[str, Tensor] = {}
    for i in range(40):
        tensors |= pair(f"diffusion_model.same{i}", 12)[0]
    names = NAMES | {f"diffusion_model.same{i}": f"{BLOCK}.qkv.weight" for i in range(40)}
    tensors |= pair("diffusion_model.noise_refiner.0.novel", 4)[0] | pair("diffusion_model.noise_refiner.1.novel", 4)[0]
    with pytest.raises(IncompatibleAdapterError, match="all 2 modules of the kind 'novel' of denoiser have no place"):
        backend.place(load_lora(tensors), host, names=names)
    allowed = backend.place(load_lora(tensors), host, partial="allow", names=names)
    assert len(allowed.matches) == 40
    assert "2 × modules that the model does not have" in allowed.report()[0]
