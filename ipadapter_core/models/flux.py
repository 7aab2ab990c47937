"""FLUX.1 (dev, schnell, Krea, Kontext, Fill), as diffusers and as its authors (and ComfyUI) build it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch import nn

from ..errors import IncompatibleAdapterError
from .grids import Patches
from .naming import Blocks, Naming, Row, Signs, fused, layer
from .sites import BaseModel, ModelLayout, Site
from .streams import Sees, Streams

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


# --- streams ---------------------------------------------------------------------------------------------------------

_LAYERS: tuple[tuple[str, Sees], ...] = (
    (r"(time|vector|guidance)_in\b|time_\w*embed\b|distilled_guidance_layer\b", "text"),
    (r".*(_mod|modulation\w*)(\.\w+)?$|.*\bnorm\w*\.linear$", "text"),
    (r"img_in\b|x_embedder\b|final_layer\b|proj_out\b", "picture"),
    (r"txt_(in|norm)\b|context_embedder\b", "text"),
    (r"double_blocks\.\d+\.img_|transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_qkv|to_out|norm_[qk])|ff)\b", "picture"),
    (r"double_blocks\.\d+\.txt_|transformer_blocks\.\d+\.(attn\.(add|to_add|norm_added)_\w+|ff_context)\b", "text"),
    (r"single_(transformer_)?blocks\b", "text, picture"),
)
"""Double blocks have a stream of the picture and one of the text; single ones have both in one, text first. Tokens of reference
pictures follow the picture's own."""


def streams(model: nn.Module) -> Streams | None:
    """What the layers of FLUX.1 and Chroma see; None for another model."""
    return None if shares_modulations(model) else streams_of_blocks(model)


def shares_modulations(model: nn.Module) -> bool:
    """Whether all blocks have the same modulations, as in FLUX.2."""
    return hasattr(model, "double_stream_modulation_img")


def streams_of_blocks(model: nn.Module) -> Streams | None:
    """What the layers of a model of double and single blocks see; None for another model. diffusers packs 2 by 2 latents."""
    if not text_width(model):
        return None
    if hasattr(model, "txt_in"):
        return Streams(Patches(int(getattr(model, "patch_size", 2))), _LAYERS, text="txt_in", again=True)
    return Streams(Patches(), _LAYERS, text="context_embedder")


# --- names of layers -------------------------------------------------------------------------------------------------

# diffusers' names: its convert_flux_to_diffusers.py; XLabs' processors, which stand beside a block's layers: x-flux, layers.py
ATTENTION = (
    fused("img_attn.qkv", "attn.to_{}", "img attn", "attn.to_qkv", "processor.qkv_lora1"),
    fused("txt_attn.qkv", "attn.add_{}_proj", "txt attn", "attn.to_added_qkv", "processor.qkv_lora2"),
    layer("img_attn.proj", "attn.to_out.0", "img attn out", "processor.proj_lora1"),
    layer("txt_attn.proj", "attn.to_add_out", "txt attn out", "processor.proj_lora2"),
    layer("img_attn.norm.query_norm", "attn.norm_q", "img attn"),
    layer("img_attn.norm.key_norm", "attn.norm_k", "img attn"),
    layer("txt_attn.norm.query_norm", "attn.norm_added_q", "txt attn"),
    layer("txt_attn.norm.key_norm", "attn.norm_added_k", "txt attn"),
)
"""The attentions of double blocks, in all relatives of FLUX."""
FEED_FORWARD = (
    layer("img_mlp.0", "ff.net.0.proj", "img ff", "ff.linear_in", ratio=4),
    layer("img_mlp.2", "ff.net.2", "img ff", "ff.linear_out", ratio=1 / 4),
    layer("txt_mlp.0", "ff_context.net.0.proj", "txt ff", "ff_context.linear_in", ratio=4),
    layer("txt_mlp.2", "ff_context.net.2", "txt ff", "ff_context.linear_out", ratio=1 / 4),
)
MODULATION = (layer("img_mod.lin", "norm1.linear", "img mod"), layer("txt_mod.lin", "norm1_context.linear", "txt mod"))
SINGLE = (
    Row(
        "linear1",
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ("attn q", "attn k", "attn v", "ff"),
        ("attn.to_qkv_mlp_proj",),
        {"linear1_qkv": (0, 3), "processor.qkv": (0, 3)},
        ratio=7,
    ),
    layer("linear2", "proj_out", "attn out ff proj", "attn.to_out", "processor.proj"),
    layer("norm.query_norm", "attn.norm_q", "attn"),
    layer("norm.key_norm", "attn.norm_k", "attn"),
)
"""Single blocks: XLabs' ``qkv`` acts on the part of ``linear1`` that is no MLP, its ``proj`` on ``linear2``."""
SINGLE_MODULATION = (layer("modulation.lin", "norm.linear", "mod"),)
INPUTS = (
    layer("img_in", "x_embedder", "img", "img_in.proj"),  # the last is the open model initiative's name
    layer("txt_in", "context_embedder", "txt"),
)
OUTPUTS = (
    layer("final_layer.linear", "proj_out", "proj"),
    layer("final_layer.adaLN_modulation.1", "norm_out.linear", "mod", halves=True),
)
NAMES = Naming(
    "Flux",
    original=Signs(
        ("double_blocks.0.img_attn.qkv",),
        ("double_stream_modulation_img.lin", "distilled_guidance_layer.in_proj", "txt_in.input_embedder"),
    ),
    diffusers=Signs(
        ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q"),
        ("distilled_guidance_layer.in_proj", "context_embedder.proj_in"),
    ),
    lists=(
        Blocks("double_blocks", "transformer_blocks", "double", (*ATTENTION, *FEED_FORWARD, *MODULATION), counts=(19,)),
        Blocks("single_blocks", "single_transformer_blocks", "single", (*SINGLE, *SINGLE_MODULATION), counts=(38,)),
    ),
    ends=(
        *INPUTS,
        layer("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1", ""),
        layer("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2", ""),
        layer("vector_in.in_layer", "time_text_embed.text_embedder.linear_1", ""),
        layer("vector_in.out_layer", "time_text_embed.text_embedder.linear_2", ""),
        layer("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1", ""),
        layer("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2", ""),
        *OUTPUTS,
    ),
    widths=(3072,),
)


FLUX = BaseModel(
    name="Flux",
    walk=walk_flux,
    groups=("double", "single"),
    negative="apart",
    reference_width=3072,
    naming=NAMES,
    streams=streams,
    steps=28,
    guidance=3.5,
)
