"""From a file and a model to updates matched with layers, or to a message that says what the file is instead. Never half of a LoRA unsaid."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal, NoReturn

import torch
from torch import Tensor

from ..errors import IncompatibleAdapterError, InvalidInputError, quoted
from ..models.layers import Parameter, Place
from .algorithms.widening import Widened
from .embedding import Lookup
from .losses import Module, lost_part
from .names import canonical
from .targets import Target, TargetTable
from .update import Update, shape_text
from .weights import Component, LeftOut, LoRAModule, LoRAWeights, left_out_lines

LONGEST_NAME = 200
"""Characters of a file's name that are compared with a model's; those have about 80."""


@dataclass(frozen=True, slots=True, eq=False)
class TargetMatch:
    """One update on one parameter of one layer; ``rows`` (first, number) if only on some of its output rows."""

    target: Target
    parameter: Parameter
    update: Update
    rows: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """Name of the parameter in the model's state dict."""
        return self.target.path if self.target.bare else f"{self.target.path}.{self.parameter}"

    @property
    def widened(self) -> tuple[int, ...] | None:
        """The shape that the weight gets, if the update gives it more inputs."""
        return self.update.shape if isinstance(self.update, Widened) else None

    @property
    def needs_merged(self) -> str | None:
        """Why no side path can do it, or None if one can."""
        if self.widened is not None:
            return f"it gives {self.target.path} more inputs than the model was built with"
        if self.target.ahead:
            return f"it changes {self.key}, which the host runs once for a prompt, before the steps"
        return (
            None
            if self.target.beside
            else f"it changes {self.key}, which is no layer that a side path could stand beside"
        )

    def change(self, weight: Tensor, total: Tensor, strength: float) -> None:
        """Add the change of the pristine ``weight`` to ``total``: itself changed by others, or zeros."""
        part, changed = weight, total
        if self.rows is not None:
            start, length = self.rows
            part, changed = weight[start : start + length], total[start : start + length]
        self.update.change(part, changed, strength)
        if not _is_finite(changed) and _is_finite(part):
            raise IncompatibleAdapterError(
                f"the change of {self.key} at strength {strength:g} is not finite, so it was not written; use a smaller strength "
                "or another version of the LoRA"
            )


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A module of the file that the model does not have; of the first, ``nearest`` is the most similar name that it has."""

    module: LoRAModule
    nearest: str | None


@dataclass(frozen=True, slots=True, eq=False)
class MatchedLoRA:
    """A LoRA on one model: everything it changes there, what found no place, and all that is left out, each with a reason."""

    weights: LoRAWeights
    matches: tuple[TargetMatch, ...]
    unmatched: tuple[Unmatched, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def placements(self) -> tuple[TargetMatch, ...]:
        """Older name of ``matches``."""
        return self.matches

    def of(self, component: Component) -> tuple[TargetMatch, ...]:
        """What it changes in one part."""
        return tuple(p for p in self.matches if p.target.component == component)

    def summary(self) -> str:
        """How much was placed in one line, and one for each reason why something was not."""
        counts: dict[Component, int] = {}
        for match in self.matches:
            counts[match.target.component] = counts.get(match.target.component, 0) + 1
        matched = ", ".join(f"{n} in {component}" for component, n in counts.items())
        text = f"{self.weights.name}: {len(self.matches)} updates placed ({matched})"
        if self.unmatched:
            first = self.unmatched[0]
            hint = f", nearest name {quoted(first.nearest)}" if first.nearest else ""
            text += f"; {len(self.unmatched)} modules have no place, such as {quoted(first.module.stem)}{hint}"
        return text

    def report(self) -> list[str]:
        """Lines about what is not applied and how the file was read; none if all is as usual."""
        lines = [f"not applied: {line}" for line in left_out_lines(self.left_out)]
        for match in self.matches:
            if match.widened is not None:
                lines.append(
                    f"{match.target.path} takes {match.widened[1]} inputs instead of {match.target.shape[1]}: the conditioning has to "
                    "bring a control picture (InstructPixToPixConditioning)"
                )
        return [*lines, *self.weights.notes]


Partial = Literal["refuse", "allow"]
"""What happens to a file of which a part that matters has no place in the model."""
PARTIAL: tuple[Partial, ...] = ("refuse", "allow")

NO_PLACE = "modules that the model does not have"
NO_BIAS = "changes of a bias that the model's layer does not have"
NOT_THERE: Mapping[Component, str] = {
    "denoiser": "modules of a UNet or transformer, which is not given here",
    "te1": "modules of the first text encoder (CLIP-L or OpenCLIP-H), which is not given here",
    "te2": "modules of the second text encoder (CLIP-G), which is not given here",
    "te3": "modules of the third text encoder (T5), which is not given here",
}
MISFIT = "modules of another shape than the model's layer"

_log = logging.getLogger(__name__)


def match_lora(
    weights: LoRAWeights,
    tables: Mapping[Component, TargetTable],
    absent: Iterable[Component] = (),
    partial: Partial = "refuse",
) -> MatchedLoRA:
    """Find every module's layer. ``tables`` are the model's parts, ``absent`` parts that the caller leaves out on purpose.

    Whatever is not applied is in the result's ``left_out`` and logged in one warning. ``partial``: "allow" places what fits
    of a file that would be refused for what it loses.

    Raises IncompatibleAdapterError if the LoRA belongs to another base model (one shape that does not fit is enough), if
    nothing is found, or if what is lost matters (``losses.py``).
    """
    if partial not in PARTIAL:
        raise InvalidInputError(f"partial is {quoted(partial)}; choose one of: {', '.join(PARTIAL)}")
    found = _Found([], [], [], [], list(weights.left_out))
    skipped = set(absent)
    searched = False
    for module in weights.modules:
        table = None if module.component in skipped else tables.get(module.component)
        if table is None:
            found.left_out.append(LeftOut(module.stem, NOT_THERE[module.component]))
            if module.component not in skipped:
                found.unmatched.append(Unmatched(module, None))
            continue
        places = table.spelled.get(module.stem) or table.names.get(module.name, ())
        if not places:
            # only the first is shown, and one look-up of a similar name costs as much as placing the whole file
            nearest = None if searched else _nearest(module.name, table)
            searched = True
            found.unmatched.append(Unmatched(module, nearest))
            found.left_out.append(LeftOut(module.stem, NO_PLACE, nearest))
            continue
        for place in places:
            found.add(module, place, table.targets[place.path], sources_of(places), widens=table.widens)
    if found.misfits and partial == "allow" and found.matches:
        found.misfits.clear()
    _refuse(weights, tables, found, partial)
    matched = MatchedLoRA(weights, tuple(found.matches), tuple(found.unmatched), tuple(found.left_out))
    if matched.left_out:
        _log.warning("%s: %s", quoted(weights.name), "; ".join(matched.report()))
    return matched


@dataclass(frozen=True, slots=True)
class _Found:
    """What the search has come to."""

    matches: list[TargetMatch]
    unmatched: list[Unmatched]
    misfits: list[str]
    widened: list[str]
    left_out: list[LeftOut]

    def add(self, module: LoRAModule, place: Place, target: Target, rows: int | None, *, widens: bool) -> None:
        """``rows``: how many the file's layer must have, None for as many as the model's."""
        if place.parameter == "bias" and module.bias is not None:
            self.left_out.append(LeftOut(module.stem, NO_BIAS))
        for update in _matches(module, place, target):
            shape = _shape(update)
            update = replace(update, update=_for_shape(update, shape, widens=widens))
            if update.parameter == "bias" and not target.has_bias:
                if not update.update.multiplies:
                    self.left_out.append(LeftOut(module.stem, NO_BIAS))
            elif update.update.fits(shape) and _has_rows(module, update.parameter, rows):
                own = update.update.on(shape)
                self.matches.append(replace(update, update=Lookup(own) if target.is_embedding else own))
            else:
                if _widens(update):
                    self.widened.append(update.key)
                self.misfits.append(
                    f"{quoted(module.stem)} is for {shape_text(update.update.weight_shape)}, {update.key} is {shape_text(shape)}"
                )
                self.left_out.append(LeftOut(module.stem, MISFIT))


def _is_finite(tensor: Tensor) -> bool:
    """By the sum, which is NaN or infinite if a number is; a fraction of the cost of testing each."""
    return tensor.is_meta or bool(
        torch.isfinite(tensor.sum(dtype=torch.float64 if tensor.device.type == "cpu" else None))
    )


def sources_of(places: tuple[Place, ...]) -> int | None:
    """Rows of the file's layer behind these places, None where each takes all of it."""
    ends = [place.rows.source + place.rows.length for place in places if place.rows is not None]
    return max(ends, default=None)


