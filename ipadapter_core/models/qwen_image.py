"""Qwen-Image and Qwen-Image-Edit: blocks with a stream of the picture and one of the text. ComfyUI has diffusers' names."""

from __future__ import annotations

from .naming import Blocks, Naming, Signs, layer
from .sites import BaseModel

_BLOCK = tuple(
    layer(name, name, words)
    for name, words in (
        *((f"attn.to_{n}", f"img attn {n}") for n in "qkv"),
        *((f"attn.add_{n}_proj", f"txt attn {n}") for n in "qkv"),
        ("attn.to_out.0", "img attn out"),
        ("attn.to_add_out", "txt attn out"),
        ("attn.norm_q", "img attn"),
        ("attn.norm_k", "img attn"),
        ("attn.norm_added_q", "txt attn"),
        ("attn.norm_added_k", "txt attn"),
        ("img_mod.1", "img mod"),
        ("txt_mod.1", "txt mod"),
        ("img_mlp.net.0.proj", "img ff"),
        ("img_mlp.net.2", "img ff"),
        ("txt_mlp.net.0.proj", "txt ff"),
        ("txt_mlp.net.2", "txt ff"),
    )
)
_SIGNS = Signs(("transformer_blocks.0.attn.to_q", "transformer_blocks.0.img_mod.1"))
NAMES = Naming(
    "Qwen-Image",
    original=_SIGNS,
    diffusers=_SIGNS,
    lists=(Blocks("transformer_blocks", "transformer_blocks", "block", _BLOCK, counts=(60,)),),
    ends=tuple(
        layer(name, name, words)
        for name, words in (
            ("img_in", "img"),
            ("txt_in", "txt"),
            ("txt_norm", "txt"),
            ("time_text_embed.timestep_embedder.linear_1", ""),
            ("time_text_embed.timestep_embedder.linear_2", ""),
            ("time_text_embed.addition_t_embedding", ""),
            ("norm_out.linear", "mod"),
            ("proj_out", "proj"),
        )
    ),
    widths=(3072,),
)
QWEN_IMAGE = BaseModel(name="Qwen-Image", naming=NAMES)
