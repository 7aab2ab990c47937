"""Region masks: how much of every latent token lies inside, averaged over exactly the latents that it covers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device_cache import DeviceCache
from ..errors import InvalidInputError
from ..images.pictures import Picture, as_mask
from ..models.grids import Size, TokenGrid
from .batch import Frames, fit_batch
from .call import Area, ModelCall


@dataclass(frozen=True, slots=True, eq=False)
class RegionMask:
    """Region masks ``m y x`` in 0..1 at image resolution: one for the batch (m = 1) or one per latent.

    Grids are computed once per resolution and kept, those of an animation's windows up to a limit.
    """

    values: Tensor
    _grids: DeviceCache[Tensor] = field(default_factory=DeviceCache[Tensor], repr=False)
    rows: DeviceCache[Tensor] = field(default_factory=DeviceCache[Tensor], repr=False)
    """What is made of the grids for layers, kept by those who make it."""

    @classmethod
    def from_tensor(cls, mask: Tensor, *, clamp: bool = True) -> RegionMask:
        """Check a mask ``y x``, ``m y x`` or ``m 1 y x``; values are clamped to 0..1.

        ``clamp=False`` takes them as they are, as ComfyUI_IPAdapter_plus did, but for NaN, which is 0 then.
        """
        if mask.ndim == 4 and mask.shape[1] == 1:
            mask = mask[:, 0]
        if mask.ndim == 2:
            mask = mask[None]
        if mask.ndim != 3 or 0 in mask.shape:
            raise InvalidInputError(
                f"a region mask has the shape (height, width) or (count, height, width), got {tuple(mask.shape)}"
            )
        mask = mask.detach().to(torch.float32)
        finite = all(math.isfinite(value.item()) for value in torch.aminmax(mask))  # one pass, and no copies of it
        if clamp:
            if not finite:
                raise InvalidInputError("the region mask holds NaN or infinite values")
            return cls(mask.clamp(0, 1))
        return cls(mask if finite else mask.nan_to_num(0, 1, 0))

    @classmethod
    def of(cls, mask: RegionMask | Picture | None, *, clamp: bool = True) -> RegionMask | None:
        """A region mask as it is, or one made of a mask in any form that people have: white is inside."""
        return mask if mask is None or isinstance(mask, RegionMask) else cls.from_tensor(as_mask(mask), clamp=clamp)

    def grid(
        self,
        latent: Size,
        area: Area | None,
        grid: TokenGrid,
        like: Tensor,
        batch: int,
        frames: Frames | None = None,
    ) -> Tensor:
        """Weight per token ``m (h w) 1`` for a site of this grid, on the device and in the dtype of ``like``.

        ``latent`` is the size of the whole latent, ``area`` the part this call sees (None: all of it). ``m`` is 1 for a
        shared mask, else ``batch``: surplus masks are dropped, missing ones repeat the last.
        """
        key = (latent, area, grid, like.device, like.dtype, batch, frames, inference_mode())
        found = self._grids.get(key)
        if found is None:
            rows = self._fit(self._compute(latent, area, grid), batch, frames)
            found = self._grids.keep(key, rows.to(like.device, like.dtype))
        return found

    def stretched(self, size: Size, mode: str, like: Tensor, batch: int, frames: Frames | None = None) -> Tensor:
        """Weight per token ``m l 1`` by the geometry of ComfyUI_IPAdapter_plus, see Rules.stretched_masks.

        ``size`` is the latent's size in this call, ``like`` has the ``l`` tokens.
        """
        tokens = like.shape[1]
        key = (size, mode, tokens, like.device, like.dtype, batch, frames, inference_mode())
        found = self._grids.get(key)
        if found is None:
            rows = int(size[0] / math.sqrt(size[0] * size[1] / tokens))
            rows += tokens % rows != 0
            grid = F.interpolate(self.values[:, None], size=(rows, tokens // rows), mode=mode)
            flat = self._fit(grid.flatten(1)[..., None], batch, frames)
            missing = tokens - flat.shape[1]
            if missing > 0:
                flat = F.pad(flat, (0, 0, missing // 2, missing - missing // 2))
            elif missing < 0:
                flat = flat[:, -missing // 2 :][:, :tokens]
            found = self._grids.keep(key, flat.to(like.device, like.dtype))
        return found

    @staticmethod
    def _fit(rows: Tensor, batch: int, frames: Frames | None) -> Tensor:
        return rows if rows.shape[0] == 1 else fit_batch(rows, batch, frames)

    def _compute(self, latent: Size, area: Area | None, grid: TokenGrid) -> Tensor:
        mask = self.values[:, None]
        mask = F.adaptive_avg_pool2d(mask, latent) if _shrinks(mask, latent) else _stretch(mask, latent)
        if area is not None:
            height, width, top, left = area
            mask = mask[..., top : top + height, left : left + width]
        rows, columns, cell = grid
        while cell > 1:  # means of means, as a UNet halves: at ragged ends the last latent counts double
            step = 2 if cell % 2 == 0 else cell
            mask, cell = F.avg_pool2d(mask, step, ceil_mode=True, count_include_pad=False), cell // step
        size = rows, columns
        if tuple(mask.shape[-2:]) != size:  # a patched UNet (deep shrink) may use sizes of its own
            mask = F.adaptive_avg_pool2d(mask, size) if _shrinks(mask, size) else _stretch(mask, size)
        return mask.flatten(1)[..., None]


def token_rows(
    mask: RegionMask, call: ModelCall, grid: TokenGrid, like: Tensor, latents: int, *, front: int = 0, behind: int = 0
) -> Tensor:
    """How much of every token lies inside, ``1|b l 1``, for chunks of so many latents.

    The picture's tokens lie as the grid says, once for each moment of a video. Those in ``front`` of them and ``behind``
    them, text or other pictures, take the part of the picture that the region covers.
    """
    assert call.latent is not None
    areas = call.areas or (None,) * len(call.branches)
    grids = [mask.grid(call.latent, area, grid, like, latents, call.frames) for area in areas]
    if all(other is grids[0] for other in grids):
        rows = grids[0]
        rows = rows if rows.shape[0] == 1 or len(grids) == 1 else rows.repeat(len(grids), 1, 1)
    else:
        rows = torch.cat([rows.expand(latents, -1, -1) for rows in grids])
    if not front and not behind and call.times == 1:
        return rows
    share = rows.mean(1, keepdim=True)
    parts = (share.expand(-1, front, -1), *(rows,) * call.times, share.expand(-1, behind, -1))
    return torch.cat(parts, 1)


def inference_mode() -> bool:
    """Whether tensors made now are inference tensors, which autograd refuses later; unknowable while compiling."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _shrinks(mask: Tensor, size: Size) -> bool:
    return mask.shape[-2] >= size[0] and mask.shape[-1] >= size[1]


def _stretch(mask: Tensor, size: Size) -> Tensor:
    return F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