def _has_rows(module: LoRAModule, parameter: Parameter, rows: int | None) -> bool:
    update = module.weight if parameter == "weight" else module.bias
    return rows is None or update is None or update.weight_shape[0] in (None, rows)


def _matches(module: LoRAModule, place: Place, target: Target) -> Iterable[TargetMatch]:
    parameters: tuple[tuple[Parameter, Update | None], ...] = (("weight", module.weight), ("bias", module.bias))
    if place.parameter == "bias":
        parameters = (("bias", module.weight),)
    for parameter, update in parameters:
        if update is None:
            continue
        rows = place.rows
        if rows is None:
            yield TargetMatch(target, parameter, update)
            continue
        whole = rows.target == 0 and rows.length == target.shape[0]
        yield TargetMatch(
            target,
            parameter,
            _source_rows(update, rows.source, rows.length),
            None if whole else (rows.target, rows.length),
        )


def _widens(match: TargetMatch) -> bool:
    """Whether the update is for Flux's first layer with twice the inputs."""
    first = match.target.path in ("img_in", "x_embedder") and match.parameter == "weight"
    rows, *rest = _shape(match)
    return first and len(rest) == 1 and match.update.fits((rows, 2 * rest[0]))


def _for_shape(match: TargetMatch, shape: tuple[int, ...], *, widens: bool) -> Update:
    """The update as one that widens its layer's inputs, where the model takes that; else as it is for the layer's own shape."""
    update = match.update
    if isinstance(update, Widened):
        return update if widens and update.fits(shape) else update.inner
    if widens and match.parameter == "weight" and not update.fits(shape) and _widens(match):
        return Widened(update, (shape[0], 2 * shape[1]))
    return update


