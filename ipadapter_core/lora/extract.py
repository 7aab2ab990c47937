"""A LoRA out of two checkpoints of one base model: the difference of every layer in low rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import CorruptFileError, IncompatibleAdapterError, quoted
from ..files.state_dict import Source, StoredTensors
from .base_names import in_any_table, text_path
from .factors import Smaller, decompose, low_rank_module
from .names import to_name
from .update import alike
from .weights import Component, LoRAModule, LoRAWeights

CHECKPOINT_PREFIXES: tuple[tuple[str, Component], ...] = (
    ("model.diffusion_model.", "denoiser"),
    ("diffusion_model.", "denoiser"),
    ("cond_stage_model.transformer.", "te1"),
    ("conditioner.embedders.0.transformer.", "te1"),
)
"""Prefixes of checkpoints; files of a UNet or transformer alone have none."""


def extract(
    tuned: Source,
    base: Source,
    smaller: Smaller,
    *,
    name: str = "extracted",
    smallest: float = 1e-6,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LoRAWeights, dict[str, float]]:
    """LoRA of what ``tuned`` differs from ``base``, and the relative error per module.

    Layers whose largest difference is below ``smallest`` are left out; norms and biases are not taken. Raises
    IncompatibleAdapterError if the files have no layer in common or differ in a shape.
    """
    read_first, read_second = StoredTensors(tuned), StoredTensors(base)
    first, second = read_first.described, read_second.described
    keys = [
        key
        for key, t in first.tensors.items()
        if key.endswith(".weight")
        and t.ndim in (2, 4, 5)
        and t.numel()
        and key in second.tensors
        and _module(key) is not None
    ]
    if not keys:
        raise IncompatibleAdapterError(
            f"{first.name} and {second.name} have no layer of a UNet in common, nor of a transformer; give two checkpoints of the same kind "
            "and in the same form (both ComfyUI's or both diffusers')"
        )
    modules: list[LoRAModule] = []
    errors: dict[str, float] = {}
    for done, key in enumerate(keys):
        a, b = first.tensors[key], second.tensors[key]
        if a.shape != b.shape:
            raise IncompatibleAdapterError(
                f"{quoted(key)} is {list(a.shape)} in {first.name} and {list(b.shape)} in {second.name}: they are different base models"
            )
        difference = _difference(read_first.read(key), read_second.read(key), key)
        module = _module(key)
        if float(difference.abs().max()) >= smallest and module is not None:
            up, down, errors[module.stem] = decompose(difference.flatten(1), smaller)
            modules.append(low_rank_module(module, up, down, tuple(a.shape[2:])))
        if progress is not None:
            progress(done + 1, len(keys))
    if not modules:
        raise IncompatibleAdapterError(f"{first.name} and {second.name} do not differ in any layer")
    return LoRAWeights(name, tuple(modules), "extracted", {}), errors


def _difference(a: Tensor, b: Tensor, key: str) -> Tensor:
    for tensor in (a, b):
        if not tensor.is_floating_point():
            raise CorruptFileError(
                f"{quoted(key)} is stored as {str(tensor.dtype).removeprefix('torch.')}; give checkpoints in 16 or 32 bits"
            )
    wider, base = alike(a, b)
    difference = wider - base
    if not bool(torch.isfinite(difference).all()):
        raise CorruptFileError(
            f"{quoted(key)} has NaN or infinite numbers in one of the checkpoints; use another version"
        )
    return difference


def _module(key: str) -> LoRAModule | None:
    stem = key.removesuffix(".weight")
    for prefix, component in CHECKPOINT_PREFIXES:
        if stem.startswith(prefix):
            path = stem.removeprefix(prefix)
            if component != "denoiser" and text_path(to_name(path)) is None:
                return None
            return LoRAModule(stem, component, to_name(path), None)
    unet = stem.startswith(("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding."))
    if unet or in_any_table(to_name(stem)):
        return LoRAModule(stem, "denoiser", to_name(stem), None)
    return None
