"""Image keys and values of one site, for whatever call asks: made once, or once per timestep."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..device_cache import DeviceCache
from .batch import Frames, fit_batch
from .call import SiteCall
from .masks import inference_mode
from .maths import KeyValue, OwnKeys, split_mean

TIMESTEPS_KEPT = 2
"""Timesteps whose K and V are kept: samplers of second order go back to the one before."""


class SiteKV(Protocol):
    """Image K and V of one site."""

    @property
    def constant(self) -> bool:
        """Whether they are the same at every step."""
        ...

    @property
    def silent(self) -> tuple[int, ...]:
        """Branches in which the image does nothing, so that no K and V of them are asked for."""
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

    def forget(self) -> None:
        """Forget all that can be made again."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Norms:
    """RMS norms of a layer's own, where its reach wants raw queries: their weights ``d``, None for a norm without.

    ``own`` is of the picture's own keys, which join the image's if ``own_keys``.
    """

    query: Tensor | None = None
    own: Tensor | None = None
    own_keys: bool = False


def undoing(adapter: Tensor | None, model: Tensor | None) -> Tensor | None:
    """What a normed query or key is multiplied with to be normed by the adapter's weight and not by the model's, ``d`` in fp32.

    RMS norms forget the length of what they get, so ``norm(x; w') = norm(x; w) / w * w'``. None: nothing to do.
    """
    if model is None:
        return None if adapter is None else adapter.detach().float()
    model = model.detach().float()
    return 1 / model if adapter is None else adapter.detach().float().to(model.device) / model


@dataclass(frozen=True, slots=True, eq=False)
class Baked:
    """K and V that are the same at every step, ``r m h n d`` each (branch, own reference per latent or 1, …), without any strength.

    ``r`` is 2, or 1 where the branches that see an image see the same. ``images`` is how many references share the n
    tokens evenly. ``_prepared`` keeps the arrangement that each kind of call needs; usual ones are views. Weights of
    ``norms`` go into the keys there.
    """

    k: Tensor
    v: Tensor
    images: int = 1
    silent: tuple[int, ...] = ()
    norms: Norms | None = None
    gate: Callable[[Tensor], Tensor] | None = None
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
        latents = 1 if shared else q.shape[0] // len(call.call.branches)
        key: tuple[Hashable, ...] = (branches, latents, flipped, q.device, q.dtype, per_image, inference_mode())
        if self.norms is not None:
            key = (*key, call.query_norm, call.key_norm)  # found by identity: another model's are other tensors
        found = self._prepared.get(key) if shared or frames is None else None
        if found is None:
            k, v = (self._arrange(t, branches, latents, flipped, frames) for t in (self.k, self.v))
            own = None
            if self.norms is not None:
                k, own = self._folded(k, self.norms, call)
            k, v = k.to(q.device, q.dtype), v.to(q.device, q.dtype)
            image_mean = self._image_mean(v) if per_image and self.images > 1 else None
            raw_query = self.norms is not None and call.query_norm is None
            found = KeyValue(k, v, split_mean(v), image_mean, raw_query, own, self.gate, self.images)
            if shared or frames is None:
                self._prepared.keep(key, found)
        return found

    @staticmethod
    def _folded(k: Tensor, norms: Norms, call: SiteCall) -> tuple[Tensor, OwnKeys | None]:
        """Image keys with all that differs between the model's norm of queries and the adapter's, and how own keys get it."""
        exact = k.dtype if k.dtype == torch.float64 else torch.float32
        query = undoing(norms.query, call.query_norm)
        if query is not None:
            k = k.to(exact) * query.to(k.device)
        if not norms.own_keys:
            return k, None
        own = undoing(norms.own, call.key_norm)
        both = [factor.to(call.q.device) for factor in (query, own) if factor is not None]
        scale = torch.ones(k.shape[-1], device=call.q.device)
        for factor in both:
            scale = scale * factor
        return k, OwnKeys(scale.repeat(k.shape[1]).to(call.q), call.key_norm is None)

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
            tensor = torch.stack([tensor[-1], torch.zeros_like(tensor[-1])])
        if tensor.shape[1] > 1:
            tensor = fit_batch(tensor, latents, frames, dim=1)
        if tensor.shape[0] == 1:
            return tensor[0] if tensor.shape[1] == 1 else tensor[0].repeat(len(branches), 1, 1, 1)
        start = branches[0]
        if branches == tuple(range(start, start + len(branches))):
            return tensor[start : start + len(branches)].flatten(0, 1)
        return tensor[list(branches)].flatten(0, 1)

    def release(self, device: torch.device) -> None:
        self._prepared.release(device)

    def forget(self) -> None:
        self._prepared.release()


