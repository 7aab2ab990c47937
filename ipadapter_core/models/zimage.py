"""Z-Image (Turbo, Base, Edit): one stream of picture and text, and refiners of each before it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .grids import Patches
from .naming import Blocks, Naming, Row, Signs, fused, layer
from .sites import BaseModel
from .streams import Streams


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
        Blocks("noise_refiner", "noise_refiner", "noise_refiner", _block(modulated=True), "img"),
        Blocks("context_refiner", "context_refiner", "context_refiner", _block(modulated=False), "txt"),
        Blocks("siglip_refiner", "siglip_refiner", "siglip_refiner", _block(modulated=False)),
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
_VECTORS = r"(t_embedder|clip_text_pooled_proj|time_text_embed)\b|.*\badaLN_modulation\b"
_ORIGINAL = Streams(
    tokens=Patches(),
    layers=(
        (_VECTORS, "text"),
        (r"(cap_embedder|context_refiner)\b", "text"),
        (r"x_embedder\b", "picture"),
        (r"(noise_refiner|layers|final_layer)\b", "picture last"),
    ),
    again=True,
)
_DIFFUSERS = Streams(
    tokens=Patches(),
    layers=(
        (_VECTORS, "text"),
        (r"cap_embedder\b", "texts"),
        (r"context_refiner\b", "text"),
        (r"(all_x_embedder|noise_refiner|layers|all_final_layer)\b", "picture"),
    ),
)
"""The original puts the text in front of the picture, diffusers behind it."""


def streams(model: nn.Module) -> Streams | None:
    """What the layers of Z-Image see, and of Lumina 2 as ComfyUI builds it; None for another model."""
    if not all(hasattr(model, name) for name in ("noise_refiner", "context_refiner", "cap_embedder", "layers")):
        return None
    if hasattr(model, "all_x_embedder"):
        return _DIFFUSERS
    return replace(_ORIGINAL, multiple=int(getattr(model, "pad_tokens_multiple", None) or 1))


ZIMAGE = BaseModel(name="Z-Image", naming=NAMES, streams=streams, clock="signal")
