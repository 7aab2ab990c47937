"""PixArt-Alpha and PixArt-Sigma: self-attention and cross-attention, keys and values of the text in one layer of the original."""

from __future__ import annotations

from .naming import Blocks, Naming, Signs, fused, layer
from .sites import BaseModel

_BLOCK = (
    fused("attn.qkv", "attn1.to_{}", "attn1 self attn"),
    layer("attn.proj", "attn1.to_out.0", "attn1 self attn out"),
    layer("cross_attn.q_linear", "attn2.to_q", "attn2 cross attn q"),
    fused("cross_attn.kv_linear", "attn2.to_{}", "attn2 cross attn", parts="kv"),
    layer("cross_attn.proj", "attn2.to_out.0", "attn2 cross attn out"),
    layer("mlp.fc1", "ff.net.0.proj", "ff"),
    layer("mlp.fc2", "ff.net.2", "ff"),
)
NAMES = Naming(
    "PixArt",
    original=Signs(("blocks.0.attn.qkv", "blocks.0.cross_attn.kv_linear")),
    diffusers=Signs(("transformer_blocks.0.attn1.to_q", "adaln_single.linear", "pos_embed.proj")),
    lists=(Blocks("blocks", "transformer_blocks", "block", _BLOCK, counts=(28,)),),
    ends=(
        layer("x_embedder.proj", "pos_embed.proj", "img"),
        layer("y_embedder.y_proj.fc1", "caption_projection.linear_1", "txt"),
        layer("y_embedder.y_proj.fc2", "caption_projection.linear_2", "txt"),
        *(
            layer(f"{name}.mlp.{2 * i - 2}", f"adaln_single.emb.{other}.linear_{i}", "")
            for name, other in (
                ("t_embedder", "timestep_embedder"),
                ("csize_embedder", "resolution_embedder"),
                ("ar_embedder", "aspect_ratio_embedder"),
            )
            for i in (1, 2)
        ),
        layer("t_block.1", "adaln_single.linear", "mod"),
        layer("final_layer.linear", "proj_out", "proj"),
    ),
    widths=(1152,),
)
PIXART = BaseModel(name="PixArt", naming=NAMES)
