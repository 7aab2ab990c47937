"""Adapters under ComfyUI's memory manager: loaded, given image prompts, hooked onto a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from ...ipadapter_core import (
    AdapterError,
    AdapterPatch,
    AdapterSpec,
    AdapterWeights,
    EncodeOptions,
    ImagePrompt,
    RegionMask,
    Rules,
    WeightSchedule,
    bake,
    describe_adapter,
    encode_face_prompt,
    encode_image_prompt,
    load_adapter,
    load_prompt,
    project_by_model,
    rules_for,
)
from ...ipadapter_core.attention.kv import HeldKeys
from ...ipadapter_core.attention.schedule import Scaling
from ...ipadapter_core.backends.comfy import doors as backend
from ...ipadapter_core.checkpoints import as_version
from ...ipadapter_core.images.faces import FaceAnalyzer, FoundFaces
from ...ipadapter_core.models.sites import ModelLayout
from ...ipadapter_core.prompt.needs import encoder_for
from . import files
from .clip_vision import encoder_of
from .frontend import progress_bar


@dataclass(eq=False)
class ManagedAdapter:
    """An adapter whose weights ComfyUI's memory manager moves and unloads."""

    weights: AdapterWeights
    patcher: comfy.model_patcher.ModelPatcher

    def to_device(self) -> AdapterWeights:
        """The weights, on the compute device until the memory manager needs the room."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.weights


_LOADED: WeakValueDictionary[files.Version, ManagedAdapter] = WeakValueDictionary()


def load(file: str) -> ManagedAdapter:
    """One copy per file, however many nodes load it; a changed file is read again."""
    key = path, *_ = files.version("ipadapter", file)
    adapter = _LOADED.get(key)
    if adapter is None:
        adapter = _LOADED[key] = manage(path, file)
    return adapter


def manage(source: str | Mapping[str, object], name: str) -> ManagedAdapter:
    """Load an adapter's file or state dict and hand its weights to the memory manager."""
    device = comfy.model_management.get_torch_device()
    half = torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32

    def dtype_for(own: torch.dtype) -> torch.dtype:
        # what was saved in bfloat16 may have numbers that float16 has not
        keeps = own == torch.bfloat16 and comfy.model_management.should_use_bf16(device)
        return own if keeps else half

    # Layers that cast: of an adapter that is too large for the device, the manager loads what fits, and the rest comes piece by piece.
    weights = load_adapter(source, name=name, dtype=dtype_for, operations=comfy.ops.manual_cast)
    weights.module.computes_on = device
    patcher = comfy.model_patcher.ModelPatcher(
        weights.module, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )
    return ManagedAdapter(weights, patcher)


def with_version(adapter: ManagedAdapter, version: int) -> ManagedAdapter:
    """A FaceID Plus adapter read as version 1 or 2 (other families as they are); the weights are shared."""
    weights = as_version(adapter.weights, version)
    return adapter if weights is adapter.weights else ManagedAdapter(weights, adapter.patcher)


_DESCRIBED: dict[files.Version, AdapterSpec | None] = {}


def describe(file: str) -> AdapterSpec | None:
    """What a file of the adapters' folder is, without its numbers; None if it is no adapter."""
    key = path, *_ = files.version("ipadapter", file)
    if key not in _DESCRIBED:
        try:
            _DESCRIBED[key] = describe_adapter(path, name=file)
        except (AdapterError, OSError):
            _DESCRIBED[key] = None
    return _DESCRIBED[key]


def encode(
    adapter: ManagedAdapter,
    clip_vision: Any,
    images: Tensor,
    options: EncodeOptions,
    *,
    masks: Tensor | None = None,
    negative: Tensor | None = None,
    second: Any = None,
) -> ImagePrompt:
    """encode_image_prompt with ComfyUI's encoder (and the ``second``, of adapters that read two), memory manager and progress bar."""
    given = [encoder_of(one) for one in (clip_vision, second) if one is not None or one is clip_vision]
    encoder, options = encoder_for(adapter.weights.spec, given), replace(options, progress=progress_bar())
    weights = adapter.to_device()
    return encode_image_prompt(weights, encoder, images, options, masks=real_mask(masks), negative=negative)


def load_image_prompt(
    adapter: ManagedAdapter, file: str, clip_vision: Any | None, *, per_latent: bool, rules: Rules
) -> ImagePrompt:
    """load_prompt with ComfyUI's encoder, memory manager and folders."""
    encoder = None if clip_vision is None else encoder_of(clip_vision)
    path = files.path("image_prompts", file)
    return load_prompt(path, adapter.to_device(), encoder, per_latent=per_latent, rules=rules)


