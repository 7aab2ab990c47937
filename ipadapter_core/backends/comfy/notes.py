"""ComfyUI: what a model call consists of, told to every hook inside of it (comfy is not imported).

Three stateless wrappers note it from the outside in: a sampling step (which conditioning is the negative prompt, by the
guider's names and not by index, so that dual-CFG and perp-neg guiders work, and how far sampling is), the conditionings
of a step (which part of the latent each sees), and the model call itself.
"""

from __future__ import annotations

import copy
import math
import sys
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...attention.batch import Frames
from ...attention.call import COND, UNCOND, Area, ModelCall
from ...attention.recording import Recorder
from ...errors import IncompatibleAdapterError
from .blocks import acting_inside, prompts_in, without_prompts
from .compiled import acting
from .marks import marked

if TYPE_CHECKING:
    from typing_extensions import Self

KEY = "image_prompt"
"""Our entry in transformer_options and the key of our wrappers."""

RECORDER = "image_prompt_recorder"
"""Who hears a MODEL's calls: an entry in its transformer_options."""

NEGATIVE_NAMES = frozenset({"negative", "empty_negative_prompt"})
"""Names under which guiders keep conditionings without the image; all others carry it."""

Attention = Callable[..., Tensor]
"""The host's ``(q, k, v, heads, attn_precision=, transformer_options=)``."""
Options = Mapping[str, Any]
"""The host's transformer_options, in hooks extra_options."""
HostDict = dict[str, Any]
"""Another dictionary of the host with text keys: model_options, a conditioning."""


class Executor(Protocol):
    """The host's next wrapper, or what it wraps: a bound method of ``class_obj``."""

    class_obj: Any

    def __call__(self, *args: object, **kwargs: object) -> object: ...


class Sampling(Protocol):
    """What this backend needs of ComfyUI's model_sampling."""

    def percent_to_sigma(self, percent: float) -> float: ...
    def timestep(self, sigma: Tensor) -> Tensor: ...


class PatcherLike(Protocol):
    """What this backend needs of ComfyUI's ModelPatcher."""

    model_options: HostDict
    wrappers: dict[str, dict[str, list[Callable[..., Any]]]]

    def clone(self) -> Self: ...
    def get_model_object(self, name: str) -> object: ...
    def set_model_attn2_replace(
        self, patch: object, block_name: str, number: int, transformer_index: int | None = None
    ) -> object: ...
    def set_model_patch_replace(
        self, patch: object, name: str, block_name: str, number: int, transformer_index: int | None = None
    ) -> object: ...
    def set_model_patch(self, patch: object, name: str) -> object: ...
    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., object]) -> None: ...
    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None: ...


def denoiser(model: PatcherLike) -> nn.Module:
    """The UNet or transformer inside a MODEL."""
    found = model.get_model_object("diffusion_model")
    assert isinstance(found, nn.Module)
    return found


def install_notes(clone: PatcherLike) -> None:
    """Put the wrappers on a clone, once each."""
    for kind, wrapper in (("predict_noise", note_step), ("calc_cond_batch", note_chunks), ("apply_model", note_call)):
        if not clone.wrappers.get(kind, {}).get(KEY):
            clone.add_wrapper_with_key(kind, KEY, wrapper)


@dataclass(slots=True)
class StepNote:
    """One sampling step: the guider's conditionings, and the progress, computed when first asked.

    A conditioning is known by the identity of its list, or by its entries' uuids: context windows make new lists of
    copied entries.
    """

    names: dict[int, str]
    sigma: Tensor
    sampling: Sampling
    entries: Mapping[object, str] = field(default_factory=dict[object, str])
    _percent: float | None = None
    _timestep: float | None = None

    def name(self, conds: Sequence[HostDict] | None) -> str | None:
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

    def timestep(self) -> float:
        """The timestep of training, 0..1000; asked only by image tokens that depend on it."""
        if self._timestep is None:
            self._timestep = timestep_of(self.sigma.flatten()[:1], self.sampling)
        return self._timestep


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