@dataclass(frozen=True, slots=True, eq=False)
class TimedTokens:
    """Image tokens that depend on the timestep, for all sites of a model: those of the last timesteps are kept."""

    make: Callable[[float], Tensor]
    _kept: DeviceCache[Tensor] = field(default_factory=lambda: DeviceCache[Tensor](TIMESTEPS_KEPT), repr=False)

    def at(self, timestep: float) -> Tensor:
        """The tokens at a timestep of training, 0..1000."""
        return self._kept.made((timestep,), lambda: self.make(timestep))

    def release(self, device: torch.device) -> None:
        """Forget what lives on other devices than ``device``."""
        for key, tokens in self._kept.items():
            if tokens.device != device:
                self._kept.drop(key)

    def forget(self) -> None:
        """Forget all."""
        self._kept.release()


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """K and V of one site that depend on the timestep: ``project`` makes them of its tokens when they are first asked for.

    Those of the last timesteps are kept, or none with ``keep=False``, where those of all sites would be too many.
    """

    tokens: TimedTokens
    project: Callable[[Tensor, float], Baked]
    silent: tuple[int, ...] = ()
    keep: bool = True
    _kept: DeviceCache[Baked] = field(default_factory=lambda: DeviceCache[Baked](TIMESTEPS_KEPT), repr=False)

    @property
    def constant(self) -> bool:
        return False

    def at(self, call: SiteCall, branches: tuple[int, ...], flipped: bool, per_image: bool = False) -> KeyValue:
        """As SiteKV says."""
        timestep = call.call.timestep()
        baked = self._kept.get((timestep,))
        if baked is None:
            baked = self.project(self.tokens.at(timestep), timestep)
            if self.keep:
                self._kept.keep((timestep,), baked)
        return baked.at(call, branches, flipped, per_image)

    def release(self, device: torch.device) -> None:
        """As SiteKV says; what is forgotten is made again where it is needed next."""
        self.tokens.release(device)
        for key, baked in self._kept.items():
            baked.release(device)
            if baked.k.device != device:
                self._kept.drop(key)

    def forget(self) -> None:
        """As SiteKV says."""
        self.tokens.forget()
        self._kept.release()


class HeldKeys(nn.Module):
    """All that a prompt holds on a device for the sites of a model, as a module that a host's memory manager counts and moves.

    Its parameters are the K and V that are made once; ``transient`` counts the bytes of those that are made for a timestep.
    """

    def __init__(self, sites: tuple[SiteKV | None, ...], transient: int = 0) -> None:
        super().__init__()
        self.sites, self.transient = sites, transient
        self.register_buffer("where", torch.empty(0), persistent=False)
        self._kinds: list[weakref.ref[DeviceCache[Any]]] = []
        for i, site in enumerate(sites):
            if isinstance(site, Baked):
                for name, tensor in (("k", site.k), ("v", site.v)):
                    assert isinstance(tensor, nn.Parameter), "it moves with the module"
                    self.register_parameter(f"{name}{i}", tensor)

    @property
    def bytes(self) -> int:
        """What it takes on a device at most, without arrangements for other types and batches."""
        return self.transient + sum(p.numel() * p.element_size() for p in self.parameters())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kinds": []}  # a saved model has no patches that watch

    def watch(self, kinds: DeviceCache[Any]) -> None:
        """Let what a patch keeps ready go, too, when this moves."""
        self._kinds = [ref for ref in self._kinds if ref() is not None]
        self._kinds.append(weakref.ref(kinds))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeldKeys:
        before = self.get_buffer("where").device
        super()._apply(fn, recurse)
        if self.get_buffer("where").device == before:
            return self
        for kinds in filter(None, (ref() for ref in self._kinds)):
            kinds.release()
        for i, site in enumerate(self.sites):
            if isinstance(site, Baked):  # the parameters are usually the same, and new ones on some kinds of devices
                object.__setattr__(site, "k", self.get_parameter(f"k{i}"))
                object.__setattr__(site, "v", self.get_parameter(f"v{i}"))
            if site is not None:
                site.forget()
        return self
