"""Krea 2: one stream of text and picture, gated attention, and blocks that fuse the text encoder's layers before it."""

from __future__ import annotations

from .naming import Blocks, Naming, Signs, layer
from .sites import BaseModel

_BLOCK = (
    *(layer(f"attn.w{n}", f"attn.to_{n}", f"attn {n}") for n in "qkv"),
    layer("attn.wo", "attn.to_out.0", "attn out"),
    layer("attn.gate", "attn.to_gate", "attn"),
    *(layer(f"mlp.{n}", f"ff.{n}", "ff") for n in ("gate", "up", "down")),
)
NAMES = Naming(
    "Krea 2",
    original=Signs(("blocks.0.attn.wq", "blocks.0.attn.gate")),
    diffusers=Signs(("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_gate")),
    lists=(
        Blocks("blocks", "transformer_blocks", "block", _BLOCK, counts=(28,)),
        *(
            Blocks(f"txtfusion.{part}_blocks", f"text_fusion.{part}_blocks", part, _BLOCK, "txt")
            for part in ("layerwise", "refiner")
        ),
    ),
    ends=(
        layer("first", "img_in", "img"),
        layer("tmlp.0", "time_embed.linear_1", ""),
        layer("tmlp.2", "time_embed.linear_2", ""),
        layer("tproj.1", "time_mod_proj", "mod"),
        layer("txtmlp.1", "txt_in.linear_1", "txt"),
        layer("txtmlp.3", "txt_in.linear_2", "txt"),
        layer("txtfusion.projector", "text_fusion.projector", "txt"),
        layer("last.linear", "final_layer.linear", "proj"),
    ),
    widths=(6144,),
)
KREA2 = BaseModel(name="Krea 2", naming=NAMES)
