"""From a file and a model to placed updates, or to a message that says what the file is instead. Never half of a LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from torch import Tensor

from ..errors import IncompatibleAdapterError
from .targets import Place, Target, TargetTable
from .update import Update, shape_text
from .weights import Component, LoRAModule, LoRAWeights

LONGEST_NAME = 200
"""Characters of a file's name that are compared with a model's; those have about 80."""

Parameter = Literal["weight", "bias"]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """One update on one parameter of one layer; ``rows`` (first, number) if only on some of its output rows."""

    target: Target
    parameter: Parameter
    update: Update
    rows: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """Name of the parameter in the model's state dict."""
        return f"{self.target.path}.{self.parameter}"

    def change(self, weight: Tensor, total: Tensor, strength: float) -> None:
        """Add the change of the pristine ``weight`` to ``total``: itself changed by others, or zeros."""
        start, length = self.rows or (0, weight.shape[0])
        self.update.change(weight[start : start + length], total[start : start + length], strength)


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A module of the file that the model does not have; of the first, ``nearest`` is the most similar name that it has."""

    module: LoRAModule
    nearest: str | None


@dataclass(frozen=True, slots=True, eq=False)
class PlacedLoRA:
    """A LoRA on one model: everything it changes there, and what found no place."""

    weights: LoRAWeights
    placements: tuple[Placement, ...]
    unmatched: tuple[Unmatched, ...] = ()

    def of(self, component: Component) -> tuple[Placement, ...]:
        """What it changes in one part."""
        return tuple(p for p in self.placements if p.target.component == component)

    def summary(self) -> str:
        """One line: how much was placed, and what was not and why."""
        counts: dict[Component, int] = {}
        for placement in self.placements:
            counts[placement.target.component] = counts.get(placement.target.component, 0) + 1
        placed = ", ".join(f"{n} in {component}" for component, n in counts.items())
        text = f"{self.weights.name}: {len(self.placements)} updates placed ({placed})"
        if not self.unmatched:
            return text
        first = self.unmatched[0]
        hint = f", nearest name {first.nearest!r}" if first.nearest else ""
        return f"{text}; {len(self.unmatched)} modules have no place, such as {first.module.stem!r}{hint}"


def place_lora(
    weights: LoRAWeights, tables: Mapping[Component, TargetTable], absent: Iterable[Component] = ()
) -> PlacedLoRA:
    """Find every module's layer. ``tables`` are the model's parts, ``absent`` parts that the caller leaves out on purpose.

    Raises IncompatibleAdapterError if the LoRA belongs to another base model: one shape that does not fit is enough, so
    is a part of which nothing is found.
    """
    placements: list[Placement] = []
    unmatched: list[Unmatched] = []
    misfits: list[str] = []
    widened: list[str] = []
    skipped = set(absent)
    for module in weights.modules:
        if module.component in skipped:
            continue
        table = tables.get(module.component)
        places = () if table is None else table.names.get(module.name, ())
        if table is None or not places:
            # only the first is shown, and one look-up of a similar name costs as much as placing the whole file
            similar = None if unmatched or table is None else _nearest(module.name, table)
            unmatched.append(Unmatched(module, similar))
            continue
        for place in places:
            for found in _placed(module, place, table.targets[place.path]):
                if found.update.fits(_shape(found)):
                    placements.append(found)
                else:
                    if _widens(found):
                        widened.append(found.key)
                    misfits.append(
                        f"{module.stem} is for {found.update.describe_shape()}, {found.key} is {shape_text(*_shape(found))}"
                    )
    if widened and len(widened) == len(misfits):
        raise IncompatibleAdapterError(
            f"{weights.name} is a control LoRA (Flux Canny or Depth): it gives {widened[0]} twice its inputs, which takes a "
            "wider layer and a control picture beside the latent. Load it with the host's own loader (ComfyUI: LoraLoader and "
            "InstructPixToPixConditioning; diffusers: FluxControlPipeline.load_lora_weights)"
        )
    _refuse(weights, tables, placements, unmatched, misfits)
    return PlacedLoRA(weights, tuple(placements), tuple(unmatched))


def _placed(module: LoRAModule, place: Place, target: Target) -> Iterable[Placement]:
    parameters: tuple[tuple[Parameter, Update | None], ...] = (("weight", module.weight), ("bias", module.bias))
    for parameter, update in parameters:
        if update is None or (parameter == "bias" and not target.has_bias):
            continue
        rows = place.rows
        if rows is None:
            yield Placement(target, parameter, update)
            continue
        whole = rows.target == 0 and rows.length == target.shape[0]
        yield Placement(
            target,
            parameter,
            _source_rows(update, rows.source, rows.length),
            None if whole else (rows.target, rows.length),
        )


def _widens(placement: Placement) -> bool:
    """Whether the update is for Flux's first layer with twice the inputs."""
    first = placement.target.path in ("img_in", "x_embedder") and placement.parameter == "weight"
    rows, *rest = _shape(placement)
    return first and len(rest) == 1 and placement.update.fits((rows, 2 * rest[0]))


def _source_rows(update: Update, start: int, length: int) -> Update:
    rows = update.describe_shape().split("×")[0]
    return update if start == 0 and rows == str(length) else update.rows(start, length)


def _shape(placement: Placement) -> tuple[int, ...]:
    shape = placement.target.shape
    rows = shape[0] if placement.rows is None else placement.rows[1]
    return (rows,) if placement.parameter == "bias" else (rows, *shape[1:])


def _nearest(name: str, table: TargetTable) -> str | None:
    return next(iter(get_close_matches(name[:LONGEST_NAME], table.names, 1, 0.6)), None)


def _refuse(
    weights: LoRAWeights,
    tables: Mapping[Component, TargetTable],
    placements: Sequence[Placement],
    unmatched: Sequence[Unmatched],
    misfits: Sequence[str],
) -> None:
    base, unet = weights.base_model, tables.get("unet")
    model = unet.family if unet is not None else "unknown"
    foreign = "unknown" not in (base, model) and model not in base
    diagnosis = f"this is a LoRA for {base}, the model is {model}" if foreign else ""
    if misfits:
        total = len(misfits) + len(placements)
        raise IncompatibleAdapterError(
            f"{weights.name} does not fit: {len(misfits)} of {total} updates have other shapes, such as {misfits[0]}; "
            + (
                f"{diagnosis}. Choose a LoRA for {model}"
                if foreign
                else "it was made for another variant of this model"
            )
        )
    components = {found.module.component for found in unmatched}
    lost = [c for c in components if c in tables and not any(p.target.component == c for p in placements)]
    if not placements or "unet" in lost or (foreign and unmatched):
        first = unmatched[0] if unmatched else None
        example = f", such as {first.module.stem!r}" if first else ""
        nearest = f" (nearest name in the model: {first.nearest!r})" if first and first.nearest else ""
        raise IncompatibleAdapterError(
            f"{weights.name} does not fit: {len(unmatched)} of {len(weights.modules)} modules have no place in the model"
            f"{example}{nearest}; " + (f"{diagnosis}. Choose a LoRA for {model}" if foreign else _advice(base, model))
        )


def _advice(base: str, model: str) -> str:
    return f"the file looks like a LoRA for {base}, the model like {model}; choose a LoRA made for this model"
