"""A parsed LoRA: which module of which part gets which update. Nothing beyond this knows key spellings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .update import Update

Component = Literal["unet", "te1", "te2", "te3"]
"""The denoiser (UNet or transformer) and the text encoders: CLIP-L, CLIP-G (or OpenCLIP-H), T5."""


@dataclass(frozen=True, slots=True)
class LoRAModule:
    """The change of one module: of its weight, its bias, or both.

    ``stem`` is the module as the file spells it, ``name`` the same in one spelling: the path of the module in the model
    that the file was made for, dots as underscores, no prefix.
    """

    stem: str
    component: Component
    name: str
    weight: Update | None
    bias: Update | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoRAWeights:
    """All modules of one file, its text metadata, its spelling, and the keys that belong to nothing known."""

    name: str
    modules: tuple[LoRAModule, ...]
    spelling: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    ignored: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[Component, ...]:
        """Which parts it changes, in order."""
        found = {module.component for module in self.modules}
        return tuple(c for c in ("unet", "te1", "te2", "te3") if c in found)

    @property
    def base_model(self) -> str:
        """What it was made for, from names and widths: ``SD1.5``, ``SD2``, ``SDXL``, ``SD3``, ``Flux`` or ``unknown``."""
        return guess_base_model(self.modules)


TEXT_WIDTHS = {768: "SD1.5", 1024: "SD2", 2048: "SDXL", 1280: "SDXL refiner"}
"""Width of the text tokens that a UNet's cross-attention reads."""


def guess_base_model(modules: tuple[LoRAModule, ...]) -> str:
    """The family that these names and shapes belong to."""
    names = [module.name for module in modules if module.component == "unet"]
    if any(name.startswith(("double_blocks_", "single_blocks_", "single_transformer_blocks_")) for name in names):
        return "Flux"
    if any(name.startswith("joint_blocks_") or "_attn_add_" in name or "_attn_to_add_" in name for name in names):
        return "SD3"
    for module in modules:
        if (
            module.component == "unet"
            and module.weight is not None
            and module.name.endswith(("attn2_to_k", "attn2_to_v"))
        ):
            columns = module.weight.describe_shape().split("×")[1:2]
            if columns and columns[0].isdigit() and int(columns[0]) in TEXT_WIDTHS:
                return TEXT_WIDTHS[int(columns[0])]
    if any(module.component == "te2" for module in modules):
        return "SDXL"
    if any(
        name.startswith(("input_blocks_4_1_transformer_blocks_1", "down_blocks_2_attentions_0_transformer_blocks_9"))
        for name in names
    ):
        return "SDXL"
    if any(
        name.startswith(("down_blocks_0_attentions", "down_blocks_3_", "up_blocks_3_", "input_blocks_1_1"))
        for name in names
    ):
        return "SD1.5 or SD2"
    return "unknown"
