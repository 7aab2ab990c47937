"""diffusers: image attention added inside a model by module hooks, by the entries of its kind of model.

Hooks leave all modules and processors in place, so others' work on the same model keeps running, and removing the hooks
restores the model exactly.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from threading import Lock
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...attention.call import ModelCall, SiteCall
from ...attention.masks import RegionMask
from ...attention.patch import AdapterPatch
from ...attention.recording import Recorder
from ...attention.schedule import WeightSchedule
from ...errors import IncompatibleAdapterError, InvalidInputError
from ...images.pictures import Picture
from ...models import BASE_MODELS, layout_of, listed
from ...models.chroma import walk_chroma
from ...models.flux import walk_flux
from ...models.reach import Reach
from ...models.sd3 import walk_sd3
from ...models.sites import ModelLayout, Site, Walk
from ...models.unet import walk_unet
from ..calls import Calls, eagerly, uncaptured, uncompiled
from .notes import Around, Beginning, Branches
from .pipelines import Asked, model_of
from .transformer import TransformerEntry
from .unet import UNetEntry


class Entry(Protocol):
    """How one kind of adapter enters one site: modules of it, run in every call, the last one after the others.

    The outputs of all but the last are listened to, the query's first. The image attention is added to what the last one
    reads (``before``) or gives.
    """

    @property
    def before(self) -> bool: ...
    @property
    def bypassed(self) -> str:
        """Why one of the modules did not run before the last, and what to do."""
        ...

    @property
    def skipped(self) -> bool:
        """Whether the last module may have run without the others because a cache of the host skips what is between."""
        ...

    def modules(self) -> tuple[nn.Module, ...]:
        """The modules now: a LoRA may have replaced them since the last call. Asked at every call."""
        ...

    def site(self, outputs: Sequence[Tensor], call: ModelCall) -> SiteCall:
        """What the modules before the last gave, as the attention of the tokens that ask."""
        ...

    def added(self, value: Any, call: ModelCall, add: Callable[[Tensor], Tensor]) -> object:
        """What the last module reads or gives, with ``add`` done to those same tokens."""
        ...


EntryAt = Callable[[nn.Module, ModelLayout, Site, Reach], Entry]
"""The entry of adapters with one reach at one site of a model. Raises IncompatibleAdapterError where there is none."""

ENTRIES: dict[Walk | None, EntryAt] = {
    walk_unet: UNetEntry.of,
    walk_flux: TransformerEntry.of,
    walk_chroma: TransformerEntry.of,
    walk_sd3: TransformerEntry.of,
}
"""By the walk that finds a model's sites, which related base models share. One file for each kind; ``unet`` is the plain one."""


def entry_of(layout: ModelLayout) -> EntryAt:
    """The way into a model's sites. Raises IncompatibleAdapterError where there is none yet."""
    entry = ENTRIES.get(layout.model.walk)
    if entry is None:
        raise IncompatibleAdapterError(
            f"image prompts cannot act in {layout.name} in diffusers yet; use a model of the "
            f"{listed((base for base in BASE_MODELS if base.walk in ENTRIES), 'or')} family"
        )
    return entry


@dataclass(slots=True, eq=False)
class _Call:
    """One call of a model with its image prompts, per hooked place, as they were when it began."""

    acting: tuple[tuple[AdapterPatch, ...], ...]
    model: ModelCall = field(default_factory=ModelCall)
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict[tuple[int, int], Tensor])


