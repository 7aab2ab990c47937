"""ComfyUI: image attention through ``attn2`` replace patches of a duck-typed ModelPatcher (comfy is not imported).

A hook sits in every site's slot, keeps whatever was there and calls it first. Two stateless wrappers tell the hooks
what a model call consists of: which chunks belong to the negative prompt (by the guider's names, not by index, so that
dual-CFG and perp-neg guiders work), which part of the latent each chunk sees, and how far sampling is.
"""

from __future__ import annotations

import copy
import math
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, cast
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.batch import Frames
from ...attention.masks import Area
from ...attention.maths import split_heads
from ...attention.patch import COND, UNCOND, AdapterPatch, SiteCall
from ...errors import IncompatibleAdapterError
from ...models import layout_of
from ...models.sites import ModelLayout, Site
from ..calls import Hooks, uncompiled, watch_hooks

KEY = "image_prompt"
"""Our entry in transformer_options and the key of our wrappers."""

NEGATIVE_NAMES = frozenset({"negative", "empty_negative_prompt"})
"""Names under which guiders keep conditionings without the image; all others carry it."""

Attention = Callable[..., Tensor]
Options = Mapping[str, Any]


class PatcherLike(Protocol):
    """What this backend needs of ComfyUI's ModelPatcher."""

    model_options: dict[str, Any]
    wrappers: dict[str, dict[str, list[Callable[..., Any]]]]

    def clone(self) -> PatcherLike: ...
    def get_model_object(self, name: str) -> Any: ...
    def set_model_attn2_replace(
        self, patch: Any, block_name: str, number: int, transformer_index: int | None = None
    ) -> None: ...
    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None: ...
    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None: ...


def comfy_layout(model: PatcherLike) -> ModelLayout:
    """Sites of a ComfyUI MODEL; IncompatibleAdapterError if it is no UNet with cross-attention."""
    unet: nn.Module = model.get_model_object("diffusion_model")
    return layout_of(unet)


