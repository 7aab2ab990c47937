"""Anima: the blocks of Cosmos-Predict2 behind a text encoder's adapter of its own, as its authors and ComfyUI (0.33) build it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .grids import Patches
from .naming import Blocks, Naming, Row, Signs, attention, layer
from .sites import BaseModel, ModelLayout, Site
from .streams import Streams


def walk_anima(model: nn.Module) -> ModelLayout | None:
    """The layout of an Anima transformer; None for another model, also for Cosmos-Predict2, which has no ``llm_adapter``.

    Image prompts act beside the attention to the text of every block.
    """
    blocks: Any = getattr(model, "blocks", None)
    if not hasattr(model, "llm_adapter") or not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return None
    attentions: list[Any] = [getattr(block, "cross_attn", None) for block in blocks]
    if not all(hasattr(attention, "n_heads") and hasattr(attention, "output_proj") for attention in attentions):
        return None
    sites = (
        Site(f"blocks.{i}.cross_attn", "block", i, 0, i, int(attention.q_proj.out_features), int(attention.n_heads))
        for i, attention in enumerate(attentions)
    )
    return ModelLayout(ANIMA, int(attentions[0].k_proj.in_features), tuple(sites))


# --- streams ---------------------------------------------------------------------------------------------------------

_STREAMS = Streams(
    tokens=Patches(),
    layers=(
        (r"t_embedd\w+|.*\badaln_modulation\w*|llm_adapter\b", "text"),
        (r"x_embedder\b|final_layer\b", "picture"),
        (r"blocks\.\d+\.cross_attn\.[kv]_proj\b", "prompt"),
        (r"blocks\.\d+\.cross_attn\.k_norm\b", "text"),
        (r"blocks\.\d+\.(self_attn|cross_attn|mlp)\b", "picture"),
    ),
)


def streams(model: nn.Module) -> Streams | None:
    """What the layers of an Anima transformer see; None for another model."""
    return None if walk_anima(model) is None else _STREAMS


# --- names of layers -------------------------------------------------------------------------------------------------


_ATTENTION = {"projection": "{}_proj", "out": "output_proj", "norm": "{}_norm"}

# diffusers' names: its CosmosTransformer3DModel, which Anima is but for the adapter of the text
_BLOCK = (
    *attention("self_attn", "attn1", "attn1 self", **_ATTENTION),
    *attention("cross_attn", "attn2", "attn2 cross", **_ATTENTION),
    layer("mlp.layer1", "ff.net.0.proj", "ff"),
    layer("mlp.layer2", "ff.net.2", "ff"),
    *(
        layer(f"adaln_modulation_{part}.{n}", f"norm{i}.linear_{n}", "mod")
        for i, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for n in (1, 2)
    ),
)


def _adapter(name: str, words: str) -> tuple[Row, ...]:
    return (
        *(layer(f"{name}.{n}_proj", f"{name}.{n}_proj", f"{words} attn {n}") for n in "qkv"),
        layer(f"{name}.o_proj", f"{name}.o_proj", f"{words} attn out"),
        *(layer(f"{name}.{n}_norm", f"{name}.{n}_norm", f"{words} attn") for n in "qk"),
    )


_ADAPTER = (
    *_adapter("self_attn", "attn1 self"),
    *_adapter("cross_attn", "attn2 cross"),
    layer("mlp.0", "mlp.0", "ff"),
    layer("mlp.2", "mlp.2", "ff"),
)
NAMES = Naming(
    "Anima",
    original=Signs(("blocks.0.cross_attn.output_proj",)),
    diffusers=Signs(("transformer_blocks.0.attn2.to_q", "transformer_blocks.0.norm1.linear_1")),
    lists=(
        Blocks("blocks", "transformer_blocks", "block", _BLOCK, counts=(28,)),
        # a model of its own beside diffusers' transformer
        Blocks("llm_adapter.blocks", "text_conditioner.blocks", "adapter", _ADAPTER, "txt"),
    ),
    ends=(
        layer("x_embedder.proj.1", "patch_embed.proj", "img"),
        layer("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1", ""),
        layer("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2", ""),
        layer("t_embedding_norm", "time_embed.norm", ""),
        layer("llm_adapter.embed", "text_conditioner.embed", "txt"),
        layer("llm_adapter.out_proj", "text_conditioner.out_proj", "txt"),
        layer("final_layer.linear", "proj_out", "proj"),
        layer("final_layer.adaln_modulation.1", "norm_out.linear_1", "mod"),
        layer("final_layer.adaln_modulation.2", "norm_out.linear_2", "mod"),
    ),
    widths=(2048,),
)
ANIMA = BaseModel(name="Anima", walk=walk_anima, groups=("block",), reference_width=2048, naming=NAMES, streams=streams)
