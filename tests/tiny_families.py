"""Transformers of newer families, tiny, in the original's form as weights and in diffusers' as a model, by diffusers' own converters."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils as convert
from torch import Tensor, nn

from tiny_models import noise

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

C = 24
"""Width of every model, and rows of its attentions."""


class Tree(nn.Module):
    """Layers by their paths, with weights: a model's names and numbers without its forward."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, bias: bool = False) -> None:
        super().__init__()
        for path, shape in shapes.items():
            owner: nn.Module = self
            *parts, last = path.split(".")
            for part in parts:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(last, _layer(shape, bias=bias))
        for path, parameter in self.named_parameters():
            parameter.data = noise(*parameter.shape, seed=sum(path.encode())) * 0.3 + (parameter.ndim == 1)


def _layer(shape: tuple[int, ...], *, bias: bool) -> nn.Module:
    if len(shape) == 5:
        return nn.Conv3d(shape[1], shape[0], (shape[2], shape[3], shape[4]), bias=bias)
    if len(shape) == 4:
        return nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), bias=bias)
    return nn.Linear(shape[1], shape[0], bias=bias) if len(shape) == 2 else nn.RMSNorm(shape[0])


@dataclass(frozen=True)
class Tiny:
    """One family. ``layers`` are those of the original with a weight, ``others`` its parameters beside them.

    ``to_diffusers`` makes a state dict of the original one of diffusers' model, ``call`` runs that model.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: Shapes
    call: Callable[[Any], Tensor]
    to_diffusers: Callable[[Weights], Weights]
    others: Weights = field(default_factory=dict[str, Tensor])

    def original(self) -> Tree:
        """The original's layers."""
        return Tree(self.layers)

    def model(self, original: nn.Module) -> nn.Module:
        """diffusers' model with the weights of the original; biases are zero."""
        state = {key: tensor.detach().clone() for key, tensor in original.state_dict().items()} | dict(self.others)
        converted = self.to_diffusers(state)
        torch.manual_seed(0)
        model = self.build().eval()
        own = model.state_dict()
        assert converted.keys() <= own.keys(), converted.keys() - own.keys()
        assert all(key.endswith(".bias") for key in own.keys() - converted.keys()), own.keys() - converted.keys()
        model.load_state_dict({key: converted.get(key, torch.zeros_like(tensor)) for key, tensor in own.items()})
        return model

    def run(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.call(model)


def each(count: int, prefix: str, rows: Shapes) -> Shapes:
    return {f"{prefix}.{i}.{name}": shape for i in range(count) for name, shape in rows.items()}


def at_width(converter: Callable[..., Weights], sizes: Mapping[int, int] | None = None) -> Callable[[Weights], Weights]:
    """A converter in which sizes of the published model are numbers, for the tiny one."""
    small = FunctionType(_with(converter.__code__, sizes or {3072: C}), converter.__globals__)
    return lambda state: small(state)


def _with(code: CodeType, sizes: Mapping[int, int]) -> CodeType:
    constants = tuple(
        _with(value, sizes) if isinstance(value, CodeType) else sizes.get(value, value) if type(value) is int else value
        for value in code.co_consts
    )
    return code.replace(co_consts=constants)


def with_biases(state: Weights, wanted: Callable[[str], bool]) -> Weights:
    """Zeros for the biases that a converter wants."""
    biases = {
        key.removesuffix("weight") + "bias": tensor.new_zeros(tensor.shape[0])
        for key, tensor in state.items()
        if key.endswith(".weight") and tensor.ndim == 2 and wanted(key)
    }
    return state | biases


def scales(state: Weights) -> Weights:
    """The authors' name for the weight of a norm."""
    norms = (".query_norm.", ".key_norm.", "layer.norms.")
    return {k.removesuffix("weight") + "scale" if any(n in k for n in norms) else k: v for k, v in state.items()}


# --- relatives of FLUX -----------------------------------------------------------------------------------------------


def double(mlp_in: int, mlp_out: int) -> Shapes:
    streams = ("img", "txt")
    return {
        **{f"{s}_attn.qkv": (3 * C, C) for s in streams},
        **{f"{s}_attn.proj": (C, C) for s in streams},
        **{f"{s}_attn.norm.{n}_norm": (C // 2,) for s in streams for n in ("query", "key")},
        **{f"{s}_mlp.0": (mlp_in, C) for s in streams},
        **{f"{s}_mlp.2": (C, mlp_out) for s in streams},
    }


def single(mlp_in: int, mlp_out: int) -> Shapes:
    return {
        "linear1": (3 * C + mlp_in, C),
        "linear2": (C, C + mlp_out),
        **{f"norm.{n}_norm": (C // 2,) for n in ("query", "key")},
    }


def _embedder(name: str, columns: int) -> Shapes:
    return {f"{name}.in_layer": (C, columns), f"{name}.out_layer": (C, C)}


HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": C // 2, "joint_attention_dim": 12}


def _packed(**more: Any) -> Callable[[Any], Tensor]:
    def call(model: Any) -> Tensor:
        ids = torch.zeros(16, 4)
        ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
        wide = model.config.axes_dims_rope
        kept = {name: value for name, value in more.items() if value is not None}
        return model(
            hidden_states=noise(1, 16, 8),
            encoder_hidden_states=noise(1, 5, 12, seed=1),
            timestep=torch.tensor([0.5]),
            img_ids=ids[:, : len(wide)],
            txt_ids=torch.zeros(5, len(wide)),
            return_dict=False,
            **kept,
        )[0]

    return call


FLUX = Tiny(
    "Flux",
    lambda: diffusers.FluxTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, pooled_projection_dim=8, guidance_embeds=True,
        axes_dims_rope=(4, 4, 4), **HEADS,
    ),
    {
        "img_in": (C, 8), "txt_in": (C, 12), **_embedder("time_in", 256), **_embedder("vector_in", 8),
        **_embedder("guidance_in", 256),
        **each(2, "double_blocks", double(4 * C, 4 * C) | {f"{s}_mod.lin": (6 * C, C) for s in ("img", "txt")}),
        **each(2, "single_blocks", single(4 * C, 4 * C) | {"modulation.lin": (3 * C, C)}),
        "final_layer.linear": (8, C), "final_layer.adaLN_modulation.1": (2 * C, C),
    },
    _packed(pooled_projections=noise(1, 8, seed=2), guidance=torch.tensor([3.5])),
    lambda state: at_width(convert.convert_flux_transformer_checkpoint_to_diffusers)(
        with_biases(scales(state), lambda key: True)
    ),
)  # fmt: skip
CHROMA = Tiny(
    "Chroma",
    lambda: diffusers.ChromaTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, axes_dims_rope=(4, 4, 4), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=2, **HEADS,
    ),
    {
        "img_in": (C, 8), "txt_in": (C, 12), "distilled_guidance_layer.in_proj": (16, 8),
        "distilled_guidance_layer.out_proj": (C, 16),
        **each(2, "distilled_guidance_layer.layers", {"in_layer": (16, 16), "out_layer": (16, 16)}),
        **{f"distilled_guidance_layer.norms.{i}": (16,) for i in range(2)},
        **each(2, "double_blocks", double(4 * C, 4 * C)), **each(2, "single_blocks", single(4 * C, 4 * C)),
        "final_layer.linear": (8, C),
    },
    _packed(attention_mask=None),
    lambda state: at_width(convert.convert_chroma_transformer_checkpoint_to_diffusers)(
        with_biases(scales(state), lambda key: True)
    ),
)  # fmt: skip
FLUX2 = Tiny(
    "Flux.2",
    lambda: diffusers.Flux2Transformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 4, 4), **HEADS
    ),
    {
        "img_in": (C, 8), "txt_in": (C, 12), **_embedder("time_in", 8), **_embedder("guidance_in", 8),
        **each(2, "double_blocks", double(6 * C, 3 * C)), **each(2, "single_blocks", single(6 * C, 3 * C)),
        "double_stream_modulation_img.lin": (6 * C, C), "double_stream_modulation_txt.lin": (6 * C, C),
        "single_stream_modulation.lin": (3 * C, C), "final_layer.linear": (8, C),
        "final_layer.adaLN_modulation.1": (2 * C, C),
    },
    _packed(guidance=torch.tensor([3.5])),
    lambda state: convert.convert_flux2_transformer_checkpoint_to_diffusers(scales(state)),
)  # fmt: skip

# --- others ----------------------------------------------------------------------------------------------------------

_Z_BLOCK: Shapes = {
    "attention.qkv": (3 * C, C), "attention.out": (C, C), "attention.q_norm": (C // 2,), "attention.k_norm": (C // 2,),
    "feed_forward.w1": (64, C), "feed_forward.w2": (C, 64), "feed_forward.w3": (64, C),
    **dict.fromkeys(("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"), (C,)),
}  # fmt: skip
_Z_MODULATED: Shapes = _Z_BLOCK | {"adaLN_modulation.0": (4 * C, C)}


def _call_zimage(model: Any) -> Tensor:
    return torch.stack(model([noise(4, 1, 8, 8)], torch.tensor([0.5]), [noise(5, 16, seed=1)], return_dict=False)[0])


ZIMAGE = Tiny(
    "Z-Image",
    lambda: diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=C, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 4],
        axes_lens=[64, 64, 64],
    ),
    {
        "x_embedder": (C, 16), "cap_embedder.0": (16,), "cap_embedder.1": (C, 16), "t_embedder.mlp.0": (1024, 256),
        "t_embedder.mlp.2": (C, 1024), **each(2, "layers", _Z_MODULATED), **each(1, "noise_refiner", _Z_MODULATED),
        **each(1, "context_refiner", _Z_BLOCK), "final_layer.linear": (16, C), "final_layer.adaLN_modulation.1": (C, C),
    },
    _call_zimage,
    convert.convert_z_image_transformer_checkpoint_to_diffusers,
    {"x_pad_token": noise(1, C), "cap_pad_token": noise(1, C)},
)  # fmt: skip

