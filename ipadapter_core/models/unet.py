"""Stable Diffusion UNets, as diffusers and as ComfyUI build them: one walk each, the same sites from both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from .grids import Pyramid
from .sites import BaseModel, ModelLayout, Roles, Site, Training

# --- sites -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpatialTransformer:
    """One spatial transformer of a UNet; ``level`` counts the halvings of the latent's size."""

    group: str
    number: int
    level: int
    path: str
    module: nn.Module


def spatial_transformers(model: nn.Module) -> list[SpatialTransformer] | None:
    """The spatial transformers of a diffusers ``UNet2DConditionModel`` or a LDM ``UNetModel``, in execution order."""
    if all(hasattr(model, name) for name in ("down_blocks", "up_blocks", "mid_block", "conv_in")):
        return list(_of_diffusers(model))
    if all(hasattr(model, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        return list(_of_ldm(model))
    return None


def _of_diffusers(model: nn.Module) -> Iterator[SpatialTransformer]:
    unet = cast(Any, model)
    number, level = 1, 0  # ComfyUI's input block 0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        attentions = list(getattr(block, "attentions", None) or [])
        for j in range(len(block.resnets)):
            if j < len(attentions):
                yield SpatialTransformer("input", number, level, f"down_blocks.{i}.attentions.{j}", attentions[j])
            number += 1
        if getattr(block, "downsamplers", None):
            number, level = number + 1, level + 1
    if unet.mid_block is not None:
        for j, attention in enumerate(getattr(unet.mid_block, "attentions", None) or []):
            yield SpatialTransformer("middle", 0, level, f"mid_block.attentions.{j}", attention)
    number = 0
    for i, block in enumerate(unet.up_blocks):
        attentions = list(getattr(block, "attentions", None) or [])
        for j in range(len(block.resnets)):
            if j < len(attentions):
                yield SpatialTransformer("output", number, level, f"up_blocks.{i}.attentions.{j}", attentions[j])
            number += 1
        if getattr(block, "upsamplers", None):
            level -= 1


def _of_ldm(model: nn.Module) -> Iterator[SpatialTransformer]:
    unet = cast(Any, model)
    level = 0
    for number, block in enumerate(unet.input_blocks):
        for path, transformer in _transformers(block, f"input_blocks.{number}"):
            yield SpatialTransformer("input", number, level, path, transformer)
        level += _changes_size(block, "Downsample", "op")
    if unet.middle_block is not None:
        for path, transformer in _transformers(unet.middle_block, "middle_block"):
            yield SpatialTransformer("middle", 0, level, path, transformer)
    for number, block in enumerate(unet.output_blocks):
        for path, transformer in _transformers(block, f"output_blocks.{number}"):
            yield SpatialTransformer("output", number, level, path, transformer)
        level -= _changes_size(block, "Upsample", "conv")


def _transformers(block: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in block.named_modules(prefix=prefix):
        if hasattr(module, "transformer_blocks"):
            yield name, module


def _changes_size(block: nn.Module, kind: str, operation: str) -> int:
    return int(any(type(m).__name__ == kind and hasattr(m, operation) for m in block.children()))


def walk_unet(model: nn.Module) -> ModelLayout | None:
    """The layout of a UNet: that of a known family if its size says so, else of a UNet named by its size."""
    found = spatial_transformers(model)
    if found is None:
        return None
    sites: list[Site] = []
    levels: dict[int, int] = {}
    token_dim = 0
    for order, at in enumerate(found):
        for depth, block in enumerate(cast(Any, at.module).transformer_blocks):
            attention = getattr(block, "attn2", None)
            if attention is not None:
                path = f"{at.path}.transformer_blocks.{depth}.attn2"
                channels, heads = _features(attention.to_k, 0), int(attention.heads)
                sites.append(Site(path, at.group, at.number, depth, order, channels, heads))
                levels[order] = at.level
                token_dim = token_dim or _features(attention.to_k, 1)
    for base in UNETS:
        if (base.attentions, base.text_width) == (len(sites), token_dim):
            return ModelLayout(base, token_dim, tuple(sites))
    name = f"UNet with {len(sites)} sites, width {token_dim}"
    relative = SDXL if _wants_sizes(model) else SD15
    unknown = replace(relative, name=name, text_width=token_dim, attentions=len(sites), roles=_roles_by(levels))
    return ModelLayout(unknown, token_dim, tuple(sites))


def _wants_sizes(model: nn.Module) -> bool:
    added = getattr(getattr(model, "config", None), "addition_embed_type", None)
    return added == "text_time" or getattr(model, "label_emb", None) is not None


def _halvings(model: nn.Module) -> int:
    """Latents must halve as often as a diffusers UNet halves them."""
    return 2 ** (len(cast(Any, model).config.block_out_channels) - 1)


def _roles_by(levels: dict[int, int]) -> Roles | None:
    """Roles of an unknown UNet: the lowest resolution composes, all others style; none with one resolution."""
    if len(set(levels.values())) < 2:
        return None
    deepest = max(levels.values())
    composition = {order for order, level in levels.items() if level == deepest}
    return Roles(dict.fromkeys(composition, 1.0), frozenset(levels.keys() - composition))


def _features(linear: Any, axis: int) -> int:
    """Output (0) or input (1) width; quantised layers keep the attributes even where the weight's shape is packed."""
    value = getattr(linear, ("out_features", "in_features")[axis], None)
    return int(value if value is not None else linear.weight.shape[axis])


def down_up_middle(layout: ModelLayout) -> tuple[int, ...]:
    """Index of the site that the i-th layer of a checkpoint serves: diffusers' attention processors run down, up, middle."""
    places = {"input": 0, "output": 1, "middle": 2}
    return tuple(sorted(range(len(layout.sites)), key=lambda i: places.get(layout.sites[i].group, 3)))


# --- families --------------------------------------------------------------------------------------------------------

REFERENCE_WIDTH = 1280
"""Width of the widest attentions of SD1.5, SD2 and SDXL."""

# Which spatial transformers carry style and composition: InstantStyle, arXiv 2404.02733, and ComfyUI_IPAdapter_plus.
SD15 = BaseModel(
    name="SD1.5",
    walk=walk_unet,
    text_width=768,
    attentions=16,
    roles=Roles({4: 0.25, 5: 1.0}, frozenset({0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15})),
    tokens=Pyramid(),
    reference_width=REFERENCE_WIDTH,
    training=Training(
        condition="text",
        side_multiple=_halvings,
        checkpointed=("ResnetBlock2D", "BasicTransformerBlock", "Transformer2DModel"),
        units=("ResnetBlock2D", "BasicTransformerBlock"),
    ),
)
SD2 = replace(SD15, name="SD2", text_width=1024)
SDXL = replace(
    SD15,
    name="SDXL",
    text_width=2048,
    attentions=70,
    roles=Roles({3: 1.0}, frozenset({6})),
    training=replace(cast(Training, SD15.training), condition="text and sizes"),
)
UNETS = (SD15, SD2, SDXL)
