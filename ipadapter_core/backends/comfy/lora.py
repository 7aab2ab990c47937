"""ComfyUI: LoRAs beside the layers of a duck-typed ModelPatcher, or merged by the host's own patching (comfy is not imported).

Unfused (graphs say live): a wrapper around every model call hooks the layers for the time of that call. Between calls nothing of ours is on
the model, which clones share, so clones cannot see each other's LoRAs and removal leaves no trace.
Merged: the host keeps, patches and restores weights itself; ours is only the formula that it calls per weight.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...lora.layer import Layer
from ...lora.matching import MatchedLoRA, Partial, TargetMatch, match_lora
from ...lora.patch import LoRAPatch
from ...lora.running import Running
from ...lora.targets import Target, TargetTable, targets_of
from ...lora.unfused import UnfusedLayer, UnfusedStack
from ...lora.update import wide
from ...lora.weights import Component, LoRAWeights
from ...models import layout_or_none
from ...models.sites import ModelLayout, Site
from ..calls import Calls, Hooks, eagerly, uncompiled, watch_hooks
from .blocks import unprompted
from .doors import DOORS
from .lora_names import KNOWN_ENCODERS, HostNames, encoders_of, with_host_names
from .marks import marked
from .notes import KEY, Attention, Executor, Options, PatcherLike, call_of, denoiser, install_notes, noted
from .unet import AttentionHook, Occupant, UNetDoor, key_part, occupant_of, torch_attention

LORA_KEY = "image_prompt_lora"
"""Our entry in transformer_options and the key of our wrapper."""


class LoRAPatcherLike(PatcherLike, Protocol):
    """What this backend needs of ComfyUI's ModelPatcher beyond the other one."""

    patches: dict[str, list[Any]]
    model: Any

    def add_patches(
        self, patches: Mapping[str, object], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> object: ...


TEXT: tuple[Component, ...] = ("te1", "te2", "te3")


def tables_of(
    model: LoRAPatcherLike | None, clip_model: nn.Module | None = None, names: HostNames | None = None
) -> dict[Component, TargetTable]:
    """The parts of a MODEL and of a CLIP's ``cond_stage_model``; ``names`` are those that the host knows of both."""
    tables: dict[Component, TargetTable] = {}
    unet = None if model is None else denoiser(model)
    if unet is not None:
        table = targets_of(unet)
        tables["denoiser"] = replace(table, targets=_hooked(unet, table.targets), widens=True)
    if clip_model is not None:
        inside = encoders_of(clip_model).items()
        parts: Sequence[Component] = [part for name, part in inside if name in KNOWN_ENCODERS] if inside else TEXT
        tables |= {part: table for part in parts if (table := targets_of(clip_model, part)).targets}
    return with_host_names(tables, names or {}, unet, clip_model)


def _hooked(unet: nn.Module, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The targets, of which RMS norms can only be merged: the host hands their weights to kernels and does not call them."""
    ahead = run_ahead(unet)
    return {
        path: replace(
            target,
            beside=not Layer(unet.get_submodule(path)).is_rms_norm and target.beside,
            ahead=path.split(".")[0] in ahead,
        )
        for path, target in targets.items()
    }


def run_ahead(unet: nn.Module) -> frozenset[str]:
    """The parts of a model that the host runs when it prepares a prompt, once for all steps.

    Since 0.10 models may have a method for that, which ``extra_conds`` of the host's model calls: the parts that it and the methods
    that it uses name (Anima's ``llm_adapter``, the connectors of LTX-2, MiniMax's refiner).
    """
    kind, children = type(unet), {name for name, _ in unet.named_children()}
    found, seen, todo = set[str](), set[str](), ["preprocess_text_embeds"]
    while todo:
        name = todo.pop()
        code = getattr(inspect.unwrap(getattr(kind, name, len)), "__code__", None)
        if code is not None and name not in seen:
            seen.add(name)
            found |= children.intersection(code.co_names)
            todo += [other for other in code.co_names if inspect.isfunction(getattr(kind, other, None))]
    return frozenset(found)


def place(
    weights: LoRAWeights,
    model: LoRAPatcherLike | None,
    clip_model: nn.Module | None = None,
    partial: Partial = "refuse",
    names: HostNames | None = None,
) -> MatchedLoRA:
    """A LoRA on a MODEL and a CLIP; the parts of what is None are left out. Raises as ``match_lora`` does."""
    tables = tables_of(model, clip_model, names)
    text = TEXT if clip_model is None else ()
    first: tuple[Component, ...] = ("denoiser",) if model is None else ()
    return match_lora(weights, tables, (*first, *text), partial)


# --- unfused ---------------------------------------------------------------------------------------------------------


def apply_unfused(model: LoRAPatcherLike, patch: LoRAPatch, attention: Attention | None = None) -> LoRAPatcherLike:
    """A clone of ``model`` on which a LoRA runs beside the layers, besides all that is applied already."""
    watch_hooks()
    clone = model.clone()
    stack = UnfusedStack((*unfused_patches(model), patch))
    clone.remove_wrappers_with_key("apply_model", LORA_KEY)
    if not stack.layers:
        return clone
    install_notes(clone)  # around ours: hooks that come later come first, so that image prompts hear what LoRAs made
    slots = _slots_of(model, stack.text_sites)
    modules = tuple(path for path in stack.text_sites if path not in slots)
    clone.add_wrapper_with_key("apply_model", LORA_KEY, UnfusedWrapper(stack, modules))
    for layout, site in slots.values():
        _install_region(clone, layout, site, attention or torch_attention)
    return clone


def apply_live(
    model: LoRAPatcherLike,
    patch: LoRAPatch,
    wrap: Callable[[tuple[Part, ...]], object],
    attention: Attention | None = None,
) -> LoRAPatcherLike:
    """``apply_unfused``, with what the host runs ahead of the model's calls merged by ``wrap``, as ``apply_merged`` has it."""
    ahead, rest = patch.apart()
    model = apply_unfused(model, rest, attention)
    return apply_merged(model, ahead, ("denoiser",), wrap) if ahead.acting("denoiser") else model


def _slots_of(model: PatcherLike, paths: Sequence[str]) -> dict[str, tuple[ModelLayout, Site]]:
    """Which of these cross-attentions are called through a UNet's slots, and so not as modules."""
    layout = layout_or_none(denoiser(model)) if paths else None
    if layout is None or not isinstance(DOORS.get(layout.model.walk), UNetDoor):
        return {}
    return {site.path: (layout, site) for site in layout.sites if site.path in paths}


def unfused_stack(model: PatcherLike) -> UnfusedStack | None:
    """What runs unfused on a MODEL, None if nothing does."""
    wrappers = model.wrappers.get("apply_model", {}).get(LORA_KEY, [])
    return next((w.stack for w in wrappers if isinstance(w, UnfusedWrapper)), None)


def unfused_patches(model: PatcherLike) -> tuple[LoRAPatch, ...]:
    """The LoRAs that run unfused on a MODEL, in order."""
    stack = unfused_stack(model)
    return () if stack is None else stack.patches


@dataclass(frozen=True, slots=True, eq=False)
class _Unfused:
    """What the attention hooks of masked LoRAs need in a model call under way."""

    stack: UnfusedStack
    running: Running
    unet: nn.Module


class UnfusedWrapper:
    """APPLY_MODEL wrapper: hooks the layers, lets the model run, takes the hooks off."""

    def __init__(self, stack: UnfusedStack, sites: Sequence[str] = ()) -> None:
        """``sites`` are cross-attentions with a text of their own in every region that are called as modules."""
        self.stack = stack
        self._calls: Calls[Running] = Calls()
        self._without = Running(tuple(patch.with_strength(0.0) for patch in stack.patches))
        hooks = [(path, _LayerHook(self, layer).add) for path, layer in stack.layers.items()]
        measuring = [(stack.measured, self._measure)] if stack.measured else []
        self._hooks = Hooks([*hooks, *measuring], with_kwargs=[(site, _SiteHook(self, site).blend) for site in sites])

    def __call__(self, executor: Executor, x: Tensor, *args: object, **kwargs: object) -> object:
        return eagerly(self._run, executor, x, *args, **kwargs)

    def _run(self, executor: Executor, x: Tensor, *args: object, **kwargs: object) -> object:
        unet = uncompiled(executor.class_obj.diffusion_model)
        running = Running(self.stack.patches, "denoiser", model := call_of(x, args, kwargs))
        args, kwargs = noted(args, kwargs, {KEY: model, LORA_KEY: _Unfused(self.stack, running, unet)})
        watch_hooks()
        with self._hooks.on(unet), marked(unet, lambda: "live LoRAs"):
            self._calls.begin(running)
            output: object = None
            try:
                output = executor(x, *args, **kwargs)
            finally:
                self._calls.end(output)
        return output

    def _measure(self, module: nn.Module, args: object, output: Tensor) -> None:
        eagerly(self._measured, int(output.shape[1]))

    def _measured(self, text: int) -> None:
        self.call().text = text

    def call(self) -> Running:
        """The call that a layer runs in; one without LoRAs where it runs in none of ours."""
        return self._calls.running() or self._calls.found(self._without, lambda: self._without)

    def __deepcopy__(self, memo: dict[int, object]) -> UnfusedWrapper:
        return self


class _LayerHook:
    """On one layer: its output with what the LoRAs add. Its name keeps code compiled for another layer from serving it."""

    def __init__(self, wrapper: UnfusedWrapper, layer: UnfusedLayer) -> None:
        self._wrapper, self._layer, self._name = wrapper, layer, f"{layer.path} {id(layer)}"

    def add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            assert self._name
            return eagerly(self._add, module, args, output)
        return self._add(module, args, output)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._layer.add(module, args[0], output, self._wrapper.call())


class _SiteHook:
    """On one cross-attention that is called as a module: it runs again with every region's keys and values, and all are blended.

    Image prompts in it stand beside: they are in what it gave, and not in the differences.
    """

    def __init__(self, wrapper: UnfusedWrapper, site: str) -> None:
        self._wrapper, self._site = wrapper, site

    def blend(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor) -> Tensor:
        return eagerly(self._blend, module, args, kwargs, output)

    def _blend(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor) -> Tensor:
        stack, call = self._wrapper.stack, self._wrapper.call()
        if not stack.regions_at(self._site, call):
            return output
        with unprompted() as prompted:
            base: Tensor = module.forward(*args, **kwargs) if prompted else output
            blended = stack.blend(self._site, base, call, lambda: module.forward(*args, **kwargs))
        return output + (blended - base) if prompted else blended


# --- text keys and values by region ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class RegionHook:
    """In one ``attn2`` slot: the attention once with the plain text, once per masked LoRA with its keys and values."""

    path: str
    previous: Occupant
    attention: Attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        base = out = self._attend(q, k, v, extra_options)
        unfused = extra_options.get(LORA_KEY)
        if not isinstance(unfused, _Unfused):
            return out
        for index in unfused.stack.regions_at(self.path, unfused.running):
            changed = [self._changed(unfused, name, index, t) for name, t in (("to_k", k), ("to_v", v))]
            if all(t is None for t in changed):
                continue
            own_k, own_v = (old if new is None else new for old, new in zip((k, v), changed, strict=True))
            regional = self._attend(q, own_k, own_v, extra_options)
            region = unfused.stack.region_at(self.path, index, base, unfused.running)
            out = torch.addcmul(out, regional - base, region)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        if self.previous is not None:
            return self.previous(q, k, v, options)
        precision = options.get("attn_precision")
        return self.attention(q, k, v, options["n_heads"], attn_precision=precision, transformer_options=options)

    def _changed(self, unfused: _Unfused, name: str, index: int, t: Tensor) -> Tensor | None:
        path = f"{self.path}.{name}"
        layer = unfused.stack.layers.get(path)
        if layer is None:
            return None
        return layer.masked_change(unfused.unet.get_submodule(path), index, t, unfused.running)

    def __deepcopy__(self, memo: dict[int, object]) -> RegionHook:
        return self


def _install_region(clone: PatcherLike, layout: ModelLayout, site: Site, attention: Attention) -> None:
    """Put a RegionHook into a slot once, under an image prompt's hook if there is one."""
    occupant = occupant_of(clone, site)
    found = occupant
    while found is not None:
        if isinstance(found, RegionHook):
            return
        found = getattr(found, "previous", None)
    if isinstance(occupant, AttentionHook):
        hook: AttentionHook | RegionHook = replace(
            occupant, previous=RegionHook(site.path, occupant.previous, attention)
        )
    else:
        hook = RegionHook(site.path, occupant, attention)
    clone.set_model_attn2_replace(hook, site.group, site.number, key_part(clone, layout, site))


# --- merged ----------------------------------------------------------------------------------------------------------

Part = tuple[TargetMatch, float]


def apply_merged(
    model: LoRAPatcherLike,
    patch: LoRAPatch,
    components: Sequence[Component],
    wrap: Callable[[tuple[Part, ...]], object],
) -> LoRAPatcherLike:
    """A clone whose weights the host will patch when it loads the model; ``model`` itself is untouched.

    ``wrap`` makes the host's kind of patch out of what acts on one parameter; it must keep that as ``parts``. All LoRAs
    of ours on one parameter become one patch, so that each is computed from the weight as it was before them.
    """
    clone = model.clone()
    prefix = "diffusion_model." if "denoiser" in components else ""
    found: dict[str, list[Part]] = {}
    for component in components:
        strength = patch.strength_for(component)
        for match, own in patch.acting(component):
            if strength * own != 0:
                found.setdefault(prefix + match.key, []).append((match, strength * own))
    added: dict[str, object] = {}
    for key, parts in found.items():
        others: list[object] = []
        before: list[Part] = []
        for entry in clone.patches.get(key, []):
            known: tuple[Part, ...] | None = getattr(entry[1], "parts", None)
            if isinstance(known, tuple):
                before += known
            else:
                others.append(entry)
        if before:
            clone.patches[key] = others
        added[key] = wrap((*before, *parts))
    if added:
        clone.add_patches(added, 1.0)
    return clone


def merge_parts(weight: Tensor, parts: Sequence[Part]) -> Tensor:
    """The change of one weight by several LoRAs, each from the weight as given; in float32 or wider.

    It has the weight's shape, or that of the one that gives it the most inputs.
    """
    pristine = wide(weight)
    total = pristine.new_zeros(widest(parts) or weight.shape)
    for match, strength in parts:
        inputs = (match.widened or tuple(weight.shape))[1:2]
        match.change(pristine, total.narrow(1, 0, *inputs) if inputs else total, strength)
    return total


def widest(parts: Sequence[Part]) -> tuple[int, ...] | None:
    """The shape of a weight after a merge that gives it more inputs; None if none does."""
    return max((shape for match, _ in parts if (shape := match.widened)), default=None)
