"""Flux, as diffusers and as its authors (and ComfyUI) build it. Image prompts do not act in it yet; LoRAs do."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from .layers import LayerNames, Link, Names, Place, Rows, Shapes, fused, linked_names, numbered_blocks, swapped
from .sites import BaseModel

BLOCKS = {
    "double_blocks": "double",
    "transformer_blocks": "double",
    "single_blocks": "single",
    "single_transformer_blocks": "single",
}
"""Words for the lists of blocks, the original's and diffusers'."""

# original, diffusers (diffusers' convert_flux_to_diffusers.py)
_DOUBLE = (
    ("img_attn.proj", "attn.to_out.0"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("img_mod.lin", "norm1.linear"),
    ("txt_mod.lin", "norm1_context.linear"),
    ("img_mlp.0", "ff.net.0.proj"),
    ("img_mlp.2", "ff.net.2"),
    ("txt_mlp.0", "ff_context.net.0.proj"),
    ("txt_mlp.2", "ff_context.net.2"),
)
_ENDS = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
)
_XLABS = (
    ("qkv_lora1", "img_attn_qkv"),
    ("proj_lora1", "img_attn_proj"),
    ("qkv_lora2", "txt_attn_qkv"),
    ("proj_lora2", "txt_attn_proj"),
)
"""XLabs' processors of double blocks and the layers that they stand beside (x-flux, layers.py)."""


def name_layers(model: nn.Module, shapes: Shapes) -> LayerNames | None:
    """Names of a Flux transformer's layers; None for another model."""
    if hasattr(model, "double_blocks") and "double_blocks.0.img_attn.qkv" in shapes:
        is_original, width = True, shapes["double_blocks.0.img_attn.qkv"][0] // 3
        double, single = len(getattr(model, "double_blocks", ())), len(getattr(model, "single_blocks", ()))
        mlp = shapes["single_blocks.0.linear1"][0] - 3 * width if single else 0
    elif hasattr(model, "single_transformer_blocks") and "transformer_blocks.0.attn.to_q" in shapes:
        is_original, width = False, shapes["transformer_blocks.0.attn.to_q"][0]
        double, single = (len(getattr(model, name)) for name in ("transformer_blocks", "single_transformer_blocks"))
        mlp = shapes["single_transformer_blocks.0.proj_mlp"][0] if single else 0
    else:
        return None
    names, labels = linked_names(_links(double, single, width, mlp), shapes, is_original=is_original)
    if "img_in" in names:
        names["img_in_proj"] = names["img_in"]  # the open model initiative's name
    names |= _xlabs_names(names, width)
    return LayerNames("Flux", names, labels, numbered_blocks(shapes, BLOCKS))


def _links(double: int, single: int, width: int, mlp: int) -> Iterator[Link]:
    for i in range(double):
        original, diffusers = f"double_blocks.{i}", f"transformer_blocks.{i}"
        yield from fused(f"{original}.img_attn.qkv", f"{diffusers}.attn.to_{{}}", width)
        yield from fused(f"{original}.txt_attn.qkv", f"{diffusers}.attn.add_{{}}_proj", width)
        yield from (Link(f"{original}.{a}", f"{diffusers}.{b}") for a, b in _DOUBLE)
    for i in range(single):
        original, diffusers = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        yield from fused(f"{original}.linear1", f"{diffusers}.attn.to_{{}}", width)
        yield Link(f"{original}.linear1", f"{diffusers}.proj_mlp", (3 * width, 0, mlp), f"{original}.linear1.3")
        yield Link(f"{original}.linear2", f"{diffusers}.proj_out")
        yield Link(f"{original}.modulation.lin", f"{diffusers}.norm.linear")
    yield from (Link(a, b) for a, b in _ENDS)
    yield from swapped("final_layer.adaLN_modulation.1", "norm_out.linear", width)


def _xlabs_names(names: Names, width: int) -> Names:
    """Names by processor. A single block's ``qkv`` acts on the part of ``linear1`` that is no MLP, its ``proj`` on ``linear2``."""
    found: Names = {}
    for name, places in names.items():
        block = re.fullmatch(r"((?:double|single)_blocks_\d+)_(.*)", name)
        if block is None:
            continue
        stem, layer = f"{block[1]}_processor_", block[2]
        found |= {stem + theirs: places for theirs, ours in _XLABS if layer == ours}
        if layer == "linear2":
            found[stem + "proj"] = places
        if layer == "linear1":
            found[stem + "qkv"] = found[f"{name}_qkv"] = tuple(
                Place(place.path, place.rows or Rows(0, 0, 3 * width))
                for place in places
                if place.rows is None or place.rows.source < 3 * width
            )
    return found


FLUX = BaseModel(
    name="Flux",
    layers=name_layers,
    marks=re.compile(r"^(double_blocks|single_blocks|single_transformer_blocks)_"),
)
