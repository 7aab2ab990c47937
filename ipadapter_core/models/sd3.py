"""SD3 and SD3.5, as diffusers and as its authors (and ComfyUI) build them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .grids import Patches
from .naming import Blocks, Naming, Signs, fused, layer
from .sites import BaseModel, ModelLayout, Site
from .streams import Streams

# --- sites -----------------------------------------------------------------------------------------------------------


def walk_sd3(model: nn.Module) -> ModelLayout | None:
    """The layout of an SD3 or SD3.5 transformer; None for another model, also for a ControlNet of its blocks.

    Image prompts act in the attention of text and picture together. SD3.5 Medium's second one in its first blocks, of the
    picture with itself, is no site.
    """
    text = getattr(getattr(model, "context_embedder", None), "in_features", None)
    if not isinstance(text, int):
        return None
    sites = [
        Site(path, "joint", number, 0, number, _width(attention), _heads(attention))
        for number, (path, attention) in enumerate(_attentions(model))
    ]
    return ModelLayout(SD3, text, tuple(sites)) if sites else None


def _attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and attention of every block, where the picture's stream attends."""
    blocks: Any = getattr(model, "joint_blocks", ())
    if hasattr(model, "final_layer"):
        for i, block in enumerate(blocks):
            yield f"joint_blocks.{i}.x_block.attn", block.x_block.attn
    # Many transformers of diffusers have such blocks; this one alone embeds its picture's places by a table, and pooled text.
    pooled = getattr(getattr(model, "time_text_embed", None), "text_embedder", None)
    if hasattr(model, "pos_embed") and hasattr(model, "proj_out") and pooled is not None:
        blocks = getattr(model, "transformer_blocks", ())
        if not hasattr(model, "single_transformer_blocks") and all(hasattr(block, "norm1_context") for block in blocks):
            for i, block in enumerate(blocks):
                yield f"transformer_blocks.{i}.attn", block.attn


def _width(attention: Any) -> int:
    qkv = getattr(attention, "qkv", None)
    return int(attention.inner_dim if qkv is None else qkv.out_features // 3)


def _heads(attention: Any) -> int:
    return int(attention.num_heads if hasattr(attention, "qkv") else attention.heads)


# --- streams ---------------------------------------------------------------------------------------------------------

_STREAMS = Streams(
    tokens=Patches(),
    layers=(
        (r"[ty]_embedder\b|time_text_embed\b|.*\badaLN_modulation\b|.*\bnorm\w*\.linear$", "text"),
        (r"x_embedder\b|pos_embed\b|final_layer\b|proj_out\b", "picture"),
        (r"context_(embedder|processor)\b", "text"),
        (r"joint_blocks\.\d+\.x_block\b", "picture"),
        (r"joint_blocks\.\d+\.context_block\b", "text"),
        (r"transformer_blocks\.\d+\.(attn2|ff|attn\.(to_[qkv]|to_qkv|to_out|norm_[qk]))\b", "picture"),
        (r"transformer_blocks\.\d+\.(ff_context|attn\.(add|to_add|norm_added)_\w+)\b", "text"),
    ),
)
"""Every block has a stream of the picture and one of the text; SD3.5 Medium's second attentions are the picture's."""


def streams(model: nn.Module) -> Streams | None:
    """What the layers of a SD3 transformer see; None for another model."""
    return None if walk_sd3(model) is None else _STREAMS


# --- names of layers -------------------------------------------------------------------------------------------------

# diffusers' names: its convert_sd3_to_diffusers.py. The last block's text has shift and scale only, in the other order there.
_BLOCK = (
    fused("x_block.attn.qkv", "attn.to_{}", "img attn", "attn.to_qkv"),
    fused("x_block.attn2.qkv", "attn2.to_{}", "img attn attn2 self", "attn2.to_qkv"),
    fused("context_block.attn.qkv", "attn.add_{}_proj", "txt attn", "attn.to_added_qkv"),
    layer("x_block.attn.proj", "attn.to_out.0", "img attn out"),
    layer("x_block.attn2.proj", "attn2.to_out.0", "img attn attn2 self out"),
    layer("context_block.attn.proj", "attn.to_add_out", "txt attn out"),
    layer("x_block.attn.ln_q", "attn.norm_q", "img attn"),
    layer("x_block.attn.ln_k", "attn.norm_k", "img attn"),
    layer("x_block.attn2.ln_q", "attn2.norm_q", "img attn attn2 self"),
    layer("x_block.attn2.ln_k", "attn2.norm_k", "img attn attn2 self"),
    layer("context_block.attn.ln_q", "attn.norm_added_q", "txt attn"),
    layer("context_block.attn.ln_k", "attn.norm_added_k", "txt attn"),
    layer("x_block.adaLN_modulation.1", "norm1.linear", "img mod"),
    layer("context_block.adaLN_modulation.1", "norm1_context.linear", "txt mod", halves=True),
    layer("x_block.mlp.fc1", "ff.net.0.proj", "img ff"),
    layer("x_block.mlp.fc2", "ff.net.2", "img ff"),
    layer("context_block.mlp.fc1", "ff_context.net.0.proj", "txt ff"),
    layer("context_block.mlp.fc2", "ff_context.net.2", "txt ff"),
)
NAMES = Naming(
    "SD3",
    original=Signs(("joint_blocks.0.x_block.attn.qkv",)),
    diffusers=Signs(
        ("transformer_blocks.0.attn.add_q_proj",),
        (
            "single_transformer_blocks.0.attn.to_q",
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
            "transformer_blocks.0.img_mod.1",
            "context_embedder.proj_in",
        ),
    ),
    lists=(Blocks("joint_blocks", "transformer_blocks", "joint", _BLOCK, counts=(24, 38)),),
    ends=(
        layer("context_embedder", "context_embedder", "txt"),
        layer("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1", ""),
        layer("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2", ""),
        layer("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1", ""),
        layer("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2", ""),
        layer("x_embedder.proj", "pos_embed.proj", "img"),
        layer("final_layer.linear", "proj_out", "proj"),
        layer("final_layer.adaLN_modulation.1", "norm_out.linear", "mod", halves=True),
    ),
    widths=(1536, 2432),
)


SD3 = BaseModel(
    name="SD3",
    walk=walk_sd3,
    groups=("joint",),
    reference_width=2432,
    naming=NAMES,
    streams=streams,
    steps=28,
    guidance=5.0,
)
