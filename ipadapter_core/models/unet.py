"""Stable Diffusion UNets, as diffusers and as ComfyUI build them: one walk each, the same sites from both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn

from .sites import Block, CrossAttentionSite, ModelLayout

KNOWN_NAMES = {(16, 768): "SD1.5", (16, 1024): "SD2", (70, 2048): "SDXL"}
"""(cross-attentions, text width) of full-size models; anything else is named by its width."""


def layout_name(sites: int, token_dim: int) -> str:
    """``SD1.5``, ``SD2``, ``SDXL``, or a description such as ``UNet with 7 sites, width 192``."""
    return KNOWN_NAMES.get((sites, token_dim), f"UNet with {sites} sites, width {token_dim}")


def walk_diffusers_unet(model: nn.Module) -> ModelLayout | None:
    """Sites of a diffusers UNet2DConditionModel; None if ``model`` is none."""
    if not all(hasattr(model, name) for name in ("down_blocks", "up_blocks", "mid_block", "conv_in")):
        return None
    unet = cast(Any, model)
    found: list[tuple[Block, int, int, str, nn.Module]] = []
    number, level = 1, 0  # ComfyUI's input block 0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        attentions = list(getattr(block, "attentions", None) or [])
        for j in range(len(block.resnets)):
            if j < len(attentions):
                found.append(("input", number, level, f"down_blocks.{i}.attentions.{j}", attentions[j]))
            number += 1
        if getattr(block, "downsamplers", None):
            number, level = number + 1, level + 1
    if unet.mid_block is not None:
        for j, attention in enumerate(getattr(unet.mid_block, "attentions", None) or []):
            found.append(("middle", 0, level, f"mid_block.attentions.{j}", attention))
    number = 0
    for i, block in enumerate(unet.up_blocks):
        attentions = list(getattr(block, "attentions", None) or [])
        for j in range(len(block.resnets)):
            if j < len(attentions):
                found.append(("output", number, level, f"up_blocks.{i}.attentions.{j}", attentions[j]))
            number += 1
        if getattr(block, "upsamplers", None):
            level -= 1
    return _layout(found)


def walk_comfy_unet(model: nn.Module) -> ModelLayout | None:
    """Sites of ComfyUI's (LDM's) UNetModel; None if ``model`` is none."""
    if not all(hasattr(model, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        return None
    unet = cast(Any, model)
    found: list[tuple[Block, int, int, str, nn.Module]] = []
    level = 0
    for number, block in enumerate(unet.input_blocks):
        for path, transformer in _transformers(block, f"input_blocks.{number}"):
            found.append(("input", number, level, path, transformer))
        level += _changes_size(block, "Downsample", "op")
    if unet.middle_block is not None:
        for path, transformer in _transformers(unet.middle_block, "middle_block"):
            found.append(("middle", 0, level, path, transformer))
    for number, block in enumerate(unet.output_blocks):
        for path, transformer in _transformers(block, f"output_blocks.{number}"):
            found.append(("output", number, level, path, transformer))
        level -= _changes_size(block, "Upsample", "conv")
    return _layout(found)


def _transformers(block: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in block.named_modules(prefix=prefix):
        if hasattr(module, "transformer_blocks"):
            yield name, module


def _changes_size(block: nn.Module, kind: str, operation: str) -> int:
    return int(any(type(m).__name__ == kind and hasattr(m, operation) for m in block.children()))


def _layout(found: Iterable[tuple[Block, int, int, str, nn.Module]]) -> ModelLayout:
    rows: list[tuple[Block, int, int, int, int, bool, str, Any]] = []
    for transformer, (block, number, level, path, module) in enumerate(found):
        blocks: list[nn.Module] = list(cast(Any, module).transformer_blocks)
        for depth, inner in enumerate(blocks):
            attention = getattr(inner, "attn2", None)
            if attention is not None:
                single = len(blocks) == 1
                rows.append(
                    (
                        block,
                        number,
                        depth,
                        transformer,
                        level,
                        single,
                        f"{path}.transformer_blocks.{depth}.attn2",
                        attention,
                    )
                )
    order: dict[Block, int] = {"input": 0, "output": 1, "middle": 2}
    by_checkpoint = sorted(range(len(rows)), key=lambda i: (order[rows[i][0]], i))
    checkpoint_index = {row: index for index, row in enumerate(by_checkpoint)}
    sites = tuple(
        CrossAttentionSite(
            block=block,
            number=number,
            depth=depth,
            transformer=transformer,
            checkpoint_index=checkpoint_index[i],
            channels=_features(attention.to_k, 0),
            heads=int(attention.heads),
            level=level,
            single=single,
            path=path,
        )
        for i, (block, number, depth, transformer, level, single, path, attention) in enumerate(rows)
    )
    token_dim = _features(rows[0][-1].to_k, 1) if rows else 0
    return ModelLayout(layout_name(len(sites), token_dim), token_dim, sites)


def _features(linear: Any, axis: int) -> int:
    """Output (0) or input (1) width; quantised layers keep the attributes even where the weight's shape is packed."""
    value = getattr(linear, ("out_features", "in_features")[axis], None)
    return int(value if value is not None else linear.weight.shape[axis])