def percent_of(sigma: float, sampling: Sampling) -> float:
    """Sampling progress 0..1 at which ``sampling.percent_to_sigma`` gives sigma; log-linear between timesteps, as it is."""
    table = _PROGRESS.get(sampling)
    if table is None:
        table = _PROGRESS[sampling] = _progress_table(sampling)
    value = -math.log(sigma) if sigma > 0 else math.inf
    if value <= table[0] or value >= table[-1]:
        return float(value >= table[-1])
    i = bisect_right(table, value)
    return (i - 1 + (value - table[i - 1]) / (table[i] - table[i - 1])) / (len(table) - 1)


def timestep_of(sigma: Tensor, sampling: Sampling) -> float:
    """The timestep 0..1000 at which a model was trained with this sigma ``1``.

    Flow models are called with sigma times a number of their own (1 for Flux, 1000 for SD3).
    """
    last = _LAST_TIMESTEP.get(sampling)
    if last is None:
        last = _LAST_TIMESTEP[sampling] = float(sampling.timestep(torch.ones_like(sigma)).flatten()[0])
    value = float(sampling.timestep(sigma).flatten()[0])
    return value * 1000 / last if last in (1.0, 1000.0) else value


_LAST_TIMESTEP: WeakKeyDictionary[object, float] = WeakKeyDictionary()
"""Per model_sampling: what a model is called with at a sigma of 1."""


def _progress_table(sampling: Sampling) -> list[float]:
    if isinstance(sampling, nn.Module):  # its buffers live on the device, where each look-up would synchronise
        sampling = copy.deepcopy(sampling).cpu()
    # The host answers 0 and 1 with "infinite" and zero sigmas, not with the schedule's ends.
    percents = (min(max(i / 999, 1e-7), 1 - 1e-7) for i in range(1000))
    return [-math.log(max(sampling.percent_to_sigma(percent), 1e-30)) for percent in percents]


def note_step(
    executor: Executor, x: Tensor, timestep: Tensor, model_options: HostDict | None = None, seed: object = None
) -> object:
    """PREDICT_NOISE wrapper: remember which conditioning is which, and the sigma."""
    guider = executor.class_obj
    conds: Mapping[str, Sequence[HostDict] | None] = getattr(guider, "conds", {})
    sampling = getattr(guider.inner_model, "model_sampling", None)
    if sampling is not None:
        given = {name: cond for name, cond in conds.items() if cond is not None}
        names = {id(cond): name for name, cond in given.items()}
        owners = [(entry.get("uuid"), name) for name, cond in given.items() for entry in cond]
        shared = Counter(uuid for uuid, _ in owners)  # the host copies uuids when it completes area conditionings
        entries: dict[object, str] = {uuid: name for uuid, name in owners if shared[uuid] == 1}
        model_options = _with_note(model_options or {}, StepNote(names, timestep, sampling, entries))
    return executor(x, timestep, model_options, seed)


def note_chunks(
    executor: Executor,
    model: object,
    conds: Sequence[Sequence[HostDict] | None],
    x: Tensor,
    timestep: Tensor,
    model_options: HostDict,
) -> object:
    """CALC_COND_BATCH wrapper: remember branch and area of every conditioning by its uuid."""
    found = model_options.get("transformer_options", {}).get(KEY)
    step = found if isinstance(found, StepNote) else found.step if isinstance(found, CallNote) else None
    sampling: Sampling | None = getattr(model, "model_sampling", None)
    if step is None and sampling is not None:
        step = StepNote({}, timestep, sampling)
    latent = (int(x.shape[-2]), int(x.shape[-1]))
    chunks: dict[object, Chunk] = {}
    distinct: list[list[HostDict] | None] = []
    for index, entries in enumerate(conds):
        name = step.name(entries) if step is not None else None
        negative = index == 1 if name is None else name in NEGATIVE_NAMES
        copied: list[HostDict] = []
        for entry in entries or ():
            if entry.get("uuid") in chunks:  # the host copies uuids when it completes area conditionings
                entry = HostDict(entry, uuid=uuid4())
            chunks[entry.get("uuid")] = Chunk(UNCOND if negative else COND, _area(entry.get("area"), latent))
            copied.append(entry)
        distinct.append(None if entries is None else copied)
    return executor(model, distinct, x, timestep, _with_note(model_options, CallNote(step, chunks, latent)))


