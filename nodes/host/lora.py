"""LoRA in ComfyUI: its folder, its own loader, its way to patch weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import comfy.weight_adapter
import torch
from torch import Tensor, nn

from ...ipadapter_core import InvalidInputError, check_adapter
from ...ipadapter_core.backends.comfy import lora as backend
from ...ipadapter_core.backends.comfy.doors import comfy_layout
from ...ipadapter_core.entries import some
from ...ipadapter_core.errors import quoted
from ...ipadapter_core.files.state_dict import open_state_dict
from ...ipadapter_core.lora import LoRAWeights, Partial, load_lora, parse_lora
from ...ipadapter_core.lora.algorithms.widening import padded
from ...ipadapter_core.lora.patch import LoRAPatch, Mode, choose_mode
from ...ipadapter_core.lora.unfused import UnfusedStack
from . import files
from .adapters import ManagedAdapter, attention

try:
    from comfy.quant_ops import QuantizedTensor
except ImportError:  # hosts before November 2025 have eight bits by dtype alone
    QuantizedTensor = ()


def load_tensors(file: str) -> dict[str, Tensor]:
    return comfy.utils.load_torch_file(files.path("loras", file), safe_load=True)


def apply_by_host(model: Any, lora: dict[str, Tensor], strength: float) -> Any:
    """The model with a LoRA by ComfyUI's own loader."""
    return comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0)[0]


@dataclass(eq=False)
class LoadedLoRA:
    """A LoRA file, shared by all nodes that name it."""

    weights: LoRAWeights


def apply_inside(
    model: Any, adapter: ManagedAdapter, strength: float, *, cross_attention: bool = False
) -> tuple[Any, str]:
    """The model with the LoRA inside an adapter's file, by ComfyUI's own loader, and what was placed.

    ``cross_attention``: only what of it acts on the attention to the text.

    Raises InvalidInputError for an adapter without one, IncompatibleAdapterError where it would act in part only.
    """
    weights = adapter.weights
    if not weights.lora:
        raise InvalidInputError(
            f"{weights.name} ({weights.spec.family}) carries no LoRA; FaceID's .bin files and Anima's Character Reference do, "
            "others have none and need none. Remove this node, or load the adapter's *_lora.safetensors with LoRA Strength"
        )
    if strength == 0:
        return model, "strength 0: the model is as it was"
    check_adapter(weights, comfy_layout(model))
    lora = weights.loadable_lora(cross_attention=cross_attention)
    matched = backend.place(
        load_lora(lora, name=weights.name), model, names=names(model)
    )  # refuses what the host would leave out unsaid
    return apply_by_host(model, lora, strength), "\n".join((matched.summary(), *matched.report()))


def names(model: Any, clip: Any = None) -> backend.HostNames:
    """Every name of a module in LoRA files that the host knows of this MODEL and CLIP, and where it leads."""
    found: dict[str, Any] = {}
    if model is not None:
        found = comfy.lora.model_lora_keys_unet(model.model, found)
    if clip is not None:
        found = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, found)
    return found


_LORAS: WeakValueDictionary[files.Version, LoadedLoRA] = WeakValueDictionary()


def load(file: str) -> LoadedLoRA:
    """One copy per file, however many nodes name it; a changed file is read again."""
    key = path, *_ = files.version("loras", file)
    found = _LORAS.get(key)
    if found is None:
        found = _LORAS[key] = LoadedLoRA(read(path, file))
    return found


def read(path: str, name: str) -> LoRAWeights:
    """A file as the host's own loader reads it: renamed first where the host knows its kind (BFL's control LoRAs, Wan-Fun's, USO's)."""
    file = open_state_dict(path, name=name)
    try:
        tensors = comfy.lora_convert.convert_lora(dict(file.tensors))
    except Exception:  # damaged so that the host's conversion fails: our own reading says how
        tensors = file.tensors
    return parse_lora(replace(file, tensors=tensors), path)


