"""LTX-Video: self-attention and cross-attention on videos. ComfyUI has the authors' names, which are nearly diffusers'."""

from __future__ import annotations

from .naming import Blocks, Naming, Row, Signs, layer
from .sites import BaseModel


def _attention(name: str, words: str) -> tuple[Row, ...]:
    return (
        *(layer(f"{name}.to_{n}", f"{name}.to_{n}", f"{words} attn {n}") for n in "qkv"),
        layer(f"{name}.to_out.0", f"{name}.to_out.0", f"{words} attn out"),
        *(layer(f"{name}.{n}_norm", f"{name}.norm_{n}", f"{words} attn") for n in "qk"),
    )


_BLOCK = (
    *_attention("attn1", "attn1 self"),
    *_attention("attn2", "attn2 cross"),
    layer("ff.net.0.proj", "ff.net.0.proj", "ff"),
    layer("ff.net.2", "ff.net.2", "ff"),
)
NAMES = Naming(
    "LTX-Video",
    original=Signs(("transformer_blocks.0.attn1.to_q", "patchify_proj")),
    diffusers=Signs(("transformer_blocks.0.attn1.to_q", "proj_in", "time_embed.linear")),
    lists=(Blocks("transformer_blocks", "transformer_blocks", "block", _BLOCK, counts=(28, 48)),),
    ends=(
        layer("patchify_proj", "proj_in", "img"),
        layer("adaln_single.emb.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_1", ""),
        layer("adaln_single.emb.timestep_embedder.linear_2", "time_embed.emb.timestep_embedder.linear_2", ""),
        layer("adaln_single.linear", "time_embed.linear", "mod"),
        layer("caption_projection.linear_1", "caption_projection.linear_1", "txt"),
        layer("caption_projection.linear_2", "caption_projection.linear_2", "txt"),
        layer("proj_out", "proj_out", "proj"),
    ),
    widths=(2048, 4096),
)
LTX_VIDEO = BaseModel(name="LTX-Video", naming=NAMES)