class AppliedAdapters:
    """Adapters acting on one model until ``remove()``; also a context manager that removes them at its end.

    Any number of threads may call the model. A call sees one state: changes act from the next one on.
    """

    def __init__(self, model: nn.Module, patches: Sequence[AdapterPatch], branches: Branches | Asked) -> None:
        self._patches, self._branches = tuple(patches), branches
        self._recorder: Recorder | None = None
        self.calls: Calls[_Call] = Calls()
        layout, reaches = patches[0].layout, dict.fromkeys(patch.reach for patch in patches)
        entry = entry_of(layout)
        self._places = [(i, reach) for reach in reaches for i in sorted(reach.sites(layout))]
        self._hooks = [
            _SiteHook(self, place, i, layout.sites[i], entry(model, layout, layout.sites[i], reach))
            for place, (i, reach) in enumerate(self._places)
        ]
        self._without = _Call(((),) * len(self._places))
        self._acting = self._per_place()
        self._removed = False
        self._around = Around.join(model, self)
        for hook in self._hooks:
            hook.attach()

    @property
    def patches(self) -> tuple[AdapterPatch, ...]:
        """What is applied now, in order."""
        return self._patches

    def set_schedule(self, schedule: WeightSchedule, index: int = 0) -> None:
        """Another schedule for one adapter from the next call of the model on; computes no keys or values."""
        self._replace(index, self._patches[index].with_schedule(schedule))

    def set_strength(self, strength: float, index: int = 0) -> None:
        """Another strength for one adapter, and else the same schedule; computes no keys or values."""
        self.set_schedule(replace(self._patches[index].schedule, strength=strength), index)

    def set_mask(self, mask: RegionMask | Picture | None, index: int = 0) -> None:
        """Another region for one adapter from the next call of the model on."""
        self._replace(index, self._patches[index].with_mask(mask))

    def record(self, recorder: Recorder | None) -> None:
        """Let ``recorder`` hear the model's calls from the next one on; None: nobody."""
        self._recorder = recorder

    def remove(self) -> None:
        """Take every hook off the model; it is then as it was before. Calling it again does nothing.

        Calls that other threads are inside of end as they began, and a gradient that a checkpoint with
        ``use_reentrant=True`` still has to compute sees what its call saw: the hooks go when these are over.
        """
        if not self._removed:
            self._removed = True
            self._acting = self._without.acting
            self.calls.when_over(self._detach)

    def __enter__(self) -> AppliedAdapters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _replace(self, index: int, patch: AdapterPatch) -> None:
        if self._removed:
            raise InvalidInputError("these adapters were removed from their model; apply them again")
        patches = list(self._patches)
        patches[index] = patch
        self._patches = tuple(patches)
        self._acting = self._per_place()
        self.calls.changed()

    def _per_place(self) -> tuple[tuple[AdapterPatch, ...], ...]:
        return tuple(
            tuple(patch for patch in self._patches if patch.reach == reach and patch.active(i))
            for i, reach in self._places
        )

    def _detach(self) -> None:
        self._around.leave(self)
        for hook in self._hooks:
            hook.detach()

    def begin(self, call: Beginning) -> None:
        """A call of the model begins."""
        if call.sample is None or call.timestep is None:
            return self.calls.begin(self._without)  # the model will say what it misses
        if not self._removed:
            for hook in self._hooks:
                hook.attach()  # a LoRA may have replaced the layers since
        told = self._branches
        model = (
            call.described(told.branches(call), told.flow(call)) if isinstance(told, Asked) else call.described(told)
        )
        if self._recorder is not None:
            model = self._recorder.begin(model)
        self.calls.begin(_Call(self._acting, model))

    def found(self) -> _Call:
        """The call of the model that a layer belongs to which runs outside of one."""
        return eagerly(self.calls.found, self._without, self._outside)

    def _outside(self) -> _Call:
        raise InvalidInputError(
            "an attention of this model ran on its own, outside of a call of the model, where an image prompt does not know its "
            "branches and progress; call the model itself, or remove the image prompt first"
        )


_ATTACHING = Lock()
_NUMBERS = count()
_HOOKS: WeakValueDictionary[int, _SiteHook] = WeakValueDictionary()
"""By number, which is what compiled code knows them by."""


