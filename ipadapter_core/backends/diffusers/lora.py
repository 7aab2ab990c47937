"""diffusers and transformers: LoRAs beside the layers by module hooks, or merged into the weights and taken out again.

Forward hooks leave every module in place, so quantised and offloaded layers, image prompts and other packages' layers
keep working, and removing the hooks restores the model exactly.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ...attention.call import ModelCall
from ...errors import InvalidInputError
from ...lora.matching import Partial, TargetMatch, match_lora
from ...lora.patch import LoRAPatch
from ...lora.running import Running
from ...lora.targets import TargetTable, targets_of
from ...lora.unfused import UnfusedLayer, UnfusedStack
from ...lora.update import shape_text, wide
from ...lora.weights import Component, LoRAWeights
from ..calls import Calls, eagerly, uncompiled
from .notes import Around, Beginning, Branches
from .pipelines import Asked

Part = tuple[TargetMatch, float]


def place(pipeline: object, weights: LoRAWeights, *, partial: Partial = "refuse") -> LoRAPatch:
    """A LoRA on a pipeline's UNet or transformer and its text encoders, at strength 1.

    ``partial``: "allow" applies what fits of a file of which much has no place. Raises IncompatibleAdapterError if it
    belongs to another base model or would be applied in part only.
    """
    tables: dict[Component, TargetTable] = {c: targets_of(module, c) for c, module in parts_of(pipeline).items()}
    return LoRAPatch(match_lora(weights, tables, partial=partial))


def parts_of(pipeline: object) -> dict[Component, nn.Module]:
    """The modules of a pipeline that a LoRA can change; a bare UNet or transformer counts as one."""
    if isinstance(pipeline, nn.Module):
        return {"denoiser": uncompiled(pipeline)}
    names: Mapping[str, Component] = {
        "unet": "denoiser",
        "transformer": "denoiser",
        "text_encoder": "te1",
        "text_encoder_2": "te2",
        "text_encoder_3": "te3",
    }
    found: dict[Component, nn.Module] = {}
    for name, component in names.items():
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module):
            module = uncompiled(module)
            is_t5 = name == "text_encoder_2" and type(module).__name__.startswith("T5")  # Flux has no CLIP-G
            found["te3" if is_t5 else component] = module
    return found


class UnfusedLoRAs:
    """LoRAs beside the layers of a pipeline or a module, until ``remove()``; also a context manager that removes them.

    Any number of threads may call the models. A call sees one state: changes act from the next one on.
    """

    def __init__(self, pipeline: object, patches: Sequence[LoRAPatch], branches: Branches) -> None:
        self._patches = tuple(patches)
        self._branches, self._asked = branches, Asked(pipeline)
        stacks = [(module, UnfusedStack(patches, component)) for component, module in parts_of(pipeline).items()]
        self._parts = [_UnfusedPart(self, module, stack) for module, stack in stacks if stack.layers]

    @property
    def patches(self) -> tuple[LoRAPatch, ...]:
        """What is applied now, in order."""
        return self._patches

    def set_strength(self, strength: float, index: int | None = None) -> None:
        """Another strength for one LoRA, or for all, from the next call on. Writes no weight."""
        chosen = range(len(self._patches)) if index is None else (range(len(self._patches))[index],)
        self._replace(tuple(p.with_strength(strength) if i in chosen else p for i, p in enumerate(self._patches)))

    def set_patch(self, patch: LoRAPatch, index: int = 0) -> None:
        """Another strength, window or mask for the same LoRA; a new selector needs a new ``apply``."""
        if patch.matched is not self._patches[index].matched or patch.selector != self._patches[index].selector:
            raise InvalidInputError(
                "this is another LoRA or selector than the one applied; remove it and apply the new one"
            )
        if (patch.mask is None) != (self._patches[index].mask is None):
            raise InvalidInputError(
                "a mask cannot be added or taken away while applied; remove the LoRA and apply it anew"
            )
        patches = list(self._patches)
        patches[index] = patch
        self._replace(tuple(patches))

    @contextmanager
    def strength(self, value: float, index: int | None = None) -> Generator[UnfusedLoRAs]:
        """``with lora.strength(0): …`` runs at another strength and returns to the former ones."""
        before = self._patches
        self.set_strength(value, index)
        try:
            yield self
        finally:
            self._replace(before)

    def remove(self) -> None:
        """Take every hook off; the model is then as it was. Calling it again does nothing.

        Calls that other threads are inside of end as they began, and a gradient that a checkpoint with
        ``use_reentrant=True`` still has to compute sees what its call saw: the hooks go when these are over.
        """
        for part in self._parts:
            part.remove()

    def __enter__(self) -> UnfusedLoRAs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _replace(self, patches: tuple[LoRAPatch, ...]) -> None:
        self._patches = patches
        for part in self._parts:
            part.calls.changed()

    def running(self, component: Component, call: Beginning) -> Running:
        """What runs in a call that begins now."""
        if component != "denoiser":
            return Running(self._patches, component, ModelCall())
        model = call.described(self._branches, self._asked.flow(call))
        return Running(self._patches, component, model)


LiveLoRAs = UnfusedLoRAs  # older name


class _UnfusedPart:
    """The hooks on one module: around its calls, on its layers, and on attentions whose text changes by region."""

    def __init__(self, owner: UnfusedLoRAs, module: nn.Module, stack: UnfusedStack) -> None:
        self.owner, self.stack = owner, stack
        self.calls: Calls[Running] = Calls()
        self._without = Running(tuple(patch.with_strength(0.0) for patch in stack.patches), stack.component)
        self._removed = False
        self._handles: list[RemovableHandle] = []
        self._around = Around.join(module, self)
        for path, layer in stack.layers.items():
            # first in line: whoever reads the layer's output, an image prompt its q, sees it with the LoRA
            hook = _LayerHook(self, layer)
            self._handles.append(module.get_submodule(path).register_forward_hook(hook.add, prepend=True))
        if stack.measured:
            self._handles.append(
                module.get_submodule(stack.measured).register_forward_hook(self._measure, prepend=True)
            )
        for site in stack.text_sites:
            regions = _RegionHook(self, site)
            attention = module.get_submodule(site)
            self._handles.append(attention.register_forward_hook(regions.blend, with_kwargs=True))

    def remove(self) -> None:
        self._removed = True
        self.calls.when_over(self._detach)

    def _detach(self) -> None:
        self._around.leave(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.stack.release()

    def begin(self, call: Beginning) -> None:
        """A call of the module begins."""
        self.calls.begin(self._without if self._removed else self.owner.running(self.stack.component, call))

    def found(self) -> Running:
        """The call that a layer belongs to which runs outside of one."""
        return self.calls.found(self._without, self._outside)

    def _measure(self, module: nn.Module, args: object, output: Tensor) -> None:
        eagerly(self._measured, int(output.shape[1]))

    def _measured(self, text: int) -> None:
        (self.calls.running() or self.found()).text = text

    def _outside(self) -> Running:
        """A layer that runs on its own: a constant strength needs no more to be known."""
        return Running(self.owner.patches, self.stack.component)


class _LayerHook:
    """On one layer: its output with what the LoRAs add."""

    def __init__(self, part: _UnfusedPart, layer: UnfusedLayer) -> None:
        self._part, self._calls, self._layer = part, part.calls, layer

    def add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return eagerly(self._add, module, args, output)
        return self._add(module, args, output)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._layer.add(module, args[0], output, self._calls.running() or self._part.found())


class _RegionHook:
    """On one cross-attention: every region has text keys and values of its own; it runs once for each, and they are blended."""

    def __init__(self, part: _UnfusedPart, site: str) -> None:
        self._part, self._site = part, site

    def blend(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor) -> Tensor:
        return eagerly(self._blend, module, args, kwargs, output)

    def _blend(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor) -> Tensor:
        call = self._part.calls.running() or self._part.found()
        return self._part.stack.blend(self._site, output, call, lambda: module.forward(*args, **kwargs))


def apply(pipeline: object, *patches: LoRAPatch, branches: Branches = ("cond",)) -> UnfusedLoRAs:
    """Let LoRAs run beside the layers of a pipeline, or of a bare UNet or transformer; no weight is written.

    ``branches`` says what the batch of a call consists of (for ``uncond_strength`` and masks per latent); a callable is
    asked at every call. diffusers' pipelines put the negative prompt first.
    """
    if not patches:
        raise InvalidInputError("apply() needs at least one LoRA")
    return UnfusedLoRAs(pipeline, patches, branches)


@dataclass(slots=True, eq=False)
class _Merged:
    """A parameter with LoRAs in it: its weight without them, who put in what, and a mark of what was written."""

    pristine: Tensor
    parts: Parts
    mark: Tensor


class _Owner:
    """Stands for one merge; where it is gone, nobody can take that out any more."""


Parts = dict[ref[_Owner], Sequence[Part]]
_MERGED: MutableMapping[Tensor, _Merged] = WeakTensorKeyDictionary()
"""By parameter. All merges of a parameter start from the same pristine weight, so they may go in any order."""
_MERGING = Lock()


def _forget_lasting(gone: ref[_Owner]) -> None:
    """Free the pristine weights of parameters from which nobody can take anything out."""
    for parameter, merged in list(_MERGED.items()):
        if all(owner() is None for owner in merged.parts):
            _MERGED.pop(parameter, None)


class MergedLoRAs:
    """LoRAs written into the weights, which are kept aside and come back with ``remove()``, bit for bit.

    Several may be on one model and go in any order. A weight is written only after all were checked, and after an error
    all are as before.
    """

    def __init__(self, pipeline: object, patches: Sequence[LoRAPatch]) -> None:
        for patch in patches:
            if patch.needs_unfused:
                raise InvalidInputError(f"{patch.name} cannot be merged: {patch.needs_unfused}; use apply()")
        self._parameters: list[Tensor] = []
        self._owner = _Owner()
        me = ref(self._owner, _forget_lasting)
        found: dict[int, tuple[str, Tensor, list[Part]]] = {}
        for component, module in parts_of(pipeline).items():
            for path, parts in _by_parameter(patches, component).items():
                owner, _, name = path.rpartition(".")
                parameter: Tensor = getattr(module.get_submodule(owner), name)
                found.setdefault(id(parameter), (path, parameter, []))[2].extend(parts)  # modules may share one
        self.writes = len(found)
        with _MERGING:
            for path, parameter, parts in found.values():
                _check_mergeable(path, parameter, parts)
            _check_unchanged(parameter for _, parameter, _ in found.values())
            changes: list[tuple[str, Tensor, Parts]] = []
            for path, parameter, parts in found.values():
                merged = _MERGED.get(parameter)
                changes.append((path, parameter, {**({} if merged is None else merged.parts), me: parts}))
            _write(changes)
            self._parameters = [parameter for _, parameter, _ in changes]

    def remove(self) -> None:
        """Take these LoRAs out again: the weights are as they were, or hold what others merged.

        Raises InvalidInputError, and changes nothing, if a weight was changed by something else in the meantime.
        """
        with _MERGING:
            _check_unchanged(self._parameters)
            changes: list[tuple[str, Tensor, Parts]] = []
            for parameter in self._parameters:
                merged = _MERGED[parameter]
                left = {owner: parts for owner, parts in merged.parts.items() if owner() is not self._owner}
                changes.append(("a weight", parameter, left))
            _write(changes)
            self._parameters = []

    def __enter__(self) -> MergedLoRAs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _check_mergeable(path: str, parameter: Tensor, parts: Sequence[Part]) -> None:
    plain = type(parameter) in (Tensor, nn.Parameter) and type(parameter.data) is Tensor
    if not plain or parameter.dtype not in _MERGEABLE or parameter.is_meta:
        raise InvalidInputError(
            f"{path} is stored as {parameter.dtype} on {parameter.device} ({type(parameter).__name__}), which cannot be "
            "merged; use apply(), the live mode"
        )
    if parameter.is_inference() and not torch.is_inference_mode_enabled():
        raise InvalidInputError(
            f"{path} was made in torch.inference_mode(), where alone it can be written; merge there, or use apply()"
        )
    for match, _ in parts:
        shape = match.target.shape[: 1 if match.parameter == "bias" else None]
        if tuple(parameter.shape) != shape:
            raise InvalidInputError(
                f"{path} is {shape_text(tuple(parameter.shape))} now and was {shape_text(shape)} when the LoRA was placed; place it "
                "again on this model"
            )


def _check_unchanged(parameters: Iterable[Tensor]) -> None:
    """Weights with LoRAs in them must be what was written: else what was kept aside is not what they came from."""
    merged = [(p, _MERGED[p]) for p in parameters if p in _MERGED]
    changed = [
        p for p, m in merged
        if p.dtype != m.pristine.dtype or p.shape != m.pristine.shape or not torch.equal(_mark(p), m.mark.to(p.device))
    ]  # fmt: skip
    if changed:
        raise InvalidInputError(
            f"{len(changed)} of {len(merged)} weights with merged LoRAs were changed by something else since (weights loaded, "
            "another dtype, another merge), so the kept ones no longer fit; load the model anew, and next time remove the "
            "LoRAs first"
        )


def _mark(parameter: Tensor) -> Tensor:
    """A number that any change of the weight's bits changes, but for a coincidence."""
    return parameter.detach().contiguous().view(_INTEGERS[parameter.dtype.itemsize]).sum(dtype=torch.int64)


_MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _write(changes: Sequence[tuple[str, Tensor, Parts]]) -> None:
    """Write every parameter from its pristine weight with these parts; after an error all are as before."""
    former: list[tuple[Tensor, Tensor, _Merged | None]] = []
    try:
        for path, parameter, owners in changes:
            merged = _MERGED.get(parameter)
            before = parameter.detach().clone()
            pristine = before if merged is None else merged.pristine.to(parameter.device)
            weight = _changed(path, pristine, [part for parts in owners.values() for part in parts])
            former.append((parameter, before, merged))
            parameter.data.copy_(weight)
            if any(owner() is not None for owner in owners):
                _MERGED[parameter] = _Merged(pristine, owners, _mark(parameter))
            else:
                _MERGED.pop(parameter, None)
    except BaseException:
        for parameter, before, merged in former:
            parameter.data.copy_(before)
            if merged is None:
                _MERGED.pop(parameter, None)
            else:
                _MERGED[parameter] = merged
        raise


def _changed(path: str, pristine: Tensor, parts: Sequence[Part]) -> Tensor:
    """A weight with LoRAs in it, each computed from the pristine one; in its dtype."""
    if not parts:
        return pristine
    base = wide(pristine)
    total = base.clone()
    for match, strength in parts:
        match.change(base, total, strength)
    weight = total.to(pristine.dtype)
    if not bool(torch.isfinite(weight).all()) and bool(torch.isfinite(pristine).all()):
        raise InvalidInputError(
            f"merging would make {path} infinite or NaN in {pristine.dtype}; lower the strength, or use apply(), the live mode"
        )
    return weight


def _by_parameter(patches: Sequence[LoRAPatch], component: Component) -> dict[str, list[Part]]:
    """What acts on each parameter; every change is made from the pristine weight, so order does not matter."""
    found: dict[str, list[Part]] = {}
    for patch in patches:
        strength = patch.strength_for(component)
        for match, factor in patch.acting(component):
            if strength * factor != 0:
                found.setdefault(match.key, []).append((match, strength * factor))
    return found


def merge(pipeline: object, *patches: LoRAPatch) -> MergedLoRAs:
    """Write LoRAs into the weights: nothing per step, a write of every weight per change."""
    if not patches:
        raise InvalidInputError("merge() needs at least one LoRA")
    return MergedLoRAs(pipeline, patches)
