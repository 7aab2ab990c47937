"""SD3 and SD3.5, as diffusers and as its authors (and ComfyUI) build them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .layers import LayerNames, Link, Shapes, fused, linked_names, numbered_blocks, swapped
from .sites import BaseModel, ModelLayout, Site

BLOCKS = {"joint_blocks": "joint", "transformer_blocks": "joint"}
"""Words for the lists of blocks, the original's and diffusers'."""

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


# --- names of layers -------------------------------------------------------------------------------------------------

# original, diffusers (diffusers' convert_sd3_to_diffusers.py)
_BLOCK = (
    ("x_block.attn.proj", "attn.to_out.0"),
    ("x_block.attn2.proj", "attn2.to_out.0"),
    ("context_block.attn.proj", "attn.to_add_out"),
    ("x_block.adaLN_modulation.1", "norm1.linear"),
    ("context_block.adaLN_modulation.1", "norm1_context.linear"),
    ("x_block.mlp.fc1", "ff.net.0.proj"),
    ("x_block.mlp.fc2", "ff.net.2"),
    ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    ("context_block.mlp.fc2", "ff_context.net.2"),
)
_ENDS = (
    ("context_embedder", "context_embedder"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("x_embedder.proj", "pos_embed.proj"),
    ("final_layer.linear", "proj_out"),
)


def name_layers(model: nn.Module, shapes: Shapes) -> LayerNames | None:
    """Names of a SD3 transformer's layers; None for another model."""
    if hasattr(model, "joint_blocks") and "joint_blocks.0.x_block.attn.qkv" in shapes:
        is_original, blocks, width = True, "joint_blocks", shapes["joint_blocks.0.x_block.attn.qkv"][0] // 3
    elif "transformer_blocks.0.attn.add_q_proj" in shapes:
        is_original, blocks, width = False, "transformer_blocks", shapes["transformer_blocks.0.attn.to_q"][0]
    else:
        return None
    names, labels = linked_names(_links(len(getattr(model, blocks)), width), shapes, is_original=is_original)
    return LayerNames("SD3", names, labels, numbered_blocks(shapes, BLOCKS))


def _links(blocks: int, width: int) -> Iterator[Link]:
    for i in range(blocks):
        original, diffusers = f"joint_blocks.{i}", f"transformer_blocks.{i}"
        yield from fused(f"{original}.x_block.attn.qkv", f"{diffusers}.attn.to_{{}}", width)
        yield from fused(f"{original}.x_block.attn2.qkv", f"{diffusers}.attn2.to_{{}}", width)
        yield from fused(f"{original}.context_block.attn.qkv", f"{diffusers}.attn.add_{{}}_proj", width)
        for a, b in _BLOCK:
            if i == blocks - 1 and b == "norm1_context.linear":  # the last block has scale and shift only
                yield from swapped(f"{original}.{a}", f"{diffusers}.{b}", width)
            else:
                yield Link(f"{original}.{a}", f"{diffusers}.{b}")
    yield from (Link(a, b) for a, b in _ENDS)
    yield from swapped("final_layer.adaLN_modulation.1", "norm_out.linear", width)


SD3 = BaseModel(
    name="SD3",
    walk=walk_sd3,
    reference_width=2432,
    layers=name_layers,
    marks=re.compile(r"^joint_blocks_|_attn_(to_)?add_"),
    steps=28,
    guidance=5.0,
)
