"""Image keys and values of one site, for whatever call asks: made once, or once per timestep."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..device_cache import DeviceCache
from .batch import Frames, fit_batch
from .call import COND, SiteCall
from .masks import inference_mode
from .maths import KeyValue, split_mean

TIMESTEPS_KEPT = 2
"""Timesteps whose K and V are kept: samplers of second order go back to the one before."""


class SiteKV(Protocol):
    """Image K and V of one site."""

    @property
    def constant(self) -> bool:
        """Whether they are the same at every step."""
        ...

    def at(self, call: SiteCall, branches: tuple[int, ...], flipped: bool, per_image: bool = False) -> KeyValue:
        """K and V for chunks of the given branches, in dtype and on device of the call's queries.

        Flipped: the positive branch gets nothing, the negative one the positive's image. Per image: with the mean of
        each image's values apart.
        """
        ...

    def release(self, device: torch.device) -> None:
        """Forget what lives on other devices than ``device``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Baked:
    """K and V that are the same at every step, ``2 m h n d`` each (branch, own reference per latent or 1, …), without any strength.

    ``images`` is how many references share the n tokens evenly. ``_prepared`` keeps the arrangement that each kind of
    call needs; usual ones are views.
    """

    k: Tensor
    v: Tensor
    images: int = 1
    _prepared: DeviceCache[KeyValue] = field(default_factory=DeviceCache[KeyValue], repr=False)

    @property
    def constant(self) -> bool:
        return True

    def at(self, call: SiteCall, branches: tuple[int, ...], flipped: bool, per_image: bool = False) -> KeyValue:
        """As SiteKV says.

        A window of an animation is arranged anew for every call: there are as many as steps times windows, and a window's
        K and V can be as big as the rest of the batch.
        """
        q, frames = call.q, call.call.frames
        shared = self.k.shape[1] == 1
        latents = 1 if shared else q.shape[0] // len(branches)
        key = (branches, latents, flipped, q.device, q.dtype, per_image, inference_mode())
        found = self._prepared.get(key) if shared or frames is None else None
        if found is None:
            k, v = (
                self._arrange(t, branches, latents, flipped, frames).to(q.device, q.dtype) for t in (self.k, self.v)
            )
            found = KeyValue(k, v, split_mean(v), self._image_mean(v) if per_image and self.images > 1 else None)
            if shared or frames is None:
                self._prepared.keep(key, found)
        return found

    def _image_mean(self, v: Tensor) -> Tensor:
        per_image = v.unflatten(2, (self.images, -1))
        return per_image.mean(3, keepdim=True).expand_as(per_image).flatten(2, 3).contiguous()

    @staticmethod
    def _arrange(
        tensor: Tensor, branches: tuple[int, ...], latents: int, flipped: bool, frames: Frames | None
    ) -> Tensor:
        if not inference_mode() and not torch.compiler.is_compiling() and tensor.is_inference():
            tensor = tensor.clone()  # autograd may not save tensors made in inference mode
        if flipped:
            tensor = torch.stack([tensor[COND], torch.zeros_like(tensor[COND])])
        if tensor.shape[1] > 1:
            tensor = fit_batch(tensor, latents, frames, dim=1)
        start = branches[0]
        if branches == tuple(range(start, start + len(branches))):
            return tensor[start : start + len(branches)].flatten(0, 1)
        return tensor[list(branches)].flatten(0, 1)

    def release(self, device: torch.device) -> None:
        self._prepared.release(device)


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """K and V that depend on the timestep: ``make`` gives both as ``Baked`` holds them; those of the last timesteps are kept."""

    make: Callable[[float], tuple[Tensor, Tensor]]
    images: int = 1
    _kept: DeviceCache[Baked] = field(default_factory=lambda: DeviceCache[Baked](TIMESTEPS_KEPT), repr=False)

    @property
    def constant(self) -> bool:
        return False

    def at(self, call: SiteCall, branches: tuple[int, ...], flipped: bool, per_image: bool = False) -> KeyValue:
        timestep = call.call.timestep()
        baked = self._kept.get((timestep,))
        if baked is None:
            baked = self._kept.keep((timestep,), Baked(*self.make(timestep), self.images))
        return baked.at(call, branches, flipped, per_image)

    def release(self, device: torch.device) -> None:
        self._kept.release()
