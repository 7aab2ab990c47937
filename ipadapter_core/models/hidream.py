"""HiDream-I1: double blocks with a stream of the picture and one of the text, then single ones, with experts for MLPs.

ComfyUI has diffusers' names.
"""

from __future__ import annotations

from .naming import Blocks, Naming, Row, Signs, layer
from .sites import BaseModel


def _same(*pairs: tuple[str, str]) -> tuple[Row, ...]:
    return tuple(layer(name, name, words) for name, words in pairs)


_EXPERTS = ("shared_experts", *(f"experts.{i}" for i in range(4)))


def _block(picture: str, text: str) -> tuple[Row, ...]:
    """The layers of a block, with words for the picture's and the text's; none of the text's without any."""
    streams = (("", f"{picture}"), *([("_t", text)] if text else []))
    return _same(
        *((f"block.attn1.to_{n}{end}", f"{words}attn {n}") for end, words in streams for n in ("q", "k", "v", "out")),
        *((f"block.attn1.{n}_rms_norm{end}", f"{words}attn") for end, words in streams for n in "qk"),
        *((f"block.ff_i.{name}.w{i}", f"{picture}ff") for name in _EXPERTS for i in (1, 2, 3)),
        ("block.ff_i.gate", f"{picture}ff"),
        *((f"block.ff_t.w{i}", f"{text}ff") for i in (1, 2, 3) if text),
        ("block.adaLN_modulation.1", "mod"),
    )


_SIGNS = Signs(("double_stream_blocks.0.block.attn1.to_q_t",))
NAMES = Naming(
    "HiDream",
    original=_SIGNS,
    diffusers=_SIGNS,
    lists=(
        Blocks("double_stream_blocks", "double_stream_blocks", "double", _block("img ", "txt "), counts=(16,)),
        Blocks("single_stream_blocks", "single_stream_blocks", "single", _block("", ""), counts=(32,)),
        Blocks("caption_projection", "caption_projection", "caption", _same(("linear", "")), "txt"),
    ),
    ends=_same(
        ("x_embedder.proj", "img"),
        ("t_embedder.timestep_embedder.linear_1", ""),
        ("t_embedder.timestep_embedder.linear_2", ""),
        ("p_embedder.pooled_embedder.linear_1", ""),
        ("p_embedder.pooled_embedder.linear_2", ""),
        ("final_layer.linear", "proj"),
        ("final_layer.adaLN_modulation.1", "mod"),
    ),
    widths=(2560,),
)
HIDREAM = BaseModel(name="HiDream", naming=NAMES)
