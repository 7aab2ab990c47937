"""Module paths of full-size base models, with their dots, made by rule: what a file's underscored names stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from .targets import ENDS, RES_BLOCK

# per level: transformer depth of the way down (and up, backwards), and of the middle
DEPTHS: dict[str, tuple[tuple[int, ...], int]] = {
    "SD1.5": ((1, 1, 1, 0), 1),
    "SD2": ((1, 1, 1, 0), 1),
    "SD1.5 or SD2": ((1, 1, 1, 0), 1),
    "SDXL": ((0, 2, 10), 10),
}
_INNER = (
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
    "norm1",
    "norm2",
    "norm3",
)


@cache
def unet_paths(family: str) -> tuple[tuple[str, str], ...]:
    """(diffusers, LDM) path of every layer of a full-size UNet; empty for a family that is none."""
    if family not in DEPTHS:
        return ()
    depths, middle = DEPTHS[family]
    return tuple(_paths(depths, middle))


def _paths(depths: tuple[int, ...], middle: int) -> Iterator[tuple[str, str]]:
    yield from ENDS
    number = 1
    for level, depth in enumerate(depths):
        for j in range(2):
            yield from _block(f"down_blocks.{level}", j, f"input_blocks.{number}", depth)
            number += 1
        if level < len(depths) - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    for j, place in ((0, 0), (1, 2)):
        yield from ((f"mid_block.resnets.{j}.{d}", f"middle_block.{place}.{s}") for d, s in RES_BLOCK)
    yield from _transformer("mid_block.attentions.0", "middle_block.1", middle)
    number = 0
    for level, depth in enumerate(reversed(depths)):
        for j in range(3):
            yield from _block(f"up_blocks.{level}", j, f"output_blocks.{number}", depth)
            if j == 2 and level < len(depths) - 1:
                yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{number}.{2 if depth else 1}.conv"
            number += 1


def _block(diffusers: str, j: int, ldm: str, depth: int) -> Iterator[tuple[str, str]]:
    yield from ((f"{diffusers}.resnets.{j}.{d}", f"{ldm}.0.{s}") for d, s in RES_BLOCK)
    if depth:
        yield from _transformer(f"{diffusers}.attentions.{j}", f"{ldm}.1", depth)


def _transformer(diffusers: str, ldm: str, depth: int) -> Iterator[tuple[str, str]]:
    yield from ((f"{diffusers}.{n}", f"{ldm}.{n}") for n in ("norm", "proj_in", "proj_out"))
    for i in range(depth):
        yield from ((f"{diffusers}.transformer_blocks.{i}.{n}", f"{ldm}.transformer_blocks.{i}.{n}") for n in _INNER)


@cache
def by_name(family: str) -> dict[str, tuple[str, str]]:
    """(diffusers, LDM) path by either underscored name."""
    return {name.replace(".", "_"): pair for pair in unet_paths(family) for name in pair}


_TEXT = re.compile(r"^(?:text_model_)?encoder_layers_(\d+)_(self_attn_(?:[qkv]|out)_proj|mlp_fc[12])$")


def text_path(name: str) -> str | None:
    """``text_model.encoder.layers.0.self_attn.q_proj`` of a CLIP text encoder from its underscored name."""
    match = _TEXT.match(name)
    if match is None:
        return "text_projection" if name == "text_projection" else None
    inner = match[2].replace("self_attn_", "self_attn.").replace("mlp_", "mlp.")
    return f"text_model.encoder.layers.{match[1]}.{inner}"


# words with an underscore inside; all other underscores of a UNet's name stand for dots
_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_emb_proj", "time_embedding", "add_embedding",
    "conv_shortcut", "conv_in", "conv_out", "conv_norm_out", "linear_1", "linear_2", "proj_in", "proj_out", "to_q", "to_k",
    "to_v", "to_out", "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers",
    "skip_connection", "time_embed", "label_emb",
)  # fmt: skip
_WORD = re.compile("(?:^|(?<=_))(" + "|".join(sorted(_WORDS, key=len, reverse=True)) + ")(?=_|$)")
_LDM = ("input_blocks_", "middle_block_", "output_blocks_", "time_embed_", "label_emb_", "out_")


def dotted(name: str) -> str:
    """The path of a UNet layer from its underscored name, for models that are in no table."""
    return _WORD.sub(lambda word: word[0].replace("_", "\0"), name).replace("_", ".").replace("\0", "_")


def is_ldm(name: str) -> bool:
    """Whether an underscored name is of the LDM kind, as ComfyUI's, and not of diffusers'."""
    return name.startswith(_LDM)
