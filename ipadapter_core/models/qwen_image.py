"""Qwen-Image and Qwen-Image-Edit: blocks with a stream of the picture and one of the text. ComfyUI has diffusers' names."""

from __future__ import annotations

from torch import nn

from .grids import Patches
from .naming import Blocks, Naming, Signs, layer
from .sites import BaseModel
from .streams import Streams

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
_STREAMS = Streams(
    tokens=Patches(),
    layers=(
        (r"time_text_embed\b|norm_out\b|.*\.(img|txt)_mod\b", "text"),
        (r"img_in\b|proj_out\b", "picture"),
        (r"txt_(in|norm)\b", "text"),
        (r"transformer_blocks\.\d+\.(img_mlp|attn\.(to_[qkv]|to_qkv|to_out|norm_[qk]))\b", "picture"),
        (r"transformer_blocks\.\d+\.(txt_mlp|attn\.(add|to_add|norm_added)_\w+)\b", "text"),
    ),
    again=True,
)


def streams(model: nn.Module) -> Streams | None:
    """What the layers of Qwen-Image see; None for another model. Pictures to edit follow the picture's own tokens."""
    blocks = getattr(model, "transformer_blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks) or not hasattr(model, "txt_in"):
        return None
    return _STREAMS if hasattr(blocks[0], "img_mod") and hasattr(model, "time_text_embed") else None


QWEN_IMAGE = BaseModel(name="Qwen-Image", naming=NAMES, streams=streams, negative="apart")