_Q_BLOCK: Shapes = {
    **{f"attn.{n}": (C, C) for n in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
    **{f"attn.add_{n}_proj": (C, C) for n in "qkv"},
    **{f"attn.norm_{n}": (C // 2,) for n in ("q", "k", "added_q", "added_k")},
    **{f"{s}_mod.1": (6 * C, C) for s in ("img", "txt")},
    **{f"{s}_mlp.net.0.proj": (4 * C, C) for s in ("img", "txt")},
    **{f"{s}_mlp.net.2": (C, 4 * C) for s in ("img", "txt")},
}


def _call_qwen(model: Any) -> Tensor:
    lengths = (
        {"txt_seq_lens": [5]} if "txt_seq_lens" in inspect.signature(model.forward).parameters else {}
    )  # until 0.37
    return model(
        hidden_states=noise(1, 16, 8),
        encoder_hidden_states=noise(1, 5, 12, seed=1),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 4, 4)]],
        **lengths,
        return_dict=False,
    )[0]


QWEN_IMAGE = Tiny(
    "Qwen-Image",
    lambda: diffusers.QwenImageTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=2, axes_dims_rope=(4, 4, 4), **HEADS
    ),
    {
        "img_in": (C, 8), "txt_in": (C, 12), "txt_norm": (12,), "time_text_embed.timestep_embedder.linear_1": (C, 256),
        "time_text_embed.timestep_embedder.linear_2": (C, C), **each(2, "transformer_blocks", _Q_BLOCK),
        "norm_out.linear": (2 * C, C), "proj_out": (8, C),
    },
    _call_qwen,
    lambda state: state,
)  # fmt: skip

