"""LTX-Video: self-attention and cross-attention on videos. ComfyUI has the authors' names, which are nearly diffusers'."""

from __future__ import annotations

from .naming import Blocks, Naming, Signs, attention, layer
from .sites import BaseModel

_ATTENTION = {"projection": "to_{}", "out": "to_out.0", "norm": "{}_norm"}
_BLOCK = (
    *attention("attn1", "attn1", "attn1 self", **_ATTENTION),
    *attention("attn2", "attn2", "attn2 cross", **_ATTENTION),
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