def _with_note(model_options: HostDict, note: object) -> HostDict:
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), KEY: note}}


def _area(area: Sequence[object] | None, latent: tuple[int, int]) -> Area | None:
    """The host's four numbers of a picture, or six with frames in front of each three: sizes, then places."""
    sides = [side for side in area or () if isinstance(side, int)]
    if area is None or len(area) != len(sides) or len(sides) not in (4, 6):
        return None
    axes = len(sides) // 2
    height, width, top, left = *sides[axes - 2 : axes], *sides[-2:]
    return min(height, latent[0] - top), min(width, latent[1] - left), top, left


# --- the call itself -------------------------------------------------------------------------------------------------


def note_call(executor: Executor, x: Tensor, *args: object, **kwargs: object) -> object:
    """APPLY_MODEL wrapper: describe the call, once for all that acts in it."""
    call = call_of(x, args, kwargs)
    prompts, model = tuple(prompts_in(_options(args, kwargs))), getattr(executor.class_obj, "diffusion_model", None)
    options = {**without_prompts(_options(args, kwargs)), KEY: call}
    recorder = options.pop(RECORDER, None)  # compiled code that found it here would miss it in calls without
    if isinstance(recorder, Recorder):
        options[KEY] = call = recorder.begin(call)
    args, kwargs = _with_options(args, kwargs, options)
    if not prompts and "torch._dynamo" not in sys.modules:  # nothing is compiled
        return executor(x, *args, **kwargs)
    with ExitStack() as around:
        if prompts and isinstance(model, nn.Module):
            around.enter_context(acting_inside(model, call, prompts))
        if "torch._dynamo" in sys.modules:
            hooks = _hooks(options)
            kinds = sorted(f"{slot!r} {getattr(hook, 'kind', '')}" for slot, hook in hooks.items())
            around.enter_context(acting(call, hooks.values()))
            around.enter_context(marked(model, lambda: f"image prompts in {kinds}"))
        return executor(x, *args, **kwargs)


def _hooks(options: Options) -> dict[object, object]:
    """Everything in the host's slots, by kind and place: one at each place of ``patches_replace``, lists in ``patches``."""
    replaced: Mapping[str, Mapping[object, object]] = options.get("patches_replace", {})
    lists: Mapping[str, Sequence[object]] = options.get("patches", {})
    slots: dict[object, object] = {(kind, key): hook for kind, of in replaced.items() for key, hook in of.items()}
    return slots | {(kind, i): hook for kind, hooks in lists.items() for i, hook in enumerate(hooks)}


def call_of(x: Tensor, args: Sequence[object], kwargs: Mapping[str, object]) -> ModelCall:
    """The call of ``apply_model(x, *args, **kwargs)``, described now or already."""
    options, size = _options(args, kwargs), (int(x.shape[-2]), int(x.shape[-1]))
    call = options.get(KEY)
    return call if isinstance(call, ModelCall) and call.size == size else _model_call(options, x.shape)


