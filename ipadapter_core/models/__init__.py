"""Base models: one file per kind, with everything that is known of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from torch import nn

from ..errors import IncompatibleAdapterError
from .anima import ANIMA
from .auraflow import AURAFLOW
from .chroma import CHROMA
from .flux import FLUX
from .flux2 import FLUX2
from .hidream import HIDREAM
from .hunyuan_video import HUNYUAN_VIDEO
from .krea2 import KREA2
from .layers import COMMON_WORDS, LayerNames, Shapes, fused_attentions, numbered_block, numbered_blocks, own_names
from .ltx_video import LTX_VIDEO
from .lumina2 import LUMINA2
from .naming import Naming
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .sites import BaseModel, ModelLayout
from .streams import Streams
from .unet import BLOCK_WORDS, SD2, SD15, SDXL, SHORT
from .wan import WAN
from .zimage import ZIMAGE

BASE_MODELS: tuple[BaseModel, ...] = (
    SD15, SD2, SDXL, FLUX, CHROMA, SD3, ANIMA, FLUX2, QWEN_IMAGE, ZIMAGE, WAN, HUNYUAN_VIDEO, LUMINA2, KREA2,
    AURAFLOW, PIXART, LTX_VIDEO, HIDREAM,
)  # fmt: skip
"""Every known family."""


def layout_of(model: nn.Module) -> ModelLayout:
    """The sites of a base model in diffusers' or ComfyUI's form (``UNet2DConditionModel``, ``UNetModel``).

    Raises IncompatibleAdapterError for a model of another family, or of one where image prompts cannot act.
    """
    layout, walked = layout_or_none(model), [base for base in BASE_MODELS if base.walk]
    if layout is None:
        without = "".join(f"{base.name}, " for base in BASE_MODELS if not base.walk)
        raise IncompatibleAdapterError(
            f"the model is a {type(model).__name__}, which is of no family that image prompts of this pack know; they work with "
            f"the {listed(walked)} families (and fine-tunes such as Illustrious, NoobAI or Pony), not with {without}or others"
        )
    if not layout.sites:
        raise IncompatibleAdapterError(
            f"{type(model).__name__} has no attention that an image prompt could steer, as a model without text has none; "
            f"use a text-to-image model of the {listed(walked, 'or')} family"
        )
    return layout


def family_of(model: nn.Module) -> BaseModel:
    """The family of a model; one without a name, and with what most have, where none is known."""
    layout = layout_or_none(model)
    if layout is not None:
        return layout.model
    return next((base for base in BASE_MODELS if base.streams and base.streams(model)), BaseModel(name=""))


def layout_or_none(model: nn.Module) -> ModelLayout | None:
    """The sites of a base model; None for one of a family that image prompts do not know."""
    walks = dict.fromkeys(base.walk for base in BASE_MODELS if base.walk)
    return next((layout for walk in walks if (layout := walk(model)) is not None), None)


def streams_of(model: nn.Module) -> Streams | None:
    """What the layers of a UNet or transformer see; None for a model of which that is not known."""
    known = dict.fromkeys(base.streams for base in BASE_MODELS if base.streams)
    return next((streams for find in known if (streams := find(model)) is not None), None)


def listed(families: Iterable[BaseModel], last: str = "and") -> str:
    """Families by name, for sentences: ``SD1.5, SD2 and SDXL``."""
    *most, end = [base.name for base in families]
    return f"{', '.join(most)} {last} {end}" if most else end


def marked(names: Collection[str]) -> list[BaseModel]:
    """The UNets that alone have such layers, by underscored names."""
    return [base for base in BASE_MODELS if base.marks and any(map(base.marks.search, names))]


def named_like(layers: Collection[tuple[str, tuple[int | None, ...]]]) -> list[BaseModel]:
    """The families whose tables know most of these layers, by underscored names and shapes; none if they are few of all.

    Relatives that all know as many are told apart by the widths, then by the numbers of blocks of their published models, where
    one has them.
    """
    counts = {base: _known_layers(base.naming, layers) for base in BASE_MODELS if base.naming}
    most = max((found.known for found in counts.values()), default=0)
    best = [base for base, found in counts.items() if found.known == most]
    if 2 * most <= len(layers):
        return []
    best = [base for base in best if counts[base].width] or best
    return [base for base in best if counts[base].depth] or best


class _Known(NamedTuple):
    """How many layers a table has, whether one in a block is as wide as a published model, and whether the blocks are as many."""

    known: int
    width: bool
    depth: bool


def _known_layers(naming: Naming, layers: Iterable[tuple[str, tuple[int | None, ...]]]) -> _Known:
    known, width, last = 0, False, dict[str, int]()
    for name, shape in layers:
        found = naming.find(name)
        counts = found.blocks.counts if found is not None and found.blocks is not None else ()
        if found is None or (counts and found.number >= max(counts)):
            continue
        rows, columns = (*shape, None, None)[:2]
        ratio = None if not rows or not columns or found.parts else rows / columns
        if found.row.ratio is not None and ratio is not None and ratio != found.row.ratio:
            continue
        known += 1
        width = width or (found.blocks is not None and columns in naming.widths)
        if counts and found.blocks is not None:
            last[found.blocks.word] = max(found.number + 1, last.get(found.blocks.word, 0))
    depth = bool(last) and all(last[blocks.word] in blocks.counts for blocks in naming.lists if blocks.word in last)
    return _Known(known, width, depth)


def names_of_layers(model: nn.Module, shapes: Shapes) -> LayerNames:
    """All names of a UNet's or transformer's layers; of an unknown model, its own paths. ``shapes`` are those of the weights."""
    for name_layers in dict.fromkeys(base.naming or base.layers for base in BASE_MODELS):
        named = None if name_layers is None else name_layers(model, shapes)
        if named is not None:
            return named
    blocks = numbered_blocks(shapes, _words_of_lists())
    return LayerNames("unknown", own_names(shapes), {}, blocks, parts=fused_attentions(shapes))


def block_words() -> tuple[str, ...]:
    """What blocks are called before their numbers, in the order of tables: UNets', those of all transformers, of unknown models."""
    named = [blocks.word for base in BASE_MODELS if base.naming for blocks in base.naming.lists]
    return tuple(dict.fromkeys((*BLOCK_WORDS, *named, "block")))


def type_words() -> tuple[str, ...]:
    """What layers are called, whatever block they are in."""
    lists = [(rows.rows, rows.words) for base in BASE_MODELS if base.naming for rows in base.naming.lists]
    lists += [(base.naming.ends, "") for base in BASE_MODELS if base.naming]
    named = [word for rows, more in lists for row in rows for words in (*row.words, more) for word in words.split()]
    return tuple(dict.fromkeys((*COMMON_WORDS, *named)))


def block_of(path: str) -> str:
    """Short name of the block of a layer whose model is not at hand: that of ComfyUI's UNets, ``down1`` of others', ``double3``."""
    if path.partition(".")[0] == "mid_block":
        return "mid"
    return numbered_block(path, {**_words_of_lists(), **SHORT, "down_blocks": "down", "up_blocks": "up"})


def _words_of_lists() -> dict[str, str]:
    """What families that agree call the blocks of a list of this name."""
    lists = [blocks for base in BASE_MODELS if base.naming for blocks in base.naming.lists]
    words: dict[str, set[str]] = {}
    for blocks in lists:
        for name in (blocks.original, blocks.diffusers):
            words.setdefault(name, set()).add(blocks.word)
    return {name: min(found) for name, found in words.items() if len(found) == 1}