class _SiteHook:
    """The hooks at one site for adapters of one reach: remember the query, add the image attention.

    They stay while the adapters are applied, also where no image acts now: compiled code is made for the hooks it saw.
    """

    def __init__(self, owner: AppliedAdapters, place: int, index: int, site: Site, entry: Entry) -> None:
        self.owner, self.place, self.index, self.site, self.entry = owner, place, index, site, entry
        self._calls = owner.calls
        self._modules: tuple[nn.Module, ...] = ()
        self._heard = 0
        self._handles: list[RemovableHandle] = []
        self._take_number()

    def _take_number(self) -> None:
        self.number = next(_NUMBERS)
        _HOOKS[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take_number()  # a copy is heard by itself

    def attach(self) -> None:
        modules = self.entry.modules()
        if self._current(modules):
            return
        with _ATTACHING:
            if not self._current(modules):
                self.detach()
                query, *more, join = modules
                self._heard = len(modules) - 1
                self._handles = [
                    query.register_forward_hook(self._remember),
                    *(m.register_forward_hook(partial(self._remember_at, i)) for i, m in enumerate(more, 1)),
                    join.register_forward_pre_hook(self._extend)
                    if self.entry.before
                    else join.register_forward_hook(self._extend_output),
                ]
                self._modules = modules

    def _current(self, modules: tuple[nn.Module, ...]) -> bool:
        return len(modules) == len(self._modules) and all(map(operator.is_, modules, self._modules))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._modules = [], ()

    def _remember(self, module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        call = self._calls.running()
        if call is None:
            call = self.owner.found()
        if call.acting[self.place]:
            call.outputs[self.place, 0] = output

    def _remember_at(self, number: int, module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        call = self._calls.running()
        if call is None:
            call = self.owner.found()
        if call.acting[self.place]:
            call.outputs[self.place, number] = output

    def _extend(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        call = self._calls.running()
        if call is None:
            call = self.owner.found()
        return (self._added(args[0], call), *args[1:]) if call.acting[self.place] else None

    def _extend_output(self, module: nn.Module, args: tuple[object, ...], output: object) -> object | None:
        call = self._calls.running()
        if call is None:
            call = self.owner.found()
        return self._added(output, call) if call.acting[self.place] else None

    def _added(self, value: object, call: _Call) -> object:
        found = [call.outputs.pop((self.place, number), None) for number in range(self._heard)]
        outputs = [output for output in found if output is not None]
        if len(outputs) != self._heard:
            if not outputs and self.entry.skipped:
                return value
            raise IncompatibleAdapterError(f"an image prompt cannot act at {self.site.path}: {self.entry.bypassed}")
        model = call.model
        return self.entry.added(value, model, partial(self._add, self.entry.site(outputs, model), call))

    def _add(self, at: SiteCall, call: _Call, base: Tensor) -> Tensor:
        if call.model.hearing is not None and torch.compiler.is_compiling():
            if add_heard is None or torch.is_grad_enabled():  # the operation has no gradient
                return eagerly(self._add_now, at, call, base)
            shape, norms = [] if at.shape is None else [*at.shape], (at.query_norm, at.key_norm)
            return add_heard(base, at.q, at.k, at.v, at.emb, *norms, shape, at.heads, at.text, self.number)
        return self._add_now(at, call, base)

    def _add_now(self, at: SiteCall, call: _Call, base: Tensor) -> Tensor:
        for patch in call.acting[self.place]:
            base = patch.add_to(base, self.index, at)
        return base

    def add_heard(self, at: Callable[[ModelCall], SiteCall], base: Tensor) -> Tensor:
        """What compiled code does here in a call that is recorded."""
        call = self._calls.running() or self.owner.found()
        return self._add_now(at(call.model), call, base)


# --- inside compiled code ---------------------------------------------------------------------------------------------


def _add_heard(
    base: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    emb: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    shape: Sequence[int],
    heads: int,
    text: int,
    number: int,
) -> Tensor:
    def at(call: ModelCall) -> SiteCall:
        return SiteCall(call, q, heads, shape or None, text, query_norm, key_norm, k, v, emb)

    out = _HOOKS[number].add_heard(at, base).contiguous()
    return out.clone() if out is base else out  # an operation must not give back what it was given


def _like_base(base: Tensor, *_: object) -> Tensor:
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


add_heard = uncaptured("add_heard", _add_heard, _like_base)
"""Image prompts in a call that is recorded: traced, every call's own recording would be part of the code, which would be made
anew for each. None where this torch cannot keep it out of CUDA graphs."""


def apply(model: nn.Module, *patches: AdapterPatch, branches: Branches | Asked = ("uncond", "cond")) -> AppliedAdapters:
    """Let image prompts act on a diffusers model (UNet2DConditionModel, FluxTransformer2DModel, …), besides whatever else is on it.

    ``branches`` says what the batch of a call consists of, in order: diffusers' pipelines put the negative prompt
    first; without classifier-free guidance it is ``("cond",)``; a callable is asked at every call. Pipelines of Flux and
    Chroma run the negative prompt in a call of its own, so use ``apply_to_pipeline`` there.
    Raises IncompatibleAdapterError if a patch was baked for another layout; the model is then untouched.
    """
    if not patches:
        raise InvalidInputError("apply() needs at least one image prompt")
    model = uncompiled(model)
    layout = layout_of(model)
    for patch in patches:
        if patch.layout != layout:
            raise IncompatibleAdapterError(
                f"{patch.name!r} was prepared for {patch.layout.name}, the model is {layout.name}; prepare it for this model"
            )
    return AppliedAdapters(model, patches, branches)


def apply_to_pipeline(pipeline: object, *patches: AdapterPatch) -> AppliedAdapters:
    """Like ``apply`` on a pipeline's UNet or transformer, asking the pipeline at every call what runs.

    That is whether guidance is on, which of Flux's or Chroma's calls is the negative prompt's, and the shift of the
    scheduler, without which ``start_percent`` and ``end_percent`` would not mean what they do in ComfyUI.
    Raises as ``apply``, and InvalidInputError for a pipeline without such a model.
    """
    return apply(model_of(pipeline), *patches, branches=Asked(pipeline))