class MergedUpdates(comfy.weight_adapter.WeightAdapterBase):
    """All our LoRAs on one parameter, as the host's own kind of patch; it calls this whenever it patches the weight."""

    name = "image_prompt_lora"

    def __init__(self, loaded_keys: object, weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights  # the host may rebuild the patch from these two

    @classmethod
    def of(cls, parts: tuple[backend.Part, ...]) -> MergedUpdates:
        return cls(set[str](), parts)

    @property
    def parts(self) -> tuple[backend.Part, ...]:
        return self.weights

    def calculate_shape(self, key: str) -> tuple[int, ...] | None:
        """For hosts that make room for a weight before they patch it."""
        return backend.widest(self.parts)

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: object,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: object = None,
    ) -> Tensor:
        change = backend.merge_parts(weight.to(intermediate_dtype), self.parts)
        if change.shape != weight.shape:
            weight = padded(weight, tuple(change.shape))
        weight += function(change if strength == 1 else strength * change).to(weight.dtype)
        return weight


class LiveFactors(nn.Module):
    """Live LoRAs' share of the device, as a model that ComfyUI's memory manager counts, makes room for and unloads.

    Its parameters are the file's tensors and never move: what is on the device are the stack's copies, made when first
    used and forgotten when the manager moves this module.
    """

    def __init__(self, stack: UnfusedStack) -> None:
        super().__init__()
        self.stack = stack
        for i, tensor in enumerate(stack.tensors()):
            self.register_parameter(str(i), nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LiveFactors:
        self.stack.release()
        return self

    @classmethod
    def managed(cls, stack: UnfusedStack, load: Any, offload: Any, **settings: Any) -> comfy.model_patcher.ModelPatcher:
        """The stack under the memory manager; ``settings`` are what the host passes when it wants another one."""
        patcher = comfy.model_patcher.ModelPatcher(cls(stack), load_device=load, offload_device=offload)
        patcher.cached_patcher_init = (cls.managed, (stack, load, offload))  # for hosts that spread over devices
        return patcher


def apply(
    model: Any,
    clip: Any,
    loaded: LoadedLoRA,
    mode: Mode,
    partial: Partial = "refuse",
    **settings: Any,
) -> tuple[Any, Any, str, str]:
    """A LoRA on clones of MODEL and CLIP, a text that says what was done, and the part of it that belongs into the node.

    ``settings`` are those of LoRAPatch.
    """
    clip_model = None if clip is None else clip.cond_stage_model
    matched = backend.place(loaded.weights, model, clip_model, partial, names(model, clip))
    patch = LoRAPatch(matched, **settings)
    if partial == "allow" and model is not None and patch.strength != 0 and (mode == "live" or patch.needs_unfused):
        patch = patch.beside_layers()
        matched = patch.matched
    lines = [matched.summary(), *matched.report()]
    shown = "\n".join(lines)
    if model is not None and patch.strength != 0:
        choice = choose_mode([patch], mode, quantised=_quantised(model), offloaded=_offloaded(model))
        ahead = next((match.key for match, _ in patch.apart()[0].acting("denoiser")), None)
        merged = (
            ""
            if ahead is None or choice.mode == "merged"
            else f"; {ahead} and what else runs before the steps is merged"
        )
        lines.append(f"runs {choice.mode}: {choice.reason}{merged}")
        if choice.mode == "live":
            model = backend.apply_live(model, patch, MergedUpdates.of, attention)
            stack = backend.unfused_stack(model)
            if stack is not None:
                managed = LiveFactors.managed(stack, model.load_device, model.offload_device)
                model.set_additional_models(backend.LORA_KEY, [managed])
        else:
            model = backend.apply_merged(model, patch, ("denoiser",), MergedUpdates.of)
        lines.append(patch.selector.table(p.target for p in matched.of("denoiser")))
        lost = patch.selector.unmatched(p.target for p in matched.matches)
        if lost:
            lines.append(
                f"selector entries that match no layer of this LoRA: {some([quoted(where) for where in lost])}"
            )
    if clip is not None and patch.strength_for("te1") != 0:
        clip = clip.clone()
        clip.patcher = backend.apply_merged(clip.patcher, patch, backend.TEXT, MergedUpdates.of)
    return model, clip, "\n".join(lines), shown


def _quantised(model: Any) -> bool:
    if model.model_dtype().itemsize < 2:
        return True
    return any(isinstance(p, QuantizedTensor) for p in model.get_model_object("diffusion_model").parameters())


def _offloaded(model: Any) -> bool:
    states = (comfy.model_management.VRAMState.LOW_VRAM, comfy.model_management.VRAMState.NO_VRAM)
    dynamic = getattr(model, "is_dynamic", None)
    return comfy.model_management.vram_state in states or bool(dynamic is not None and dynamic())
