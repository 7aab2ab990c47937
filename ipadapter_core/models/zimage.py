"""Z-Image (Turbo, Base, Edit): one stream of picture and text, and refiners of each before it."""

from __future__ import annotations

from .naming import Blocks, Naming, Row, Signs, fused, layer
from .sites import BaseModel


def _block(*, modulated: bool) -> tuple[Row, ...]:
    rows = (
        fused("attention.qkv", "attention.to_{}", "attn", "attention.to_qkv", ratio=3),
        layer("attention.out", "attention.to_out.0", "attn out"),
        layer("attention.q_norm", "attention.norm_q", "attn"),
        layer("attention.k_norm", "attention.norm_k", "attn"),
        *(layer(name, name, "ff") for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")),
        *(layer(name, name, "") for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")),
    )
    return (*rows, layer("adaLN_modulation.0", "adaLN_modulation.0", "mod")) if modulated else rows


# diffusers' names: its converter of Z-Image's checkpoints. 2-1 is the size of patches in space and time.
NAMES = Naming(
    "Z-Image",
    original=Signs(("layers.0.attention.qkv",), ("layers.0.adaLN_modulation.1",)),
    diffusers=Signs(("layers.0.attention.to_q",)),
    lists=(
        Blocks("layers", "layers", "layers", _block(modulated=True), counts=(30,)),
        Blocks("noise_refiner", "noise_refiner", "noise_refiner", _block(modulated=True), "img", counts=(2,)),
        Blocks("context_refiner", "context_refiner", "context_refiner", _block(modulated=False), "txt", counts=(2,)),
        Blocks("siglip_refiner", "siglip_refiner", "siglip_refiner", _block(modulated=False), counts=(2,)),
    ),
    ends=(
        layer("x_embedder", "all_x_embedder.2-1", "img"),
        *(layer(name, name, "txt") for name in ("cap_embedder.0", "cap_embedder.1")),
        *(layer(name, name, "") for name in ("siglip_embedder.0", "siglip_embedder.1")),
        *(layer(name, name, "") for name in ("t_embedder.mlp.0", "t_embedder.mlp.2")),
        layer("final_layer.linear", "all_final_layer.2-1.linear", "proj"),
        layer("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1", "mod"),
    ),
    widths=(3840,),
)
ZIMAGE = BaseModel(name="Z-Image", naming=NAMES)