_W_BLOCK: Shapes = {
    **{f"{a}_attn.{n}": (C, C) for a in ("self", "cross") for n in "qkvo"},
    **{f"{a}_attn.norm_{n}": (C,) for a in ("self", "cross") for n in "qk"},
    "cross_attn.k_img": (C, C), "cross_attn.v_img": (C, C), "cross_attn.norm_k_img": (C,), "norm3": (C,),
    "ffn.0": (16, C), "ffn.2": (C, 16),
}  # fmt: skip


def _call_wan(model: Any) -> Tensor:
    return model(
        hidden_states=noise(1, 4, 2, 8, 8),
        timestep=torch.tensor([500]),
        encoder_hidden_states=noise(1, 5, 8, seed=1),
        encoder_hidden_states_image=noise(1, 3, 8, seed=2),
        return_dict=False,
    )[0]


WAN = Tiny(
    "Wan",
    lambda: diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=C // 2, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=16,
        num_layers=2, image_dim=8, added_kv_proj_dim=C,
    ),
    {
        "patch_embedding": (C, 4, 1, 2, 2), "text_embedding.0": (C, 8), "text_embedding.2": (C, C),
        "time_embedding.0": (C, 8), "time_embedding.2": (C, C), "time_projection.1": (6 * C, C),
        "img_emb.proj.0": (8,), "img_emb.proj.1": (8, 8), "img_emb.proj.3": (C, 8), "img_emb.proj.4": (C,),
        **each(2, "blocks", _W_BLOCK), "head.head": (16, C),
    },
    _call_wan,
    convert.convert_wan_transformer_to_diffusers,
    {"head.modulation": noise(1, 2, C), **{f"blocks.{i}.modulation": noise(1, 6, C, seed=i) for i in range(2)}},
)  # fmt: skip

