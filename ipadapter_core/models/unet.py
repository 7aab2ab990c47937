"""Stable Diffusion UNets, as diffusers and as ComfyUI build them.

Both hosts' UNets, and the full-size ones that files are made for, are the same rows of res blocks with spatial transformers
beside them; one rule gives every part its name in diffusers and in the original (LDM, ComfyUI).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn

from .grids import Pyramid
from .layers import LayerNames, Names, Place, Shapes, underscored
from .sites import BaseModel, ModelLayout, Published, Roles, Site, Training
from .streams import Streams

# --- parts and their names -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of a UNet, on the way down or up: its res blocks, and whether a sampler and transformers go with them."""

    resnets: int
    sampler: bool
    attention: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A layer, or the stem of several, in diffusers and in the original; ``level`` counts the halvings of the latent's size."""

    diffusers: str
    ldm: str
    level: int = 0


# inside a res block: diffusers, LDM (diffusers' convert_original_stable_diffusion_to_diffusers.py)
_RES_BLOCK = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_ENDS = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
# inside a spatial transformer: the same in both
_AROUND = ("norm", "proj_in", "proj_out")
_BLOCK = (
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
    "norm1",
    "norm2",
    "norm3",
)


def _parts(down: Iterable[Level], up: Iterable[Level]) -> Iterator[Part]:
    """Every part in execution order, but for the ends; spatial transformers by their stem."""
    yield from (Part(*names) for names in _ENDS)
    number, level = 1, 0  # the original's input block 0 is conv_in
    for i, at in enumerate(down):
        for j in range(at.resnets):
            yield from _res_block(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0", level)
            yield Part(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1", level)
            number += 1
        if at.sampler:
            yield Part(f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op", level)
            number, level = number + 1, level + 1
    yield from _res_block("mid_block.resnets.0", "middle_block.0", level)
    yield Part("mid_block.attentions.0", "middle_block.1", level)
    yield from _res_block("mid_block.resnets.1", "middle_block.2", level)
    number = 0
    for i, at in enumerate(up):
        for j in range(at.resnets):
            yield from _res_block(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0", level)
            yield Part(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1", level)
            number += 1
        if at.sampler:
            place = 2 if at.attention else 1
            yield Part(f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{place}.conv", level)
            level -= 1


def _res_block(diffusers: str, ldm: str, level: int) -> Iterator[Part]:
    yield from (Part(f"{diffusers}.{d}", f"{ldm}.{s}", level) for d, s in _RES_BLOCK)


def _parts_of(model: nn.Module) -> dict[str, Part] | None:
    """The parts of a diffusers or LDM UNet by their path in it; None for another model."""
    blocks: Any = getattr(model, "down_blocks", None)
    if blocks is not None and all(
        hasattr(block, "resnets") for block in blocks
    ):  # Stable Cascade has others of this name
        down, up = (_levels(model, *names) for names in (("down_blocks", "downsamplers"), ("up_blocks", "upsamplers")))
        return {part.diffusers: part for part in _parts(down, up)}
    if hasattr(model, "input_blocks"):
        return {part.ldm: part for part in _parts(_ldm_down(model), _ldm_up(model))}
    return None


def _levels(model: nn.Module, blocks: str, samplers: str) -> Iterator[Level]:
    for block in getattr(model, blocks, ()):
        yield Level(len(block.resnets), bool(getattr(block, samplers, None)), bool(getattr(block, "attentions", None)))


def _ldm_down(model: Any) -> Iterator[Level]:
    count = 0
    for block in list(model.input_blocks)[1:]:
        if hasattr(next(iter(block.children()), None), "op"):
            yield Level(count, True, True)
            count = 0
        else:
            count += 1
    yield Level(count, False, True)


def _ldm_up(model: nn.Module) -> Iterator[Level]:
    count = 0
    for block in getattr(model, "output_blocks", ()):
        count += 1
        for place, layer in enumerate(block.children()):
            if type(layer).__name__ == "Upsample" and hasattr(layer, "conv"):
                yield Level(count, True, place == 2)
                count = 0
    yield Level(count, False, True)


def _in_processor_order(paths: Iterable[str]) -> list[str]:
    """diffusers' paths in the order of its attention processors, by which adapter files number them: down, up, middle."""
    return sorted(paths, key=lambda path: ("down", "up_b", "mid_").index(path[:4]))


# --- sites -----------------------------------------------------------------------------------------------------------

_GROUPS = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}


@dataclass(frozen=True, slots=True)
class SpatialTransformer:
    """One spatial transformer of a UNet; ``level`` counts the halvings of the latent's size."""

    group: str
    number: int
    level: int
    path: str
    module: nn.Module


def spatial_transformers(model: nn.Module) -> list[SpatialTransformer]:
    """The spatial transformers of a diffusers ``UNet2DConditionModel`` or a LDM ``UNetModel``, in execution order."""
    found: list[SpatialTransformer] = []
    for path, part in (_parts_of(model) or {}).items():
        if ".attentions." not in part.diffusers:
            continue
        module = _submodule(model, path)
        if module is not None and hasattr(module, "transformer_blocks"):
            block, number = part.ldm.split(".")[:2]
            group = _GROUPS[block]
            found.append(SpatialTransformer(group, 0 if group == "middle" else int(number), part.level, path, module))
    return found


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def walk_unet(model: nn.Module) -> ModelLayout | None:
    """The layout of a UNet: that of a known family if its size says so, else of a UNet named by its size."""
    whole = (("down_blocks", "up_blocks", "mid_block", "conv_in"), ("input_blocks", "middle_block", "output_blocks"))
    if not any(all(hasattr(model, name) for name in names) for names in whole):
        return None
    sites: list[Site] = []
    levels: dict[int, int] = {}
    token_dim = 0
    for order, at in enumerate(spatial_transformers(model)):
        for depth, block in enumerate(getattr(at.module, "transformer_blocks", ())):
            attention = getattr(block, "attn2", None)
            if attention is not None:
                path = f"{at.path}.transformer_blocks.{depth}.attn2"
                channels, heads = _features(attention.to_k, 0), int(attention.heads)
                sites.append(Site(path, at.group, at.number, depth, order, channels, heads))
                levels[order] = at.level
                token_dim = token_dim or _features(attention.to_k, 1)
    return ModelLayout(
        unet_of_size(token_dim, len(sites)) or _unknown(model, token_dim, len(sites), levels), token_dim, tuple(sites)
    )


def _unknown(model: nn.Module, token_dim: int, sites: int, levels: dict[int, int]) -> BaseModel:
    """A UNet of another size: what holds for all, and the lowest of several resolutions composes, all others style."""
    deepest = max(levels.values(), default=0)
    composition = {order for order, level in levels.items() if level == deepest}
    style = frozenset(levels.keys() - composition)
    added = getattr(getattr(model, "config", None), "addition_embed_type", None)
    return BaseModel(
        name=f"UNet with {sites} sites, width {token_dim}",
        walk=walk_unet,
        groups=SD15.groups,
        roles=Roles(dict.fromkeys(composition, 1.0), style) if style else None,
        tokens=Pyramid(),
        reference_width=SD15.reference_width,
        clock=SD15.clock,
        training=SDXL.training if added == "text_time" else SD15.training,
    )


def _features(linear: Any, axis: int) -> int:
    """Output (0) or input (1) width; quantised layers keep the attributes even where the weight's shape is packed."""
    value = getattr(linear, ("out_features", "in_features")[axis], None)
    return int(value if value is not None else linear.weight.shape[axis])


def down_up_middle(layout: ModelLayout) -> tuple[int, ...]:
    """Index of the site that the i-th layer of a checkpoint serves: diffusers' attention processors run down, up, middle."""
    places = {"input": 0, "output": 1, "middle": 2}
    return tuple(sorted(range(len(layout.sites)), key=lambda i: places.get(layout.sites[i].group, 3)))


# --- names of layers -------------------------------------------------------------------------------------------------


_STREAMS = Streams(
    tokens=Pyramid(),
    layers=(
        (r".*\.attn2\.to_[kv]$", "prompt"),
        (
            r"time_embed|label_emb|add_embedding|class_embedding|encoder_hid_proj|.*\b(emb_layers|time_emb_proj)\b",
            "text",
        ),
        (r"", "picture"),
    ),
)


def streams(model: nn.Module) -> Streams | None:
    """What the layers of a UNet see; None for another model."""
    return _STREAMS if hasattr(model, "down_blocks") or hasattr(model, "input_blocks") else None


def name_layers(model: nn.Module, shapes: Shapes) -> LayerNames | None:
    """Names of a UNet's layers; None for another model."""
    parts = _parts_of(model)
    if parts is None:
        return None
    names: Names = {}
    labels: dict[str, str] = {}
    blocks: dict[str, str] = {}
    for path in shapes:
        stem = path
        while stem and stem not in parts:
            stem = stem.rpartition(".")[0]
        spellings = [path]
        if stem:
            part, rest = parts[stem], path[len(stem) :]
            spellings += [part.diffusers + rest, part.ldm + rest]
            labels[path] = spellings[1]
        blocks[path] = block_word(spellings[-1])
        names |= {underscored(name): (Place(path),) for name in spellings}
    by_label = {label: path for path, label in labels.items()}
    attentions = [label for label in by_label if label.endswith((".attn1.to_q", ".attn2.to_q"))]
    for number, label in enumerate(_in_processor_order(attentions)):  # FaceID files
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            path = f"{by_label[label].removesuffix('.to_q')}.{layer}"
            if path in shapes:
                names[underscored(f"processor.{number}.{layer}")] = (Place(path),)
    widths = {shape[1] for path, shape in shapes.items() if path.endswith("attn2.to_k")}
    family = unet_of_width(widths.pop()) if len(widths) == 1 else None
    return LayerNames("unknown" if family is None else family.name, names, labels, blocks)


SHORT = {"input_blocks": "in", "middle_block": "mid", "output_blocks": "out"}
BLOCK_WORDS = tuple(SHORT.values())
"""What blocks of UNets are called before their numbers."""


def block_word(ldm: str) -> str:
    """Short name of the block of a layer, by its LDM path."""
    block, *rest = ldm.split(".")
    short = SHORT.get(block)
    return "base" if short is None else f"{short}{rest[0]}"


CHECKPOINT_PREFIX = "model.diffusion_model."
"""In front of a UNet's keys in a whole checkpoint in the original layout."""
FIRST_KEY, TEXT_KEY, SIZES_KEY = (
    f"{CHECKPOINT_PREFIX}{layer}.weight"
    for layer in ("input_blocks.0.0", "middle_block.1.transformer_blocks.0.attn2.to_k", "label_emb.0.0")
)
"""The layers whose shapes tell a family: the first, one that reads the text, the one that reads pooled text and sizes."""


# --- families --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class UNet(BaseModel):
    """A family of UNets and the shape of its full-size model.

    ``text_width`` is the width of the text tokens. ``channels`` are those of every level, ``depths`` its spatial
    transformers' depth, 0 without any; two res blocks on the way down, three on the way up. ``middle`` is the depth in the
    middle. ``heads`` are the heads of every attention, None where each is 64 wide. ``pooled`` is the width of the text
    embedding that is read besides (0: none), ``resolution`` the side of the pictures it was made for.
    """

    text_width: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int
    heads: int | None
    pooled: int
    resolution: int

    @property
    def attentions(self) -> int:
        """Number of cross-attentions, and of sites."""
        return 5 * sum(self.depths) + self.middle

    @property
    def size_embedding(self) -> int:
        """Numbers read besides the text: the pooled embedding, and six sizes of 256 numbers each."""
        return self.pooled + 6 * 256 if self.pooled else 0


@cache
def full_size_layers(unet: UNet) -> tuple[Part, ...]:
    """Every layer of a full-size UNet."""
    last = len(unet.channels) - 1
    down = [Level(2, i < last, depth > 0) for i, depth in enumerate(unet.depths)]
    up = [Level(3, i < last, depth > 0) for i, depth in enumerate(reversed(unet.depths))]
    layers: list[Part] = []
    for part in _parts(down, up):
        if ".attentions." not in part.diffusers:
            layers.append(part)
            continue
        depth = unet.middle if part.diffusers.startswith("mid") else unet.depths[part.level]
        inner = [*_AROUND, *(f"transformer_blocks.{i}.{name}" for i in range(depth) for name in _BLOCK)]
        layers += [Part(f"{part.diffusers}.{n}", f"{part.ldm}.{n}", part.level) for n in inner if depth]
    return tuple(layers)


@cache
def attention_paths(attentions: int) -> tuple[str, ...] | None:
    """diffusers' paths of a full-size UNet's transformer blocks in the order of its attention processors; None for no such UNet."""
    for unet in UNETS:
        if unet.attentions == attentions:
            found = (part.diffusers for part in full_size_layers(unet) if part.diffusers.endswith(".attn2.to_q"))
            return tuple(path.removesuffix(".attn2.to_q") for path in _in_processor_order(found))
    return None


def unet_of_size(token_dim: int, attentions: int) -> UNet | None:
    """The family with this width of text tokens and this number of cross-attentions."""
    return next((unet for unet in UNETS if (unet.text_width, unet.attentions) == (token_dim, attentions)), None)


def unet_of_width(token_dim: int) -> UNet | None:
    """The family with this width of text tokens."""
    return next((unet for unet in (*UNETS, REFINER) if unet.text_width == token_dim), None)


def _halvings(unet: Any) -> int:
    """What sides of latents are multiples of: a UNet halves them between its blocks. Named, since layouts are pickled."""
    return 2 ** (len(unet.config.block_out_channels) - 1)


_TRAINING = Training(
    condition="text",
    side_multiple=_halvings,
    checkpointed=("ResnetBlock2D", "BasicTransformerBlock", "Transformer2DModel"),
    units=("ResnetBlock2D", "BasicTransformerBlock"),
)
# Which spatial transformers carry style and composition: InstantStyle, arXiv 2404.02733, and ComfyUI_IPAdapter_plus.
SD15 = UNet(
    name="SD1.5",
    walk=walk_unet,
    groups=("input", "middle", "output"),
    roles=Roles({4: 0.25, 5: 1.0}, frozenset({0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15})),
    tokens=Pyramid(),
    reference_width=1280,
    clock="steps",
    layers=name_layers,
    streams=streams,
    marks=re.compile(r"^(down_blocks_0_attentions|down_blocks_3_|up_blocks_3_|input_blocks_1_1)"),
    training=_TRAINING,
    published=Published("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd_v1", "stable-diffusion-v1"),
    text_width=768,
    channels=(320, 640, 1280, 1280),
    depths=(1, 1, 1, 0),
    middle=1,
    heads=8,
    pooled=0,
    resolution=512,
)
SD2 = replace(
    SD15,
    name="SD2",
    published=Published(
        "stabilityai/stable-diffusion-2-1",
        "sd_v2",
        "stable-diffusion-v2-512",
        velocity=("sd_v2_768_v", "stable-diffusion-v2-768-v"),
    ),
    text_width=1024,
    heads=None,
)
SDXL = replace(
    SD2,
    name="SDXL",
    roles=Roles({3: 1.0}, frozenset({6})),
    marks=re.compile(r"^(input_blocks_4_1_transformer_blocks_1|down_blocks_2_attentions_0_transformer_blocks_9)"),
    training=replace(_TRAINING, condition="text and sizes"),
    published=Published("stabilityai/stable-diffusion-xl-base-1.0", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    text_width=2048,
    channels=(320, 640, 1280),
    depths=(0, 2, 10),
    middle=10,
    pooled=1280,
    resolution=1024,
)
UNETS = (SD15, SD2, SDXL)
REFINER = replace(
    SDXL, name="SDXL refiner", walk=None, roles=None, published=None, text_width=1280,
    channels=(384, 768, 1536, 1536), depths=(0, 4, 4, 0), middle=4,
)  # fmt: skip
"""No image prompt was ever trained for it; its LoRAs are told by its width."""
REFERENCE_WIDTH = SD15.reference_width