def apply(model: PatcherLike, patch: AdapterPatch, attention: Attention | None = None) -> PatcherLike:
    """A clone of ``model`` on which ``patch`` acts besides everything already applied; ``model`` itself is untouched.

    ``attention`` is the host's ``(q, k, v, heads, attn_precision=, transformer_options=)`` for the text part.
    """
    watch_hooks()
    layout = comfy_layout(model)
    if layout != patch.layout:
        raise IncompatibleAdapterError(
            f"the image prompt was prepared for {patch.layout.name}, the model is {layout.name}; prepare it for this model"
        )
    clone = model.clone()
    slots = _slots(clone)
    for index, site in enumerate(layout.sites):
        if patch.active(index):
            hook = AttentionHook.joining(_occupant(slots, site), index, patch, attention or torch_attention)
            clone.set_model_attn2_replace(hook, site.group, site.number, _key_part(slots, layout, site))
    for kind, wrapper in (("predict_noise", note_step), ("calc_cond_batch", note_chunks)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def applied_patches(model: PatcherLike) -> tuple[AdapterPatch, ...]:
    """The image prompts that act on a MODEL, in order; one that acts nowhere leaves no trace and is not listed."""
    hooks = [hook for hook in _slots(model).values() if isinstance(hook, AttentionHook)]
    return tuple(dict.fromkeys(patch for hook in hooks for patch in hook.patches))


def occupant_of(model: PatcherLike, site: Site) -> Any:
    """What sits in a site's ``attn2`` slot of a MODEL, None if nothing."""
    return _occupant(_slots(model), site)


def key_part(model: PatcherLike, layout: ModelLayout, site: Site) -> int | None:
    """The third part of the key under which a hook for this site belongs; None for a two-part key."""
    return _key_part(_slots(model), layout, site)


def _slots(model: PatcherLike) -> Mapping[Any, Any]:
    options: Mapping[str, Any] = model.model_options.get("transformer_options", {})
    return cast("Mapping[Any, Any]", options.get("patches_replace", {}).get("attn2", {}))


def _key_part(slots: Mapping[Any, Any], layout: ModelLayout, site: Site) -> int | None:
    # The field's convention: the only block of a spatial transformer is addressed without its index.
    two_part = layout.alone(site) and (site.group, site.number, site.depth) not in slots
    return None if two_part else site.depth


def _occupant(slots: Mapping[Any, Any], site: Site) -> Any:
    """What the host would call at this site: a three-part key beats a two-part one."""
    return slots.get((site.group, site.number, site.depth), slots.get((site.group, site.number)))


# --- what a model call consists of -----------------------------------------------------------------------------------


@dataclass(slots=True)
class StepNote:
    """One sampling step: the guider's conditionings, and the progress, computed when first asked.

    A conditioning is known by the identity of its list, or by its entries' uuids: context windows make new lists of
    copied entries.
    """

    names: dict[int, str]
    sigma: Tensor
    sampling: Any
    entries: Mapping[object, str] = field(default_factory=dict[object, str])
    _percent: float | None = None

    def name(self, conds: Sequence[dict[str, Any]] | None) -> str | None:
        """The guider's name of a conditioning; None for one that the guider does not have."""
        found = self.names.get(id(conds))
        if found is None:
            found = next((self.entries[e["uuid"]] for e in conds or () if e.get("uuid") in self.entries), None)
        return found

    def percent(self) -> float:
        """Sampling progress 0..1; reading sigma synchronises the device, once per step and only for windows or curves."""
        if self._percent is None:
            self._percent = percent_of(float(self.sigma.flatten()[0]), self.sampling)
        return self._percent


@dataclass(frozen=True, slots=True)
class Chunk:
    branch: int
    area: Area | None


@dataclass(frozen=True, slots=True)
class CallNote:
    """The conditionings of one ``calc_cond_batch`` by uuid, and the size of the whole latent."""

    step: StepNote | None
    chunks: Mapping[object, Chunk]
    latent: tuple[int, int]


_PROGRESS: WeakKeyDictionary[object, list[float]] = WeakKeyDictionary()
"""Per model_sampling: -log sigma at progress 0, 1/999, …, 1."""


def percent_of(sigma: float, sampling: Any) -> float:
    """Sampling progress 0..1 at which ``sampling.percent_to_sigma`` gives sigma; log-linear between timesteps, as it is."""
    table = _PROGRESS.get(sampling)
    if table is None:
        table = _PROGRESS[sampling] = _progress_table(sampling)
    value = -math.log(sigma) if sigma > 0 else math.inf
    if value <= table[0] or value >= table[-1]:
        return float(value >= table[-1])
    i = bisect_right(table, value)
    return (i - 1 + (value - table[i - 1]) / (table[i] - table[i - 1])) / (len(table) - 1)


def _progress_table(sampling: Any) -> list[float]:
    if isinstance(sampling, nn.Module):  # its buffers live on the device, where each look-up would synchronise
        sampling = copy.deepcopy(sampling).cpu()
    # The host answers 0 and 1 with "infinite" and zero sigmas, not with the schedule's ends.
    percents = (min(max(i / 999, 1e-7), 1 - 1e-7) for i in range(1000))
    return [-math.log(max(sampling.percent_to_sigma(percent), 1e-30)) for percent in percents]


def note_step(
    executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: Any = None
) -> Any:
    """PREDICT_NOISE wrapper: remember which conditioning is which, and the sigma."""
    guider = executor.class_obj
    conds: Mapping[str, Any] = getattr(guider, "conds", {})
    sampling = getattr(guider.inner_model, "model_sampling", None)
    if sampling is not None:
        given = {name: cond for name, cond in conds.items() if cond is not None}
        names = {id(cond): name for name, cond in given.items()}
        owners = [(entry.get("uuid"), name) for name, cond in given.items() for entry in cond]
        shared = Counter(uuid for uuid, _ in owners)  # the host copies uuids when it completes area conditionings
        entries = {uuid: name for uuid, name in owners if shared[uuid] == 1}
        model_options = _with_note(model_options or {}, StepNote(names, timestep, sampling, entries))
    return executor(x, timestep, model_options, seed)


def note_chunks(
    executor: Any,
    model: Any,
    conds: Sequence[Sequence[dict[str, Any]] | None],
    x: Tensor,
    timestep: Tensor,
    model_options: dict[str, Any],
) -> Any:
    """CALC_COND_BATCH wrapper: remember branch and area of every conditioning by its uuid."""
    found = model_options.get("transformer_options", {}).get(KEY)
    step = found if isinstance(found, StepNote) else found.step if isinstance(found, CallNote) else None
    if step is None and hasattr(model, "model_sampling"):
        step = StepNote({}, timestep, model.model_sampling)
    latent = (int(x.shape[-2]), int(x.shape[-1]))
    chunks: dict[object, Chunk] = {}
    distinct: list[Any] = []
    for index, entries in enumerate(conds):
        name = step.name(entries) if step is not None else None
        negative = index == 1 if name is None else name in NEGATIVE_NAMES
        copied: list[dict[str, Any]] = []
        for entry in entries or ():
            if entry.get("uuid") in chunks:  # the host copies uuids when it completes area conditionings
                entry = dict[str, Any](entry, uuid=uuid4())
            chunks[entry.get("uuid")] = Chunk(UNCOND if negative else COND, _area(entry.get("area"), latent))
            copied.append(entry)
        distinct.append(None if entries is None else copied)
    noted = _with_note(model_options, CallNote(step, chunks, latent))
    unet = getattr(model, "diffusion_model", None)
    slots = noted["transformer_options"].get("patches_replace", {}).get("attn2", {})
    with marked(unet, lambda: f"image prompts in {sorted(map(repr, slots))}"):
        return executor(model, distinct, x, timestep, noted)


class _Mark:
    """A hook that does nothing but have a name, for which compiled code is checked."""

    def __init__(self, name: str) -> None:
        self.name = name

    def look(self, *_: object) -> None:
        assert self.name


_MARKED: WeakKeyDictionary[nn.Module, dict[str, Hooks]] = WeakKeyDictionary()
"""Per UNet and what acts on it: a mark on the layers of every transformer block."""
_LAYERS = (".norm1", ".norm2", ".norm3", ".attn1.to_q", ".attn2.to_q")
"""In a block: those between which a graph may break."""


def marked(unet: object, what: Callable[[], str]) -> AbstractContextManager[None]:
    """For the time of a call: what tells code compiled for it apart from code for other calls and other blocks.

    The host keeps torch.compile from looking at transformer_options, which say what acts and which block it is. Code of
    a model without image prompts, or of another block of the same shape, would be run.
    """
    if "torch._dynamo" not in sys.modules or not isinstance(unet, nn.Module):
        return nullcontext()
    watch_hooks()
    unet = uncompiled(unet)
    known, name = _MARKED.setdefault(unet, {}), what()
    if name not in known:
        paths = [path for path, _ in unet.named_modules() if ".transformer_blocks." in path and path.endswith(_LAYERS)]
        known[name] = Hooks({path: _Mark(f"{path}, {name}").look for path in paths})
    return known[name].on(unet)


def _with_note(model_options: dict[str, Any], note: object) -> dict[str, Any]:
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), KEY: note}}