def encode_face(
    adapter: ManagedAdapter,
    face_model: FaceAnalyzer,
    clip_vision: Any | None,
    images: Tensor,
    options: EncodeOptions,
    *,
    mask: Tensor | None = None,
    negative: Tensor | None = None,
) -> tuple[ImagePrompt, FoundFaces]:
    """encode_face_prompt with ComfyUI's encoder, memory manager and progress bar."""
    encoder = None if clip_vision is None else encoder_of(clip_vision)
    options, weights = replace(options, progress=progress_bar()), adapter.to_device()
    return encode_face_prompt(weights, face_model, encoder, images, options, mask=real_mask(mask), negative=negative)


def real_mask(mask: Tensor | None) -> Tensor | None:
    """A mask, or None for 64 x 64 zeros: what Load Image gives for a picture without transparency."""
    if mask is not None and tuple(mask.shape[-2:]) == (64, 64) and not bool(mask.any()):
        return None
    return mask


def layout(model: Any) -> ModelLayout:
    """Where image prompts can act in a MODEL. Raises IncompatibleAdapterError."""
    return backend.comfy_layout(model)


def apply(
    model: Any,
    adapter: ManagedAdapter,
    prompt: ImagePrompt,
    schedule: WeightSchedule,
    mask: Tensor | None,
    rules: Rules | None = None,
    projection_scale: float = 1.0,
) -> tuple[Any, AdapterPatch]:
    """Bake the prompt for this model and hook it onto a clone; ``projection_scale`` as in project_by_model()."""
    layout = backend.comfy_layout(model)
    if adapter.weights.spec.projected_by_model:
        prompt = project_by_model(prompt, model.get_model_object("diffusion_model"), projection_scale)
    rules = rules or rules_for("correct")
    region = None if mask is None else RegionMask.from_tensor(mask, clamp=not rules.stretched_masks)
    patch = bake(adapter.weights, prompt, layout, schedule, region, prepare=adapter.to_device, rules=rules)
    applied = backend.apply(model, patch, attention)
    _count(applied, adapter, prompt, patch)
    return applied, patch


ADDITIONAL = "image_prompt"
"""Our key among the models that the host loads with a MODEL."""


_Patchers = dict[tuple[HeldKeys, torch.device, torch.device], comfy.model_patcher.ModelPatcher]
_KEPT: WeakKeyDictionary[ImagePrompt, WeakKeyDictionary[nn.Module, _Patchers]] = WeakKeyDictionary()
"""Under the memory manager as long as ``bake`` holds them, not as long as a MODEL in which they act.

The manager takes a module that outlives its patchers for a leak: it warns, and collects garbage before everything that it loads.
"""


def _count(model: Any, adapter: ManagedAdapter, prompt: ImagePrompt, patch: AdapterPatch) -> None:
    """Let the memory manager load with a MODEL what a prompt holds: keys and values, and weights that are used while sampling."""
    if patch.held is None or not any(map(patch.active, range(len(patch.sites)))):
        return
    kept = _KEPT.setdefault(prompt, WeakKeyDictionary()).setdefault(adapter.weights.module, {})
    place = patch.held, model.load_device, model.offload_device
    if place not in kept:
        kept[place] = _managed(*place)
    needed = [kept[place]]
    if patch.reach.resident:
        needed.append(adapter.patcher)
    before = model.get_additional_models_with_key(ADDITIONAL)
    new = [one for one in needed if not any(one.model is other.model for other in before)]
    model.set_additional_models(ADDITIONAL, [*before, *new])


def _managed(held: HeldKeys, load: Any, offload: Any, **settings: Any) -> comfy.model_patcher.ModelPatcher:
    """What is held, under the memory manager; ``settings`` are what the host passes when it wants another one."""
    patcher = comfy.model_patcher.ModelPatcher(held, load_device=load, offload_device=offload, size=held.bytes)
    patcher.cached_patcher_init = (_managed, (held, load, offload))  # for hosts that spread over devices
    return patcher


def steer(
    model: Any,
    adapter: ManagedAdapter,
    prompt: ImagePrompt,
    mask: Tensor | None,
    schedule: WeightSchedule | None,
    compatibility: str,
    *,
    strength: float,
    preset: str,
    scaling: Scaling,
    start: float,
    end: float,
) -> Any:
    """``apply`` with the inputs of a node: what ``schedule`` says, at a strength and preset, from start to end."""
    settings = (schedule or WeightSchedule()).steering(strength, preset, scaling, start, end)
    return apply(model, adapter, prompt, settings, mask, rules_for(compatibility))[0]


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """The host's attention, looked up at the call: launch options and other packs may replace it."""
    return comfy.ldm.modules.attention.optimized_attention(*args, **kwargs)