_A_BLOCK: Shapes = {
    **{f"self_attn.{n}_proj": (C, C) for n in ("q", "k", "v", "output")},
    "cross_attn.q_proj": (C, C), "cross_attn.k_proj": (C, 8), "cross_attn.v_proj": (C, 8), "cross_attn.output_proj": (C, C),
    **{f"{a}_attn.{n}_norm": (C // 2,) for a in ("self", "cross") for n in "qk"},
    "mlp.layer1": (4 * C, C), "mlp.layer2": (C, 4 * C),
    **{f"adaln_modulation_{a}.1": (4, C) for a in ("self_attn", "cross_attn", "mlp")},
    **{f"adaln_modulation_{a}.2": (3 * C, 4) for a in ("self_attn", "cross_attn", "mlp")},
}  # fmt: skip


def _call_anima(model: Any) -> Tensor:
    return model(
        hidden_states=noise(1, 4, 1, 8, 8),
        timestep=torch.tensor([0.5]),
        encoder_hidden_states=noise(1, 5, 8, seed=1),
        return_dict=False,
    )[0]


ANIMA = Tiny(
    "Anima",
    lambda: diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=C // 2, num_layers=2, text_embed_dim=8,
        adaln_lora_dim=4, concat_padding_mask=False, extra_pos_embed_type=None, max_size=(2, 16, 16),
    ),
    {
        "x_embedder.proj.1": (C, 16), "t_embedder.1.linear_1": (C, C), "t_embedder.1.linear_2": (3 * C, C),
        "t_embedding_norm": (C,), **each(2, "blocks", _A_BLOCK), "final_layer.linear": (16, C),
        "final_layer.adaln_modulation.1": (4, C), "final_layer.adaln_modulation.2": (2 * C, 4),
    },
    _call_anima,
    convert.convert_cosmos_transformer_checkpoint_to_diffusers,
)  # fmt: skip

# --- tables of others ------------------------------------------------------------------------------------------------

_AUTHORS = (
    ("_attn.qkv.", "_attn_qkv."), ("_attn.proj.", "_attn_proj."), ("_attn.norm.query_norm.", "_attn_q_norm."),
    ("_attn.norm.key_norm.", "_attn_k_norm."), ("mlp.0.", "mlp.fc1."), ("mlp.2.", "mlp.fc2."), ("_mod.lin.", "_mod.linear."),
    ("modulation.lin.", "modulation.linear."), (".norm.query_norm.", ".q_norm."), (".norm.key_norm.", ".k_norm."),
    ("time_in.in_layer", "time_in.mlp.0"), ("time_in.out_layer", "time_in.mlp.2"), ("guidance_in.in_layer", "guidance_in.mlp.0"),
    ("guidance_in.out_layer", "guidance_in.mlp.2"), ("t_embedder.in_layer", "t_embedder.mlp.0"),
    ("t_embedder.out_layer", "t_embedder.mlp.2"), ("c_embedder.in_layer", "c_embedder.linear_1"),
    ("c_embedder.out_layer", "c_embedder.linear_2"),
)  # fmt: skip
"""ComfyUI's names of HunyuanVideo's layers and the authors', which the converter reads."""


def _hunyuan(state: Weights) -> Weights:
    found: Weights = {}
    for key, tensor in state.items():
        for ours, theirs in _AUTHORS:
            key = key.replace(ours, theirs)
        found[key] = tensor
    return at_width(convert.convert_hunyuan_video_transformer_to_diffusers)(found)


def _call_hunyuan(model: Any) -> Tensor:
    return model(
        hidden_states=noise(1, 4, 1, 8, 8),
        timestep=torch.tensor([500]),
        encoder_hidden_states=noise(1, 5, 8, seed=1),
        encoder_attention_mask=torch.ones(1, 5),
        pooled_projections=noise(1, 8, seed=2),
        guidance=torch.tensor([1000.0]),
        return_dict=False,
    )[0]


_REFINER: Shapes = {
    "self_attn.qkv": (3 * C, C), "self_attn.proj": (C, C), "mlp.0": (4 * C, C), "mlp.2": (C, 4 * C), "adaLN_modulation.1": (2 * C, C),
    "norm1": (C,), "norm2": (C,),
}  # fmt: skip
HUNYUAN_VIDEO = Tiny(
    "HunyuanVideo",
    lambda: diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=C // 2, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
    ),
    {
        "img_in.proj": (C, 4, 1, 2, 2), **_embedder("time_in", 256), **_embedder("vector_in", 8), **_embedder("guidance_in", 256),
        "txt_in.input_embedder": (C, 8), **_embedder("txt_in.t_embedder", 256), **_embedder("txt_in.c_embedder", 8),
        **each(1, "txt_in.individual_token_refiner.blocks", _REFINER),
        **each(2, "double_blocks", double(4 * C, 4 * C) | {f"{s}_mod.lin": (6 * C, C) for s in ("img", "txt")}),
        **each(2, "single_blocks", single(4 * C, 4 * C) | {"modulation.lin": (3 * C, C)}),
        "final_layer.linear": (16, C), "final_layer.adaLN_modulation.1": (2 * C, C),
    },
    _call_hunyuan,
    _hunyuan,
)  # fmt: skip

