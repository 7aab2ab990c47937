"""``LoRAWeights`` → the tensors of a file in a chosen key format; numbers are moved, not recomputed, wherever possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InvalidInputError, quoted
from ..models.layers import underscored
from ..models.naming import Form
from .base_names import by_name, dotted, is_ldm, text_path
from .forms import in_form, path_in
from .weights import Component, LoRAModule, LoRAWeights

KeyFormat = Literal["kohya", "diffusers", "generic"]
KEY_FORMATS: tuple[KeyFormat, ...] = get_args(KeyFormat)
"""Those that are written; many more are read, see ``names.PREFIXES``."""
Spelling, SPELLINGS = KeyFormat, KEY_FORMATS  # older names

_KOHYA: Mapping[Component, str] = {"denoiser": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_", "te3": "lora_te3_"}
_DIFFUSERS: Mapping[Component, str] = {
    "denoiser": "unet.",
    "te1": "text_encoder.",
    "te2": "text_encoder_2.",
    "te3": "text_encoder_3.",
}
_GENERIC: Mapping[Component, str] = {
    "denoiser": "diffusion_model.",
    "te1": "text_encoders.clip_l.transformer.",
    "te2": "text_encoders.clip_g.transformer.",
    "te3": "text_encoders.t5xxl.transformer.",
}
_TRANSFORMER: Mapping[KeyFormat, str] = {
    "kohya": _KOHYA["denoiser"],
    "diffusers": "transformer.",
    "generic": _GENERIC["denoiser"],
}


def to_tensors(
    weights: LoRAWeights, key_format: KeyFormat = "kohya", dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. ``dtype`` None keeps each tensor's.

    ``kohya`` and ``generic`` carry every algorithm and keep alpha as a tensor. ``diffusers`` is PEFT's, with the scale
    multiplied into ``lora_B``, so that readers who know no alpha get it right; it carries LoRA and row-wise DoRA.
    Of transformers ``kohya`` and ``generic`` have the original's layers (ComfyUI's), ``diffusers`` those of diffusers: fused ones are
    cut, parts put together (``forms.py``). Raises InvalidInputError for what a key format cannot say.
    """
    if key_format not in KEY_FORMATS:
        raise InvalidInputError(f"unknown key format {quoted(key_format)}; choose one of: {', '.join(KEY_FORMATS)}")
    tensors: dict[str, Tensor] = {}
    known = by_name(weights.base_model)
    if any(m.component == "denoiser" and m.name not in known for m in weights.modules):
        known = {}  # a pruned or unknown model: its blocks are numbered otherwise, so each name stays what it is
    form: Form = "diffusers" if key_format == "diffusers" else "original"
    for module in in_form(weights.modules, weights.base_model, form):
        pair = known.get(module.name) if module.component == "denoiser" else None
        path = path_in(module, weights.base_model, form)
        if path is not None:
            stem = _TRANSFORMER[key_format] + (underscored(path) if key_format == "kohya" else path)
        else:
            stem = stem_of(module, pair, key_format, sdxl="te2" in weights.components or weights.base_model == "SDXL")
        parts = _peft(module) if key_format == "diffusers" else _parts(module)
        for role, tensor in parts.items():
            keep = dtype is None or role == ".alpha" or not tensor.is_floating_point()
            tensors[stem + role] = (tensor if keep else _cast(tensor, dtype, module.stem)).contiguous()
    metadata = {key: value for key, value in weights.metadata.items() if key != "lora_adapter_metadata"}
    return tensors, metadata


def _cast(tensor: Tensor, dtype: torch.dtype | None, stem: str) -> Tensor:
    narrow = tensor.to(dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise InvalidInputError(
            f"{quoted(stem)} has numbers too large for {str(dtype).removeprefix('torch.')}; write bfloat16 or float32"
        )
    return narrow


def stem_of(module: LoRAModule, pair: tuple[str, str] | None, key_format: KeyFormat, *, sdxl: bool = False) -> str:
    """A module's name in a key format; ``pair`` is its (diffusers, LDM) path where that is known.

    SDXL is spelled by LDM names in kohya's files, SD1.5 by diffusers names.
    """
    component = module.component
    if component == "denoiser":
        if key_format == "kohya":
            path = module.name if pair is None else pair[sdxl]
            return _KOHYA[component] + path.replace(".", "_")
        wants_ldm = key_format == "generic"
        if pair is None and is_ldm(module.name) != wants_ldm:
            raise InvalidInputError(
                f"{quoted(module.stem)} is in no table of full-size models, so its name in the key format '{key_format}' is unknown; "
                f"write '{'diffusers' if wants_ldm else 'generic'}' or 'kohya'"
            )
        prefix = _GENERIC if wants_ldm else _DIFFUSERS
        return prefix[component] + (dotted(module.name) if pair is None else pair[wants_ldm])
    path = text_path(module.name)
    if key_format == "kohya":
        prefix = "lora_te_" if component == "te1" and not sdxl else _KOHYA[component]
        return prefix + (path or module.name).replace(".", "_")
    if path is None:
        raise InvalidInputError(
            f"{quoted(module.stem)} is no known layer of a CLIP text encoder; use the key format 'kohya'"
        )
    return (_DIFFUSERS if key_format == "diffusers" else _GENERIC)[component] + path


def _parts(module: LoRAModule) -> dict[str, Tensor]:
    parts = {} if module.weight is None else module.weight.to_parts()
    bias = {} if module.bias is None else module.bias.bias_to_parts(module.weight)
    if bias is None:
        raise InvalidInputError(f"the bias of {quoted(module.stem)} cannot be written")
    return parts | bias


def _peft(module: LoRAModule) -> dict[str, Tensor]:
    update = None if module.bias is not None else module.weight
    parts = None if update is None else update.to_peft()
    if parts is None:
        title = "a change of the bias" if update is None else update.title
        raise InvalidInputError(
            f"{quoted(module.stem)} is {title}, which PEFT's key format cannot say; write 'kohya' or 'generic', or resize it first"
        )
    return parts
