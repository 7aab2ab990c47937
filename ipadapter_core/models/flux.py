"""FLUX.1 (dev, schnell, Krea, Kontext, Fill), as diffusers and as its authors (and ComfyUI) build it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from typing import Any

from torch import nn

from ..errors import IncompatibleAdapterError
from .layers import LayerNames, Link, Names, Place, Rows, Shapes, fused, linked_names, numbered_blocks, swapped
from .sites import BaseModel, ModelLayout, Site

BLOCKS = {
    "double_blocks": "double",
    "transformer_blocks": "double",
    "single_blocks": "single",
    "single_transformer_blocks": "single",
}
"""Words for the lists of blocks, the original's and diffusers'."""

# --- sites -----------------------------------------------------------------------------------------------------------


def walk_flux(model: nn.Module) -> ModelLayout | None:
    """The layout of a FLUX.1 transformer; None for another model, also for those that share blocks with it.

    FLUX.1 alone reads the text's tokens by one matrix and adds a pooled text embedding to the timestep's. FLUX.2 and others
    have no such embedding, HunyuanVideo refines the text first, Chroma makes its modulations otherwise.
    """
    inner: object = getattr(model, "model", None)
    runs_on: tuple[type[object], ...] = (type(model), type(inner))
    if any("nunchaku" in f"{kind.__module__}.{kind.__name__}".lower() for kind in runs_on):
        raise IncompatibleAdapterError(
            f"this model ({type(model).__name__}) runs on nunchaku's kernels, which let no image prompt into their attention; "
            "load the base model as safetensors (fp16, bf16 or fp8) or GGUF"
        )
    pooled = getattr(getattr(model, "time_text_embed", None), "text_embedder", None) or getattr(
        model, "vector_in", None
    )
    sites = () if pooled is None else sites_of(model)
    return ModelLayout(FLUX, text_width(model), sites) if sites else None


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    """The attentions of a model of double and single blocks; nothing of another model.

    In double blocks that of text and picture together, where the picture's stream asks; in single blocks that of the one
    stream of both, text first.
    """
    order, sites = count(), list[Site]()
    if not text_width(model):
        return ()
    for group, path, block in _blocks(model):
        attention: Any = getattr(block, "attn", None)  # diffusers'
        if attention is not None:
            path, channels, heads = f"{path}.attn", attention.inner_dim, attention.heads
        else:
            path, channels, heads = (
                f"{path}.img_attn" if group == "double" else path,
                block.hidden_size,
                block.num_heads,
            )
        number = int(path.split(".")[1])
        sites.append(Site(path, group, number, 0, next(order), int(channels), int(heads)))
    return tuple(sites)


def text_width(model: nn.Module) -> int:
    """The width of the text tokens that a model of double and single blocks reads by one matrix; 0 for another model."""
    forms = (
        ("double_blocks", "single_blocks", "txt_in"),
        ("transformer_blocks", "single_transformer_blocks", "context_embedder"),
    )
    for *lists, text in forms:
        if all(isinstance(getattr(model, name, None), nn.ModuleList) for name in lists):
            return int(getattr(getattr(model, text, None), "in_features", 0))
    return 0


def _blocks(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Group, path and block, in the order in which they run."""
    for name, group in BLOCKS.items():
        for i, block in enumerate(getattr(model, name, ())):
            yield group, f"{name}.{i}", block


# --- names of layers -------------------------------------------------------------------------------------------------

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
    walk=walk_flux,
    negative="apart",
    reference_width=3072,
    layers=name_layers,
    marks=re.compile(r"^(double_blocks|single_blocks|single_transformer_blocks)_"),
    steps=28,
    guidance=3.5,
)
