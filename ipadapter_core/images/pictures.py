"""Pictures and masks as people have them: tensors, arrays, Pillow's pictures and files, all as the core's tensors."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InvalidInputError, quoted
from ..files.text import read_bytes
from .files import MAX_FILE, decode_grey, grey_levels, read_picture, to_tensor, upright

if TYPE_CHECKING:
    from numpy.typing import NDArray

Picture: TypeAlias = "Tensor | Image.Image | NDArray[Any] | str | os.PathLike[str]"
"""A picture, or several of one size: a tensor ``y x c`` or ``i y x c`` in 0..1, an array of the same axes (integers of 8 or 16 bits
count from 0 to 255 or 65535, floats from 0 to 1), a picture of Pillow, or the path of a file."""

_WHITE = {"uint8": 255.0, "uint16": 65535.0, "bool": 1.0}


def as_picture(picture: Picture) -> Tensor:
    """A picture as float32 tensor; one of Pillow or of a file is upright and has 3 channels, or 4 with transparency.

    Tensors are returned as they are. Raises as ``images.files.read_picture``, and InvalidInputError for anything else.
    """
    if isinstance(picture, Tensor):
        return picture
    if isinstance(picture, Image.Image):
        return to_tensor(upright(picture))
    if isinstance(picture, np.ndarray):
        values = _levels(picture)
        return values[..., None] if values.ndim == 2 else values
    return to_tensor(read_picture(_path(picture)))


def as_mask(mask: Picture) -> Tensor:
    """A mask as float32 tensor ``y x``, or as many as an array or tensor has; white is 1, colours are averaged.

    Raises as ``as_picture``.
    """
    if isinstance(mask, Tensor):
        return mask
    if isinstance(mask, Image.Image):
        return grey_levels(mask)
    if isinstance(mask, np.ndarray):
        return _levels(mask)
    path = _path(mask)
    return decode_grey(read_bytes(path, MAX_FILE), str(path))


def _path(picture: object) -> str:
    if isinstance(picture, (str, os.PathLike)):
        return os.fspath(picture)  # pyright: ignore[reportReturnType]
    raise InvalidInputError(
        f"a picture is a tensor, an array, a picture of Pillow or the path of a file, got {quoted(type(picture).__name__)}"
    )


def _levels(array: NDArray[Any]) -> Tensor:
    """The values of an array in 0..1."""
    white = _WHITE.get(array.dtype.name)
    if white is None and array.dtype.kind != "f":
        raise InvalidInputError(
            f"an array of {array.dtype.name} says not what is white: give uint8 (0 to 255), uint16 (0 to 65535) or floats (0 to 1)"
        )
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return values if white is None else values / white