def _area(area: Sequence[Any] | None, latent: tuple[int, int]) -> Area | None:
    if area is None or len(area) != 4 or not all(isinstance(value, int) for value in area):
        return None
    height, width, top, left = area
    return min(height, latent[0] - top), min(width, latent[1] - left), top, left


# --- the hook ---------------------------------------------------------------------------------------------------------


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    """Plain attention ``b l c`` for callers outside ComfyUI."""
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionHook:
    """Occupies one ``attn2`` slot: text attention (or what was there before), then every image prompt in turn.

    Frozen: applying another prompt makes a new hook, so model clones that share this one never change.
    """

    index: int
    patches: tuple[AdapterPatch, ...]
    previous: Callable[..., Tensor] | None
    attention: Attention

    @classmethod
    def joining(cls, occupant: Any, index: int, patch: AdapterPatch, attention: Attention) -> AttentionHook:
        """A hook for a slot that may hold nothing, a hook of ours or somebody else's callable."""
        if isinstance(occupant, AttentionHook):
            return cls(index, (*occupant.patches, patch), occupant.previous, attention)
        return cls(index, (patch,), occupant, attention)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        if torch.compiler.is_compiling():
            # ComfyUI drops guards on transformer_options: traced, this call's branches would be frozen into the graph.
            return cast(Any, torch.compiler.disable(self._run))(q, k, v, extra_options)
        return self._run(q, k, v, extra_options)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        heads: int = extra_options["n_heads"]
        if self.previous is not None:
            out = self.previous(q, k, v, extra_options)
        else:
            precision = extra_options.get("attn_precision")
            out = self.attention(q, k, v, heads, attn_precision=precision, transformer_options=extra_options)
        call = site_call(q, heads, extra_options)
        for patch in self.patches:
            out = patch.add_to(out, self.index, call)
        return out

    def to(self, device: Any) -> AttentionHook:
        """The host moves patches when it (un)loads a model: copies on an accelerator are dropped with it."""
        if isinstance(device, torch.device) and device.type == "cpu":
            for patch in self.patches:
                patch.sites[self.index].release(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionHook:
        return self  # hosts before 0.13 deep-copy model options in every clone


def site_call(q: Tensor, heads: int, options: Options) -> SiteCall:
    """Translate ComfyUI's ``extra_options`` of one attention call."""
    note = options.get(KEY)
    order: Sequence[int] = options.get("cond_or_uncond") or (0,)
    size: Sequence[int] | None = options.get("original_shape")
    latent = (int(size[-2]), int(size[-1])) if size is not None else None
    areas: tuple[Area | None, ...] | None = None
    if isinstance(note, CallNote):
        fallback = [Chunk(UNCOND if index == 1 else COND, None) for index in order]
        uuids: Sequence[object] = options.get("uuids") or (None,) * len(order)
        chunks = [note.chunks.get(uuid, other) for uuid, other in zip(uuids, fallback, strict=True)]
        branches = tuple(chunk.branch for chunk in chunks)
        if any(chunk.area is not None for chunk in chunks):
            areas = tuple(chunk.area for chunk in chunks)
        if latent is None or areas is not None:
            latent = note.latent
    else:
        branches = tuple(UNCOND if index == 1 else COND for index in order)
    step = note.step if isinstance(note, CallNote) else note if isinstance(note, StepNote) else None
    shape = options.get("activations_shape")
    grid = (int(shape[-2]), int(shape[-1])) if shape is not None and shape[-2] * shape[-1] == q.shape[1] else None
    return SiteCall(
        q,
        heads,
        branches,
        step.percent if step is not None else _unknown_percent,
        latent,
        grid,
        areas,
        _frames(options.get("ad_params")) or _window(options.get("context_window")),
        tuple(order),
        (int(size[-2]), int(size[-1])) if size is not None else None,
    )


def _frames(ad_params: Any) -> Frames | None:
    """AnimateDiff's context window: ``{"sub_idxs": [...] or None, "full_length": n}``."""
    if not isinstance(ad_params, Mapping):
        return None
    params = cast("Mapping[str, Any]", ad_params)
    numbers = params.get("sub_idxs")
    if numbers is None:
        return None
    frames = tuple(int(number) for number in numbers)
    return Frames(frames, int(params.get("full_length") or max(frames) + 1))


def _window(window: Any) -> Frames | None:
    """The host's own context window, where it cuts the batch (``dim`` 0: each latent is a frame)."""
    numbers = getattr(window, "index_list", None)
    if not isinstance(numbers, (list, tuple)) or getattr(window, "dim", None) != 0:
        return None
    frames = tuple(int(number) for number in cast("Sequence[int]", numbers))
    return Frames(frames, int(getattr(window, "total_frames", 0) or max(frames) + 1))


def _unknown_percent() -> float:
    raise IncompatibleAdapterError(
        "this sampler runs the model outside ComfyUI's guiders, so the sampling progress is unknown; set start to 0, end to 1 "
        "and remove the curve, or use a sampler built on ComfyUI's own"
    )
