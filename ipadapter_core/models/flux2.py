"""FLUX.2 (dev, klein): the blocks of FLUX.1 with gated MLPs, and modulations that all blocks share."""

from __future__ import annotations

from torch import nn

from .flux import ATTENTION, INPUTS, OUTPUTS, shares_modulations, streams_of_blocks
from .naming import Blocks, Naming, Row, Signs, layer
from .sites import BaseModel
from .streams import Streams

_FEED_FORWARD = (
    layer("img_mlp.0", "ff.linear_in", "img ff", "ff.net.0.proj", ratio=6),
    layer("img_mlp.2", "ff.linear_out", "img ff", "ff.net.2", ratio=1 / 3),
    layer("txt_mlp.0", "ff_context.linear_in", "txt ff", "ff_context.net.0.proj", ratio=6),
    layer("txt_mlp.2", "ff_context.linear_out", "txt ff", "ff_context.net.2", ratio=1 / 3),
)
# Both forms fuse q, k, v and the MLP's two inputs. The names of parts are those of FLUX.1, which files of tools have.
_SINGLE = (
    Row(
        "linear1",
        ("attn.to_qkv_mlp_proj",),
        ("attn q", "attn k", "attn v", "ff"),
        runs={
            "linear1_qkv": (0, 3),
            "attn.to_q": (0, 1),
            "attn.to_k": (1, 1),
            "attn.to_v": (2, 1),
            "proj_mlp": (3, 1),
        },
        ratio=9,
    ),
    layer("linear2", "attn.to_out", "attn out ff", "proj_out", ratio=1 / 4),
    layer("norm.query_norm", "attn.norm_q", "attn"),
    layer("norm.key_norm", "attn.norm_k", "attn"),
)
NAMES = Naming(
    "Flux.2",
    original=Signs(("double_blocks.0.img_attn.qkv", "double_stream_modulation_img.lin")),
    diffusers=Signs(("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_qkv_mlp_proj")),
    lists=(
        Blocks("double_blocks", "transformer_blocks", "double", (*ATTENTION, *_FEED_FORWARD), counts=(5, 8, 8)),
        Blocks("single_blocks", "single_transformer_blocks", "single", _SINGLE, counts=(20, 24, 48)),
    ),
    ends=(
        *INPUTS,
        layer("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1", ""),
        layer("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2", ""),
        layer("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1", ""),
        layer("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2", ""),
        layer("double_stream_modulation_img.lin", "double_stream_modulation_img.linear", "img mod"),
        layer("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear", "txt mod"),
        layer("single_stream_modulation.lin", "single_stream_modulation.linear", "mod"),
        *OUTPUTS,
    ),
    widths=(3072, 4096, 6144),
)


def streams(model: nn.Module) -> Streams | None:
    """What the layers of FLUX.2 see; None for another model."""
    return streams_of_blocks(model) if shares_modulations(model) else None


FLUX2 = BaseModel(name="Flux.2", naming=NAMES, streams=streams, negative="apart")
