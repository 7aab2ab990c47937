"""Features of a picture's tiles, put together again as the feature of the whole picture."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import IncompatibleEncoderError


def merge_tiles(features: Tensor) -> Tensor:
    """Features of n x n parts of one image to one feature of the size that the whole image has, ``1 ...``.

    Tokens are laid out as the picture they are, stitched and averaged down again; the class token, where there is one, is the
    parts' mean.
    A pooled embedding ``e`` is treated as a square picture of numbers where e is a square, and averaged where it is not
    (ComfyUI_IPAdapter_plus stops there with an error).
    """
    grid = round(len(features) ** 0.5)
    if features.ndim == 2:
        side = round(features.shape[1] ** 0.5)
        if side * side != features.shape[1]:
            return features.mean(0, keepdim=True)
        return _stitch(features[..., None], grid, side)[..., 0]
    count = features.shape[1]
    first = int(math.isqrt(count) ** 2 != count)
    side = math.isqrt(count - first)
    if side * side != count - first:
        raise IncompatibleEncoderError(
            f"the encoder gives {count} tokens, which are no square picture with or without a class token; tiles need that"
        )
    return torch.cat([features[:, :first].mean(0, keepdim=True), _stitch(features[:, first:], grid, side)], 1)


def _stitch(tokens: Tensor, grid: int, side: int) -> Tensor:
    """Tokens ``(grid grid) (side side) c`` of a picture's parts, averaged to ``1 (side side) c`` of the whole."""
    parts = tokens.unflatten(0, (grid, grid)).unflatten(2, (side, side))
    whole = parts.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # c (grid side) (grid side)
    return F.adaptive_avg_pool2d(whole, (side, side)).flatten(1).T[None]
