"""diffusers: image attention added between an attention's heads and its output projection, by module hooks.

Every attention processor of diffusers (default, sliced, xformers, custom, with LoRA layers) reads ``attn.to_q`` and ends
in ``attn.to_out[0]``. Hooking these two leaves all processors in place, so others' work on the same UNet keeps running,
and removing the hooks restores the model exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from types import TracebackType
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...attention.call import ModelCall, SiteCall
from ...attention.masks import RegionMask
from ...attention.patch import AdapterPatch
from ...attention.schedule import WeightSchedule
from ...errors import IncompatibleAdapterError, InvalidInputError
from ...models import layout_of
from ...models.sites import Site
from ..calls import Calls, eagerly, uncompiled
from .notes import Around, Beginning, Branch, Branches


@dataclass(slots=True, eq=False)
class _Call:
    """One UNet call with its image prompts, per site, as they were when it began."""

    sites: tuple[tuple[AdapterPatch, ...], ...]
    model: ModelCall = field(default_factory=ModelCall)
    q: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


class AppliedAdapters:
    """Adapters acting on one UNet until ``remove()``; also a context manager that removes them at its end.

    Any number of threads may call the UNet. A call sees one state: changes act from the next one on.
    """

    def __init__(self, unet: nn.Module, patches: Sequence[AdapterPatch], branches: Branches) -> None:
        self._patches, self._branches = tuple(patches), branches
        self.calls: Calls[_Call] = Calls()
        self._without = _Call(((),) * len(patches[0].layout.sites))
        self._sites = self._per_site()
        self._hooks = [
            _SiteHook(self, i, site, unet.get_submodule(site.path)) for i, site in enumerate(patches[0].layout.sites)
        ]
        self._removed = False
        self._around = Around.join(unet, self)
        for hook in self._hooks:
            hook.attach()

    @property
    def patches(self) -> tuple[AdapterPatch, ...]:
        """What is applied now, in order."""
        return self._patches

    def set_schedule(self, schedule: WeightSchedule, index: int = 0) -> None:
        """Another schedule for one adapter from the next UNet call on; computes no keys or values."""
        self._replace(index, self._patches[index].with_schedule(schedule))

    def set_mask(self, mask: RegionMask | Tensor | None, index: int = 0) -> None:
        """Another region for one adapter from the next UNet call on."""
        self._replace(index, self._patches[index].with_mask(mask))

    def remove(self) -> None:
        """Take every hook off the UNet; it is then as it was before. Calling it again does nothing.

        Calls that other threads are inside of end as they began, and a gradient that a checkpoint with
        ``use_reentrant=True`` still has to compute sees what its call saw: the hooks go when these are over.
        """
        if not self._removed:
            self._removed = True
            self._sites = self._without.sites
            self.calls.when_over(self._detach)

    def __enter__(self) -> AppliedAdapters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _replace(self, index: int, patch: AdapterPatch) -> None:
        if self._removed:
            raise InvalidInputError("these adapters were removed from their UNet; apply them again")
        patches = list(self._patches)
        patches[index] = patch
        self._patches = tuple(patches)
        self._sites = self._per_site()
        self.calls.changed()

    def _per_site(self) -> tuple[tuple[AdapterPatch, ...], ...]:
        sites = range(len(self._patches[0].layout.sites))
        return tuple(tuple(patch for patch in self._patches if patch.active(i)) for i in sites)

    def _detach(self) -> None:
        self._around.leave(self)
        for hook in self._hooks:
            hook.detach()

    def begin(self, call: Beginning) -> None:
        """A call of the UNet begins."""
        if call.sample is None or call.timestep is None:
            return self.calls.begin(self._without)  # the UNet will say what it misses
        if not self._removed:
            for hook in self._hooks:
                hook.attach()  # a LoRA may have replaced the layers since
        self.calls.begin(_Call(self._sites, call.described(self._branches)))

    def found(self) -> _Call:
        """The UNet call that a layer belongs to which runs outside of one."""
        return eagerly(self.calls.found, self._without, self._outside)

    def _outside(self) -> _Call:
        raise InvalidInputError(
            "an attention of this UNet ran on its own, outside of a call of the UNet, where an image prompt does not know its "
            "branches and progress; call the UNet itself, or remove the image prompt first"
        )

    @staticmethod
    def add(q: Tensor, base: Tensor, index: int, heads: int, call: _Call) -> Tensor:
        """Text attention ``base`` plus all image attention of one site."""
        site_call = SiteCall(call.model, q, heads)
        for patch in call.sites[index]:
            base = patch.add_to(base, index, site_call)
        return base


_ATTACHING = Lock()


class _SiteHook:
    """The pair of hooks on one attention: remember q, add before the output projection.

    They stay while the adapters are applied, also where no image acts now: compiled code is made for the hooks it saw.
    """

    def __init__(self, owner: AppliedAdapters, index: int, site: Site, attention: nn.Module) -> None:
        self.owner, self.index, self.site, self.attention = owner, index, site, attention
        self._calls = owner.calls
        self._modules: tuple[nn.Module, nn.Module] | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        children = cast(
            Any, self.attention
        )._modules  # ten times faster than attributes, and this is asked at every call
        modules = cast("tuple[nn.Module, nn.Module]", (children["to_q"], children["to_out"]._modules["0"]))
        if self._current(modules):
            return
        with _ATTACHING:
            if not self._current(modules):
                self.detach()
                self._handles = [
                    modules[0].register_forward_hook(self._remember),
                    modules[1].register_forward_pre_hook(self._extend),
                ]
                self._modules = modules

    def _current(self, modules: tuple[nn.Module, nn.Module]) -> bool:
        return self._modules is not None and self._modules[0] is modules[0] and self._modules[1] is modules[1]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._modules = [], None

    def _remember(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        call = self._calls.running()
        if call is None:
            call = self.owner.found()
        if call.sites[self.index]:
            call.q[self.index] = output

    def _extend(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        call = self._calls.running()
        if call is None:
            call = self.owner.found()
        if not call.sites[self.index]:
            return None
        q = call.q.pop(self.index, None)
        if q is None:
            raise IncompatibleAdapterError(
                f"the attention processor of {self.site.path} did not use attn.to_q, so an image prompt cannot act there; "
                "reset it with unet.set_default_attn_processor()"
            )
        return (self.owner.add(q, args[0], self.index, self.site.heads, call), *args[1:])


def apply(unet: nn.Module, *patches: AdapterPatch, branches: Branches = ("uncond", "cond")) -> AppliedAdapters:
    """Let image prompts act on a diffusers UNet2DConditionModel, besides whatever else is installed on it.

    ``branches`` says what the batch of a UNet call consists of, in order: diffusers' pipelines put the negative prompt
    first; without classifier-free guidance it is ``("cond",)``; a callable is asked at every call.
    Raises IncompatibleAdapterError if a patch was baked for another layout; the UNet is then untouched.
    """
    if not patches:
        raise InvalidInputError("apply() needs at least one image prompt")
    unet = uncompiled(unet)
    layout = layout_of(unet)
    for patch in patches:
        if patch.layout != layout:
            raise IncompatibleAdapterError(
                f"{patch.name!r} was prepared for {patch.layout.name}, the model is {layout.name}; prepare it for this model"
            )
    return AppliedAdapters(unet, patches, branches)


def apply_to_pipeline(pipeline: Any, *patches: AdapterPatch) -> AppliedAdapters:
    """Like ``apply`` on ``pipeline.unet``, asking the pipeline at every call whether guidance is on."""
    return apply(pipeline.unet, *patches, branches=_GuidanceOf(pipeline))


class _GuidanceOf:
    """The branches that a pipeline batches now. Copied with the pipeline it asks the copy, with a UNet alone the same one."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def __call__(self) -> Sequence[Branch]:
        guided = getattr(self._pipeline, "do_classifier_free_guidance", None)
        if guided is None:
            raise InvalidInputError(
                "the UNet was called before its pipeline was, so whether guidance is on is unknown; call the pipeline, or say "
                "what the batch consists of with apply(unet, ..., branches=...)"
            )
        return ("uncond", "cond") if guided else ("cond",)

    def __deepcopy__(self, memo: dict[int, Any]) -> _GuidanceOf:
        return _GuidanceOf(memo.get(id(self._pipeline), self._pipeline))