def noted(
    args: tuple[object, ...], kwargs: dict[str, object], entries: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments of ``apply_model(x, *args, **kwargs)`` with entries in their transformer_options."""
    return _with_options(args, kwargs, {**_options(args, kwargs), **entries})


def _with_options(
    args: tuple[object, ...], kwargs: dict[str, object], options: Options
) -> tuple[tuple[object, ...], dict[str, object]]:
    if len(args) > _OPTIONS:
        return (*args[:_OPTIONS], options, *args[_OPTIONS + 1 :]), kwargs
    return args, {**kwargs, "transformer_options": options}


_OPTIONS = 4
"""In apply_model(x, t, c_concat, c_crossattn, control, transformer_options), counted behind x."""


def _options(args: Sequence[object], kwargs: Mapping[str, object]) -> Options:
    return cast(Options, args[_OPTIONS] if len(args) > _OPTIONS else kwargs.get("transformer_options", {}))


def call_at(options: Options) -> ModelCall:
    """The call that a hook with these ``extra_options`` runs in, described here if the wrapper above did not run."""
    call = options.get(KEY)
    if isinstance(call, ModelCall):
        return call
    shape: Sequence[int] | None = options.get("original_shape")  # a list that every call of a UNet makes anew
    if shape is None or shape is not _LAST.shape:
        _LAST.shape, _LAST.call = shape, _model_call(options, shape)
    return _LAST.call


class _Last(threading.local):
    """The call that this thread described last at one of its hooks."""

    def __init__(self) -> None:
        self.shape: Sequence[int] | None = None
        self.call = ModelCall()


_LAST = _Last()


def _model_call(options: Options, shape: Sequence[int] | None) -> ModelCall:
    """Translate the transformer_options of one model call on latents ``b c h w``, or ``b c t h w`` of a video."""
    note = options.get(KEY)
    size = None if shape is None else (int(shape[-2]), int(shape[-1]))
    batch = None if shape is None else int(shape[0])
    times = int(shape[2]) if shape is not None and len(shape) == 5 else 1
    order: Sequence[int] = options.get("cond_or_uncond") or (0,)
    latent = size
    areas: tuple[Area | None, ...] | None = None
    branches = tuple(UNCOND if index == 1 else COND for index in order)
    if isinstance(note, CallNote):
        uuids: Sequence[object] = options.get("uuids") or (None,) * len(order)
        chunks = [note.chunks.get(uuid, Chunk(b, None)) for uuid, b in zip(uuids, branches, strict=True)]
        branches = tuple(chunk.branch for chunk in chunks)
        if any(chunk.area is not None for chunk in chunks):
            areas = tuple(chunk.area for chunk in chunks)
        if latent is None or areas is not None:
            latent = note.latent
    step = note.step if isinstance(note, CallNote) else note if isinstance(note, StepNote) else None
    frames = _frames(options.get("ad_params")) or _window(options.get("context_window"))
    percent, timestep = (_unknown, _unknown) if step is None else (step.percent, step.timestep)
    return ModelCall(branches, percent, timestep, latent, areas, frames, tuple(order), size, times=times, batch=batch)


def _frames(ad_params: object) -> Frames | None:
    """AnimateDiff's context window: ``{"sub_idxs": [...] or None, "full_length": n}``."""
    if not isinstance(ad_params, Mapping):
        return None
    params = cast(Options, ad_params)
    numbers = params.get("sub_idxs")
    if numbers is None:
        return None
    frames = tuple(int(number) for number in numbers)
    return Frames(frames, int(params.get("full_length") or max(frames) + 1))


def _window(window: object) -> Frames | None:
    """The host's own context window, where it cuts the batch (``dim`` 0: each latent is a frame)."""
    numbers = getattr(window, "index_list", None)
    if not isinstance(numbers, (list, tuple)) or getattr(window, "dim", None) != 0:
        return None
    frames = tuple(int(number) for number in cast("Sequence[int]", numbers))
    return Frames(frames, int(getattr(window, "total_frames", 0) or max(frames) + 1))


def _unknown() -> float:
    raise IncompatibleAdapterError(
        "this sampler runs the model outside ComfyUI's guiders, so the sampling progress is unknown; set start to 0, end to 1 "
        "and remove the curve, or use a sampler built on ComfyUI's own"
    )
