"""Encoded references on disk: safetensors of our own, and the ``.ipadpt`` files of other tools."""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CorruptFileError, InvalidInputError, one_line
from ..files.state_dict import LONGEST_NAME, is_safetensors, open_state_dict, open_tensors
from ..files.whole import written_whole

EXTENSION = ".ipadpt.safetensors"
MOST_REFERENCES = 10_000
"""In one file: a reference of two kilobytes becomes tokens of up to a hundred. Films have one for every frame."""


@dataclass(frozen=True, slots=True)
class SavedEmbeds:
    """Features of references ``i ...`` (image embeds ``i e`` or tokens ``i t e``), what the negative prompt has in their
    place, what stands for no image where that is something else, and texts."""

    embeds: Tensor
    negative: Tensor | None = None
    neutral: Tensor | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])


def save_embeds(path: str | os.PathLike[str], saved: SavedEmbeds) -> Path:
    """Write features as safetensors with a description, whole or not at all; returns the path."""
    path = Path(path)
    tensors = {"embeds": saved.embeds, "negative": saved.negative, "neutral": saved.neutral}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
    embeds = tensors["embeds"]
    if embeds.ndim not in (2, 3):
        raise InvalidInputError(f"embeds have 2 or 3 axes (images, [tokens,] width), got shape {tuple(embeds.shape)}")
    texts = {"format": "pt", "kind": "image embeds", "shape": str(list(embeds.shape)), **saved.metadata}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as place:
        save_file(tensors, place, metadata=texts)
    return path


def load_embeds(path: str | os.PathLike[str]) -> SavedEmbeds:
    """Read features of any tool, without running code.

    ComfyUI_IPAdapter_plus wrote one tensor (its first version a pair [positive, negative]), diffusers writes a list of
    ``[2 b, n, ...]`` with the negative half first.

    Raises FileNotFoundError; InvalidInputError for what is no plain file; CorruptFileError for what holds no such tensors, or
    numbers that are not finite floating point; UnsafeFileError for pickles that carry code.
    """
    name = one_line(Path(path).name, LONGEST_NAME)
    if is_safetensors(path):
        opened = open_state_dict(path)
        if "embeds" not in opened.tensors:
            raise CorruptFileError(
                f"{opened.name} holds no tensor 'embeds'; choose a file that Save Image Prompt or IPAdapter Save Embeds wrote."
            )
        checked = {
            what: _usable(name, what, opened.tensors[what], 2 if what == "embeds" else 1)
            for what in ("embeds", "negative", "neutral")
            if what in opened.tensors
        }
        return SavedEmbeds(checked["embeds"], checked.get("negative"), checked.get("neutral"), opened.metadata)
    tensors = open_tensors(path)
    if len(tensors) != 1:
        raise CorruptFileError(
            f"{name} holds the embeds of {len(tensors)} adapters; one was expected: save one adapter's embeds."
        )
    tensor, is_list = tensors[0]
    tensor = _usable(name, "embeds", tensor, 2)
    if is_list:  # diffusers, with guidance: negative and positive stacked; n images each
        negative, positive = tensor.chunk(2) if len(tensor) % 2 == 0 else (None, tensor)
        return SavedEmbeds(_joined(positive), None if negative is None else _joined(negative))
    if tensor.ndim == 4 and len(tensor) != 2:
        raise CorruptFileError(
            f"{name} holds embeds of shape {tuple(tensor.shape)}; a pair, or 2 or 3 axes were expected"
        )
    if tensor.ndim == 4 or (tensor.ndim == 3 and tensor.shape[0] == 2 and tensor.shape[1] < 16):
        return SavedEmbeds(tensor[0], tensor[1])
    return SavedEmbeds(tensor)


def _usable(name: str, what: str, tensor: Tensor, least: int) -> Tensor:
    """The tensor, if it can be features: finite floating point numbers that torch computes with, and not too many of them."""
    shape = tuple(tensor.shape)
    if 0 in shape or not tensor.is_floating_point() or tensor.itemsize == 1 or not bool(torch.isfinite(tensor).all()):
        raise CorruptFileError(
            f"{name} holds no usable numbers as {what} ({tensor.dtype}, shape {shape}); finite ones in float16, bfloat16 or "
            "float32 were expected"
        )
    if not least <= tensor.ndim <= 4 or max(shape) > MOST_REFERENCES:
        raise CorruptFileError(
            f"{name} holds {what} of shape {shape}; 2 or 3 axes (images, [tokens,] width) were expected, and at most "
            f"{MOST_REFERENCES:,} images"
        )
    return tensor


def _joined(tensor: Tensor) -> Tensor:
    """``b i ...`` as ``(b i) ...`` where the images have an axis of their own."""
    return tensor.flatten(0, 1) if tensor.ndim == 4 or (tensor.ndim == 3 and tensor.shape[1] < 16) else tensor


def combine_embeds(embeds: list[Tensor]) -> Tensor:
    """Embeds ``i ...`` of several nodes, one after the other. Raises InvalidInputError for those that do not fit."""
    first = embeds[0]
    if any(e.ndim != first.ndim or e.shape[1:] != first.shape[1:] for e in embeds):
        shapes = ", ".join(str(tuple(e.shape)) for e in embeds)
        raise InvalidInputError(f"embeds of different encoders or kinds cannot be combined: {shapes}")
    return torch.cat([e.to(first) for e in embeds])
