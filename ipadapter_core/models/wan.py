"""Wan 2.1 and 2.2 (also VACE), video models of self-attention and cross-attention."""

from __future__ import annotations

from torch import nn

from .grids import Patches
from .naming import Blocks, Naming, Signs, attention, layer
from .sites import BaseModel
from .streams import Streams

_ATTENTION = {"projection": "{}", "out": "o", "norm": "norm_{}"}

# diffusers' names: its converter of Wan's checkpoints
_BLOCK = (
    *attention("self_attn", "attn1", "attn1 self", **_ATTENTION),
    *attention("cross_attn", "attn2", "attn2 cross", **_ATTENTION),
    layer("cross_attn.k_img", "attn2.add_k_proj", "attn2 cross attn k"),
    layer("cross_attn.v_img", "attn2.add_v_proj", "attn2 cross attn v"),
    layer("cross_attn.norm_k_img", "attn2.norm_added_k", "attn2 cross attn"),
    layer("ffn.0", "ffn.net.0.proj", "ff"),
    layer("ffn.2", "ffn.net.2", "ff"),
    layer("norm3", "norm2", ""),
)
_VACE = (*_BLOCK, layer("before_proj", "proj_in", "proj"), layer("after_proj", "proj_out", "proj"))
_EMBED = "condition_embedder"
NAMES = Naming(
    "Wan",
    original=Signs(("blocks.0.self_attn.q", "blocks.0.cross_attn.q", "blocks.0.ffn.0")),
    diffusers=Signs(("blocks.0.attn1.to_q", "blocks.0.attn2.to_q", "blocks.0.ffn.net.2")),
    lists=(
        Blocks("blocks", "blocks", "block", _BLOCK, counts=(30, 40)),
        Blocks("vace_blocks", "vace_blocks", "vace", _VACE),
    ),
    ends=(
        layer("patch_embedding", "patch_embedding", "img"),
        layer("vace_patch_embedding", "vace_patch_embedding", "img"),
        layer("text_embedding.0", f"{_EMBED}.text_embedder.linear_1", "txt"),
        layer("text_embedding.2", f"{_EMBED}.text_embedder.linear_2", "txt"),
        layer("time_embedding.0", f"{_EMBED}.time_embedder.linear_1", ""),
        layer("time_embedding.2", f"{_EMBED}.time_embedder.linear_2", ""),
        layer("time_projection.1", f"{_EMBED}.time_proj", "mod"),
        layer("img_emb.proj.0", f"{_EMBED}.image_embedder.norm1", ""),
        layer("img_emb.proj.1", f"{_EMBED}.image_embedder.ff.net.0.proj", ""),
        layer("img_emb.proj.3", f"{_EMBED}.image_embedder.ff.net.2", ""),
        layer("img_emb.proj.4", f"{_EMBED}.image_embedder.norm2", ""),
        layer("head.head", "proj_out", "proj"),
    ),
    widths=(1536, 3072, 5120),
)
_STREAMS = Streams(
    tokens=Patches(),
    layers=(
        (r"(time_embedding|time_projection|text_embedding|img_emb|condition_embedder)\b", "text"),
        (r"(patch_embedding|head|proj_out)\b", "picture"),
        (r"blocks\.\d+\.(cross_attn\.[kv]|attn2\.to_[kv])$", "prompt"),
        (r"blocks\.\d+\.cross_attn\.([kv]_img|norm_k(_img)?)$", "text"),
        (r"blocks\.\d+\.attn2\.(add_[kv]_proj|norm_k|norm_added_k)$", "text"),
        (r"blocks\.\d+\.", "picture"),
    ),
)
_PARTS = frozenset(
    (
        *(
            "patch_embedding",
            "text_embedding",
            "time_embedding",
            "time_projection",
            "blocks",
            "head",
            "rope_embedder",
            "img_emb",
        ),
        *("rope", "condition_embedder", "norm_out", "proj_out"),
    )
)


def streams(model: nn.Module) -> Streams | None:
    """What the layers of Wan see; None for another model, also for its variants that add tokens of another kind."""
    names = {name for name, _ in model.named_children()}
    return _STREAMS if {"patch_embedding", "blocks"} <= names <= _PARTS else None


WAN = BaseModel(name="Wan", naming=NAMES, streams=streams)
