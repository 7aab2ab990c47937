"""AuraFlow (and Pony V7): double blocks with a stream of the picture and one of the text, then single ones."""

from __future__ import annotations

from .naming import Blocks, Naming, Row, Signs, layer
from .sites import BaseModel


def _attention(letters: str, diffusers: tuple[str, ...], words: str) -> tuple[Row, ...]:
    names = zip("qkvo", diffusers, ("q", "k", "v", "out"), strict=True)
    return tuple(layer(f"attn.{letters}{n}", f"attn.{other}", f"{words}attn {word}") for n, other, word in names)


def _mlp(name: str, diffusers: str, words: str) -> tuple[Row, ...]:
    pairs = (("c_fc1", "linear_1"), ("c_fc2", "linear_2"), ("c_proj", "out_projection"))
    return tuple(layer(f"{name}.{ours}", f"{diffusers}.{other}", words) for ours, other in pairs)


_PICTURE, _TEXT = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_DOUBLE = (
    *_attention("w2", _PICTURE, "img "),
    *_attention("w1", _TEXT, "txt "),
    *_mlp("mlpX", "ff", "img ff"),
    *_mlp("mlpC", "ff_context", "txt ff"),
    layer("modX.1", "norm1.linear", "img mod"),
    layer("modC.1", "norm1_context.linear", "txt mod"),
)
_SINGLE = (*_attention("w1", _PICTURE, ""), *_mlp("mlp", "ff", "ff"), layer("modCX.1", "norm1.linear", "mod"))
NAMES = Naming(
    "AuraFlow",
    original=Signs(("double_layers.0.attn.w1q",)),
    diffusers=Signs(("joint_transformer_blocks.0.attn.to_q",)),
    lists=(
        Blocks("double_layers", "joint_transformer_blocks", "double", _DOUBLE, counts=(4,)),
        Blocks("single_layers", "single_transformer_blocks", "single", _SINGLE, counts=(32,)),
    ),
    ends=(
        layer("t_embedder.mlp.0", "time_step_proj.linear_1", ""),
        layer("t_embedder.mlp.2", "time_step_proj.linear_2", ""),
        layer("cond_seq_linear", "context_embedder", "txt"),
        layer("init_x_linear", "pos_embed.proj", "img"),
        layer("final_linear", "proj_out", "proj"),
        layer("modF.1", "norm_out.linear", "mod", halves=True),
    ),
    widths=(3072,),
)
AURAFLOW = BaseModel(name="AuraFlow", naming=NAMES)