_L_BLOCK: Shapes = {
    "attention.qkv": (5 * C // 3, C), "attention.out": (C, C), "attention.q_norm": (8,), "attention.k_norm": (8,),
    "feed_forward.w1": (256, C), "feed_forward.w2": (C, 256), "feed_forward.w3": (256, C),
    **dict.fromkeys(("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"), (C,)),
}  # fmt: skip
_L_MODULATED: Shapes = _L_BLOCK | {"adaLN_modulation.1": (4 * C, C)}


def _call_lumina(model: Any) -> Tensor:
    return model(
        hidden_states=noise(1, 4, 8, 8),
        timestep=torch.tensor([0.5]),
        encoder_hidden_states=noise(1, 5, 8, seed=1),
        encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool),
        return_dict=False,
    )[0]


LUMINA2 = Tiny(
    "Lumina 2",
    lambda: diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=C, num_layers=2, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1,
        cap_feat_dim=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
    ),
    {
        "x_embedder": (C, 16), "cap_embedder.0": (8,), "cap_embedder.1": (C, 8), "t_embedder.mlp.0": (C, 256),
        "t_embedder.mlp.2": (C, C), **each(2, "layers", _L_MODULATED), **each(1, "noise_refiner", _L_MODULATED),
        **each(1, "context_refiner", _L_BLOCK), "final_layer.linear": (16, C), "final_layer.adaLN_modulation.1": (C, C),
    },
    _call_lumina,
    at_width(convert.convert_lumina2_to_diffusers, {2304: C, 768: C // 3}),
)  # fmt: skip


def _krea_block(width: int, keys: int, hidden: int) -> Shapes:
    return {
        "attn.wq": (width, width), "attn.wk": (keys, width), "attn.wv": (keys, width), "attn.wo": (width, width),
        "attn.gate": (width, width), "mlp.gate": (hidden, width), "mlp.up": (hidden, width), "mlp.down": (width, hidden),
    }  # fmt: skip


def _call_krea(model: Any) -> Tensor:
    places = torch.zeros(21, 3)
    places[5:, 1], places[5:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return model(noise(1, 16, 8), noise(1, 5, 2, 8, seed=1), torch.tensor([0.5]), places, return_dict=False)[0]


def _norms(name: str, width: int, head: int) -> Weights:
    return {
        f"{name}.prenorm.scale": 1 + noise(width) / 9, f"{name}.postnorm.scale": 1 + noise(width) / 9,
        f"{name}.attn.qknorm.qnorm.scale": 1 + noise(head) / 9, f"{name}.attn.qknorm.knorm.scale": 1 + noise(head) / 9,
    }  # fmt: skip


KREA2 = Tiny(
    "Krea 2",
    lambda: diffusers.Krea2Transformer2DModel(
        in_channels=8, num_layers=2, attention_head_dim=C // 2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
        timestep_embed_dim=8, text_hidden_dim=8, num_text_layers=2, text_num_attention_heads=1, text_num_key_value_heads=1,
        text_intermediate_size=8, axes_dims_rope=(4, 4, 4),
    ),
    {
        "first": (C, 8), "tmlp.0": (C, 8), "tmlp.2": (C, C), "tproj.1": (6 * C, C), "txtmlp.1": (C, 8), "txtmlp.3": (C, C),
        "txtfusion.projector": (1, 2), **each(2, "blocks", _krea_block(C, C // 2, 16)),
        **each(2, "txtfusion.layerwise_blocks", _krea_block(8, 8, 8)), **each(2, "txtfusion.refiner_blocks", _krea_block(8, 8, 8)),
        "last.linear": (8, C),
    },
    _call_krea,
    lambda state: convert.convert_krea2_transformer_checkpoint_to_diffusers(state),
    {
        "txtmlp.0.scale": 1 + noise(8) / 9, "last.norm.scale": 1 + noise(C) / 9, "last.modulation.lin": noise(2, C),
        **{f"blocks.{i}.mod.lin": noise(6 * C, seed=i) for i in range(2)},
        **{key: t for i in range(2) for key, t in _norms(f"blocks.{i}", C, C // 2).items()},
        **{
            key: t for part in ("layerwise", "refiner") for i in range(2)
            for key, t in _norms(f"txtfusion.{part}_blocks.{i}", 8, 8).items()
        },
    },
)  # fmt: skip

_AURA_MLP: Shapes = {"c_fc1": (256, C), "c_fc2": (256, C), "c_proj": (C, 256)}
AURAFLOW = Tiny(
    "AuraFlow",
    lambda: diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=C // 2,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=C, pos_embed_max_size=16,
    ),
    {
        "t_embedder.mlp.0": (C, 256), "t_embedder.mlp.2": (C, C), "cond_seq_linear": (C, 8), "init_x_linear": (C, 16),
        **each(2, "double_layers", {
            **{f"attn.w{i}{n}": (C, C) for i in (1, 2) for n in "qkvo"}, "modX.1": (6 * C, C), "modC.1": (6 * C, C),
            **{f"mlp{s}.{name}": shape for s in "XC" for name, shape in _AURA_MLP.items()},
        }),
        **each(2, "single_layers", {
            **{f"attn.w1{n}": (C, C) for n in "qkvo"}, "modCX.1": (6 * C, C),
            **{f"mlp.{name}": shape for name, shape in _AURA_MLP.items()},
        }),
        "final_linear": (16, C), "modF.1": (2 * C, C),
    },
    lambda model: model(noise(1, 4, 8, 8), noise(1, 5, 8, seed=1), torch.tensor([0.5]), return_dict=False)[0],
    lambda state: convert.convert_auraflow_transformer_checkpoint_to_diffusers(
        with_biases(state, lambda key: key.startswith(("t_embedder", "init_x")))
    ),
    {"positional_encoding": noise(1, 16, C), "register_tokens": noise(1, 8, C)},
)  # fmt: skip

_PIXART = (
    ("y_embedder.y_proj.fc", "caption_projection.linear_"), ("t_block.1", "adaln_single.linear"),
    ("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"), ("x_embedder", "pos_embed"),
    ("final_layer.linear", "proj_out"), ("final_layer.scale", "scale"), ("cross_attn.proj", "attn2.to_out.0"),
    ("cross_attn.q_linear", "attn2.to_q"), ("attn.proj", "attn1.to_out.0"), ("mlp.fc1", "ff.net.0.proj"), ("mlp.fc2", "ff.net.2"),
)  # fmt: skip


def _pixart(state: Weights) -> Weights:
    """As diffusers' script of PixArt's conversion does it, which is no part of the package."""
    found: Weights = {}
    for key, tensor in state.items():
        key = f"transformer_{key}" if key.startswith("blocks") else key
        for name, other, parts in (("cross_attn.kv_linear", "attn2", "kv"), ("attn.qkv", "attn1", "qkv")):
            if name in key:
                rows = tensor.chunk(len(parts))
                found |= {key.replace(name, f"{other}.to_{part}"): t for part, t in zip(parts, rows, strict=True)}
                break
        else:
            for ours, theirs in _PIXART:
                key = key.replace(ours, theirs)
            found[key] = tensor
    return found


PIXART = Tiny(
    "PixArt",
    lambda: diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=C // 2, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=C,
        sample_size=8, caption_channels=8, use_additional_conditions=False,
    ),
    {
        "x_embedder.proj": (C, 4, 2, 2), "t_embedder.mlp.0": (C, 256), "t_embedder.mlp.2": (C, C), "t_block.1": (6 * C, C),
        "y_embedder.y_proj.fc1": (C, 8), "y_embedder.y_proj.fc2": (C, C), "final_layer.linear": (32, C),
        **each(2, "blocks", {
            "attn.qkv": (3 * C, C), "attn.proj": (C, C), "cross_attn.q_linear": (C, C), "cross_attn.kv_linear": (2 * C, C),
            "cross_attn.proj": (C, C), "mlp.fc1": (4 * C, C), "mlp.fc2": (C, 4 * C),
        }),
    },
    lambda model: model(
        noise(1, 4, 8, 8), noise(1, 5, 8, seed=1), torch.tensor([500]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
    )[0],
    _pixart,
    {"final_layer.scale_shift_table": noise(2, C), **{f"blocks.{i}.scale_shift_table": noise(6, C, seed=i) for i in range(2)}},
)  # fmt: skip

LTX_VIDEO = Tiny(
    "LTX-Video",
    lambda: diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=C // 2, cross_attention_dim=C, num_layers=2,
        caption_channels=8,
    ),
    {
        "patchify_proj": (C, 4), "adaln_single.emb.timestep_embedder.linear_1": (C, 256),
        "adaln_single.emb.timestep_embedder.linear_2": (C, C), "adaln_single.linear": (6 * C, C),
        "caption_projection.linear_1": (C, 8), "caption_projection.linear_2": (C, C), "proj_out": (4, C),
        **each(2, "transformer_blocks", {
            **{f"attn{i}.{n}": (C, C) for i in (1, 2) for n in ("to_q", "to_k", "to_v", "to_out.0")},
            **{f"attn{i}.{n}_norm": (C,) for i in (1, 2) for n in "qk"}, "ff.net.0.proj": (4 * C, C), "ff.net.2": (C, 4 * C),
        }),
    },
    lambda model: model(
        noise(1, 16, 4), noise(1, 5, 8, seed=1), torch.tensor([500]), torch.ones(1, 5), 1, 4, 4, return_dict=False
    )[0],
    convert.convert_ltx_transformer_checkpoint_to_diffusers,
    {"scale_shift_table": noise(2, C), **{f"transformer_blocks.{i}.scale_shift_table": noise(6, C, seed=i) for i in range(2)}},
)  # fmt: skip

KREA = (KREA2,) if hasattr(diffusers, "Krea2Transformer2DModel") else ()
"""Not in the oldest diffusers that is served."""
OTHERS = (HUNYUAN_VIDEO, LUMINA2, *KREA, AURAFLOW, PIXART, LTX_VIDEO)
FAMILIES = {tiny.name: tiny for tiny in (FLUX, CHROMA, FLUX2, ZIMAGE, QWEN_IMAGE, WAN, ANIMA, *OTHERS)}
