"""HunyuanVideo (1.0 and 1.5): the blocks of FLUX.1 on videos, and blocks that refine the text before them."""

from __future__ import annotations

from .flux import ATTENTION, SINGLE
from .naming import Blocks, Naming, Signs, fused, layer
from .sites import BaseModel

# ComfyUI's names, which are FLUX.1's; the authors' own are aliases where underscores for dots do not make them the same
_DOUBLE = (
    *ATTENTION,
    layer("img_mlp.0", "ff.net.0.proj", "img ff", "img_mlp.fc1"),
    layer("img_mlp.2", "ff.net.2", "img ff", "img_mlp.fc2"),
    layer("txt_mlp.0", "ff_context.net.0.proj", "txt ff", "txt_mlp.fc1"),
    layer("txt_mlp.2", "ff_context.net.2", "txt ff", "txt_mlp.fc2"),
    layer("img_mod.lin", "norm1.linear", "img mod", "img_mod.linear"),
    layer("txt_mod.lin", "norm1_context.linear", "txt mod", "txt_mod.linear"),
)
_SINGLE = (*SINGLE, layer("modulation.lin", "norm.linear", "mod", "modulation.linear"))
_REFINER = (
    fused("self_attn.qkv", "attn.to_{}", "attn"),
    layer("self_attn.proj", "attn.to_out.0", "attn out"),
    layer("norm1", "norm1", ""),
    layer("norm2", "norm2", ""),
    layer("mlp.0", "ff.net.0.proj", "ff", "mlp.fc1"),
    layer("mlp.2", "ff.net.2", "ff", "mlp.fc2"),
    layer("adaLN_modulation.1", "norm_out.linear", "mod"),
)
_TEXT, _TIME = "context_embedder", "time_text_embed"
NAMES = Naming(
    "HunyuanVideo",
    original=Signs(("double_blocks.0.img_attn.qkv", "txt_in.input_embedder")),
    diffusers=Signs(("transformer_blocks.0.attn.to_q", f"{_TEXT}.proj_in")),
    lists=(
        Blocks("double_blocks", "transformer_blocks", "double", _DOUBLE, counts=(20, 54)),
        Blocks("single_blocks", "single_transformer_blocks", "single", _SINGLE, counts=(40, 0)),
        Blocks(
            "txt_in.individual_token_refiner.blocks",
            f"{_TEXT}.token_refiner.refiner_blocks",
            "refiner",
            _REFINER,
            "txt",
        ),
    ),
    ends=(
        layer("img_in.proj", "x_embedder.proj", "img"),
        *(
            layer(f"{name}.{n}_layer", f"{place}.linear_{i}", "", *([f"{name}.mlp.{2 * i - 2}"] if other else []))
            for name, place, other in (
                ("time_in", f"{_TIME}.timestep_embedder", True),
                ("guidance_in", f"{_TIME}.guidance_embedder", True),
                ("vector_in", f"{_TIME}.text_embedder", False),
                ("txt_in.t_embedder", f"{_TEXT}.time_text_embed.timestep_embedder", True),
                ("txt_in.c_embedder", f"{_TEXT}.time_text_embed.text_embedder", False),
            )
            for i, n in ((1, "in"), (2, "out"))
        ),
        layer("txt_in.input_embedder", f"{_TEXT}.proj_in", "txt"),
        layer("final_layer.linear", "proj_out", "proj"),
        layer("final_layer.adaLN_modulation.1", "norm_out.linear", "mod", halves=True),
    ),
    widths=(2048, 3072),
)
HUNYUAN_VIDEO = BaseModel(name="HunyuanVideo", naming=NAMES)
