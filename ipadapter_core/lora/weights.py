"""A parsed LoRA: which module of which part gets which update. Nothing beyond this knows key formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import quoted
from ..models import marked, named_like
from ..models.unet import SDXL, unet_of_width
from .names import Component
from .update import Update


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A key or module of a file that is not applied, and why; ``nearest`` is the most similar name in the model."""

    name: str
    why: str
    nearest: str | None = None


@dataclass(frozen=True, slots=True)
class LoRAModule:
    """The change of one module: of its weight, its bias, or both.

    ``stem`` is the module as the file spells it, ``name`` the same as names are compared: the path of the module in the
    model that the file was made for, dots as underscores, no prefix. ``alpha`` is what the update's scale was made from, None for
    algorithms without one; ``alpha_from`` says what decided it: ``tensor``, ``header``, ``adapter_config.json``, ``default``.
    """

    stem: str
    component: Component
    name: str
    weight: Update | None
    bias: Update | None = None
    alpha: float | None = None
    alpha_from: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class LoRAWeights:
    """All modules of one file, its text metadata, its key format, what of it is no update, and notes on how it was read."""

    name: str
    modules: tuple[LoRAModule, ...]
    key_format: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def spelling(self) -> str:
        """Older name of ``key_format``."""
        return self.key_format

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keys that are no part of any update."""
        return tuple(found.name for found in self.left_out)

    @property
    def components(self) -> tuple[Component, ...]:
        """Which parts it changes, in order."""
        found = {module.component for module in self.modules}
        return tuple(c for c in ("denoiser", "te1", "te2", "te3") if c in found)

    @property
    def base_model(self) -> str:
        """What it was made for, from names and widths: ``SDXL``, ``Flux or Chroma``, ``unknown``."""
        return guess_base_model(self.modules)


def left_out_lines(left_out: Iterable[LeftOut]) -> list[str]:
    """What is left out, a line per reason: how many, examples, why."""
    groups: dict[str, list[LeftOut]] = {}
    for found in left_out:
        groups.setdefault(found.why, []).append(found)
    lines: list[str] = []
    for why, items in groups.items():
        named = ", ".join(quoted(item.name) for item in items[:3]) + (", …" if len(items) > 3 else "")
        nearest = next((item.nearest for item in items if item.nearest), None)
        hint = f" (nearest name {quoted(nearest)})" if nearest else ""
        lines.append(f"{len(items)} × {why}: {named}{hint}")
    return lines


def guess_base_model(modules: tuple[LoRAModule, ...]) -> str:
    """The family that these names and shapes belong to; several, joined by ``or``, where they belong to all of them."""
    denoiser = [module for module in modules if module.component == "denoiser"]
    shapes = [() if m.weight is None else m.weight.weight_shape for m in denoiser]
    possible = marked([module.name for module in denoiser])
    transformers = named_like([(m.name, shape) for m, shape in zip(denoiser, shapes, strict=True)])
    if transformers:
        return " or ".join(base.name for base in transformers)
    for module in denoiser:
        if module.weight is not None and module.name.endswith(("attn2_to_k", "attn2_to_v")):
            for columns in module.weight.weight_shape[1:2]:
                family = None if columns is None else unet_of_width(columns)
                if family is not None:
                    return family.name
    if SDXL in possible or any(module.component == "te2" for module in modules):
        return SDXL.name
    return " or ".join(base.name for base in possible) or "unknown"


def families_in(base_model: str | None) -> set[str]:
    """The families that a file may be for; none if that is unknown."""
    return set() if base_model in (None, "unknown") else set(base_model.split(" or "))
