"""Lumina 2: the blocks that Z-Image took up, with fewer keys and values than queries."""

from __future__ import annotations

from .naming import Blocks, Naming, Row, Signs, fused, layer
from .sites import BaseModel


def _block(*, modulated: bool) -> tuple[Row, ...]:
    norm = "norm1.norm" if modulated else "norm1"
    rows = (
        fused("attention.qkv", "attn.to_{}", "attn", ratio=5 / 3),
        layer("attention.out", "attn.to_out.0", "attn out"),
        layer("attention.q_norm", "attn.norm_q", "attn"),
        layer("attention.k_norm", "attn.norm_k", "attn"),
        *(layer(f"feed_forward.w{i}", f"feed_forward.linear_{i}", "ff") for i in (1, 2, 3)),
        layer("attention_norm1", norm, ""),
        layer("attention_norm2", "norm2", ""),
        layer("ffn_norm1", "ffn_norm1", ""),
        layer("ffn_norm2", "ffn_norm2", ""),
    )
    return (*rows, layer("adaLN_modulation.1", "norm1.linear", "mod")) if modulated else rows


_EMBED = "time_caption_embed"
NAMES = Naming(
    "Lumina 2",
    original=Signs(("layers.0.attention.qkv", "layers.0.adaLN_modulation.1")),
    diffusers=Signs(("layers.0.attn.to_q", "noise_refiner.0.attn.to_q")),
    lists=(
        Blocks("layers", "layers", "layers", _block(modulated=True), counts=(26,)),
        Blocks("noise_refiner", "noise_refiner", "noise_refiner", _block(modulated=True), "img"),
        Blocks("context_refiner", "context_refiner", "context_refiner", _block(modulated=False), "txt"),
    ),
    ends=(
        layer("x_embedder", "x_embedder", "img"),
        *(layer(f"cap_embedder.{i}", f"{_EMBED}.caption_embedder.{i}", "txt") for i in (0, 1)),
        layer("t_embedder.mlp.0", f"{_EMBED}.timestep_embedder.linear_1", ""),
        layer("t_embedder.mlp.2", f"{_EMBED}.timestep_embedder.linear_2", ""),
        layer("final_layer.adaLN_modulation.1", "norm_out.linear_1", "mod"),
        layer("final_layer.linear", "norm_out.linear_2", "proj"),
    ),
    widths=(2304,),
)
LUMINA2 = BaseModel(name="Lumina 2", naming=NAMES)