def _source_rows(update: Update, start: int, length: int) -> Update:
    return update if start == 0 and update.weight_shape[0] == length else update.rows(start, length)


def _shape(match: TargetMatch) -> tuple[int, ...]:
    shape = match.target.shape
    if match.rows is None and match.parameter == "weight":
        return shape
    rows = shape[0] if match.rows is None else match.rows[1]
    return (rows,) if match.parameter == "bias" else (rows, *shape[1:])


def _nearest(name: str, table: TargetTable) -> str | None:
    return next(iter(get_close_matches(name[:LONGEST_NAME], table.names, 1, 0.6)), None)


def _refuse(weights: LoRAWeights, tables: Mapping[Component, TargetTable], found: _Found, partial: Partial) -> None:
    base, denoiser = weights.base_model, tables.get("denoiser")
    model = denoiser.family if denoiser is not None else "unknown"
    foreign = "unknown" not in (base, model) and model not in base.split(" or ")
    if found.widened and not foreign and len(found.widened) == len(found.misfits):
        raise IncompatibleAdapterError(
            f"{weights.name} is a control LoRA (Flux Canny or Depth): it gives {found.widened[0]} twice its inputs, which takes a "
            "wider layer and a control picture beside the latent. Load it with the host's own loader (ComfyUI: LoraLoader and "
            "InstructPixToPixConditioning; diffusers: FluxControlPipeline.load_lora_weights)"
        )
    diagnosis = f"this is a LoRA for {base}, the model is {model}" if foreign else ""
    if found.misfits:
        total = len(found.misfits) + len(found.matches)
        raise IncompatibleAdapterError(
            f"{weights.name} does not fit: {len(found.misfits)} of {total} updates have other shapes, such as "
            f"{found.misfits[0]}; "
            + (
                f"{diagnosis}. Choose a LoRA for {model}"
                if foreign
                else "it was made for another variant of this model"
            )
        )
    if not found.matches:
        _no_place(weights, found, diagnosis or _looks(base, model), model)
    if partial == "allow":
        return
    if foreign and found.unmatched:
        _no_place(weights, found, diagnosis, model)
    lost = lost_part(_modules_of(weights, found), _lost(weights, tables, found), tables)
    if lost is not None:
        first = next((u for u in found.unmatched if u.nearest), found.unmatched[0] if found.unmatched else None)
        example = "" if first is None else f", such as {quoted(first.module.stem)}"
        nearest = f" (nearest name in the model: {quoted(first.nearest)})" if first and first.nearest else ""
        raise IncompatibleAdapterError(
            f"{weights.name} would be applied in part only: {lost}{example}{nearest}; {_looks(base, model)}. Choose a LoRA made "
            "for this model, or set partial to 'allow' to apply the rest"
        )


def _no_place(weights: LoRAWeights, found: _Found, diagnosis: str, model: str) -> NoReturn:
    first = found.unmatched[0] if found.unmatched else None
    example = f", such as {quoted(first.module.stem)}" if first else ""
    nearest = f" (nearest name in the model: {quoted(first.nearest)})" if first and first.nearest else ""
    if not found.unmatched:  # all of it is for parts that are left out
        why = left_out_lines(found.left_out)
        raise IncompatibleAdapterError(f"{weights.name} changes nothing here: {'; '.join(why) or 'it has no modules'}")
    raise IncompatibleAdapterError(
        f"{weights.name} does not fit: {len(found.unmatched)} of {len(weights.modules)} modules have no place in the model"
        f"{example}{nearest}; {diagnosis}. Choose a LoRA for {model if model != 'unknown' else 'this model'}"
    )


def _modules_of(weights: LoRAWeights, found: _Found) -> list[Module]:
    """Modules that have all their places."""
    lost = {u.module.stem for u in found.unmatched} | {item.name for item in found.left_out if item.why == MISFIT}
    return [(m.component, m.name) for m in weights.modules if m.stem not in lost]


def _lost(weights: LoRAWeights, tables: Mapping[Component, TargetTable], found: _Found) -> list[Module]:
    """Modules without a place, and layers of the model of which the file has tensors that nothing is known of."""
    known = {(m.component, m.name) for m in weights.modules}
    lost: list[Module] = [(u.module.component, u.module.name) for u in found.unmatched]
    for item in weights.left_out:
        stem = item.name
        for _ in range(3):  # the tensor's name has up to three parts: .x, .x.weight, .x.default.weight
            stem, dot, _ = stem.rpartition(".")
            if not dot:
                break
            component, name = canonical(stem)
            table = tables.get(component)
            if table is not None and name in table.names:
                if (component, name) not in known:
                    lost.append((component, name))
                break
    return lost


def _looks(base: str, model: str) -> str:
    return f"the file looks like a LoRA for {base}, the model like {model}"
