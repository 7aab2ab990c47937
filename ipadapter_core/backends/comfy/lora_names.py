"""ComfyUI's own map of LoRA keys as a second source of names, so that every model it loads is served in every spelling it knows.

Our tables of names are read first; where they and the host disagree about a name, the host's own loader is what people compare
with, so that its answer counts.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...lora.names import canonical
from ...lora.targets import Target, TargetTable, target_of
from ...lora.weights import Component
from ...models.layers import Place, Rows, common_words

HostNames = Mapping[str, Any]
"""A module as files spell it → a key of the host's state dict, or the key with (axis, first, number) or None, and maybe a function
that puts the update's rows into the order of the host's weight."""

DENOISER = "diffusion_model."
KNOWN_ENCODERS: Mapping[str, Component] = {"clip_l": "te1", "clip_h": "te1", "clip_g": "te2", "t5xxl": "te3"}


def encoders_of(clip_model: nn.Module) -> dict[str, Component]:
    """Text encoders of a ``cond_stage_model`` and the parts that they count as: what has no place of its own takes the next free."""
    names = dict.fromkeys(
        name
        for name, child in clip_model.named_children()
        if isinstance(getattr(child, "transformer", None), nn.Module)
    )
    found: dict[str, Component] = {}
    for name in names:
        if name in KNOWN_ENCODERS:
            found[name] = "te1" if name == "clip_g" and "clip_l" not in names else KNOWN_ENCODERS[name]
    texts: tuple[Component, ...] = ("te1", "te2")
    last: Component = "te3"
    free: list[Component] = [part for part in texts if part not in found.values()]
    for name in names:
        if name not in found:
            found[name] = free.pop(0) if free else last
    return {name: found[name] for name in names}


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One model of the host: what its keys begin with, its parameters and the targets found in it so far, by path."""

    module: nn.Module
    tensors: Mapping[str, Tensor]
    targets: dict[str, Target]
    encoders: Mapping[str, Component]

    @classmethod
    def of(cls, module: nn.Module, targets: dict[str, Target], encoders: Mapping[str, Component]) -> _Part:
        tensors = {**dict(module.named_buffers()), **dict(module.named_parameters(remove_duplicate=False))}
        return cls(module, tensors, targets, encoders)

    def place(self, key: str) -> Place | None:
        """Where a key of the state dict leads; None for what is not there or holds no real numbers."""
        path, _, last = key.rpartition(".")
        if last == "weight" and path in self.targets:
            return Place(path)
        if last == "bias" and path in self.targets and self.targets[path].has_bias:
            return Place(path, parameter="bias")
        tensor = self.tensors.get(key)
        if tensor is None or not tensor.is_floating_point():
            return None
        component, label, block = self._words(path if last == "weight" else key)
        if last == "weight":
            self.targets[path] = target_of(path, self.module.get_submodule(path), component, label, block)
            return Place(path)
        bare = Target(
            key, component, label, block, tuple(tensor.shape), False, words=common_words(label), bare=True, beside=False
        )
        self.targets[key] = bare
        return Place(key)

    def _words(self, path: str) -> tuple[Component, str, str]:
        """Part, label and block of what no table of ours has."""
        name, _, inner = path.partition(".transformer.")
        part = self.encoders.get(name)
        if part is not None:
            return part, inner, part
        if self.encoders:
            return "te1", path, "te1"
        return "denoiser", path, "base"


def with_host_names(
    tables: Mapping[Component, TargetTable], names: HostNames, unet: nn.Module | None, clip_model: nn.Module | None
) -> dict[Component, TargetTable]:
    """The tables with the host's names too; a name that files spell with prefixes of different meaning keeps its prefix."""
    parts: dict[str, _Part] = {}
    if unet is not None and "denoiser" in tables:
        parts[DENOISER] = _Part.of(unet, dict(tables["denoiser"].targets), {})
    if clip_model is not None:
        texts = {
            path: t
            for component, table in tables.items()
            if component != "denoiser"
            for path, t in table.targets.items()
        }
        parts[""] = _Part.of(clip_model, texts, encoders_of(clip_model))
    found: dict[tuple[Component, str], dict[tuple[Place, ...], list[str]]] = {}
    wrong = _too_long(names.values(), parts)
    for spelled, to in names.items():
        places = () if _key(to) in wrong and isinstance(to, tuple) else _places(to, parts)
        if places:
            found.setdefault(canonical(spelled), {}).setdefault(places, []).append(spelled)
    targets = {path: target for part in parts.values() for path, target in part.targets.items()}
    components: dict[Component, None] = dict.fromkeys(tables)
    components |= dict.fromkeys(part for part, _ in found)
    made: dict[Component, TargetTable] = {}
    for component in components:
        table = tables.get(component) or TargetTable(component, "unknown", {}, {})
        made[component] = replace(table, targets=targets, **_names(table.names, component, found))
    return made


def _names(
    known: Mapping[str, tuple[Place, ...]],
    component: Component,
    found: Mapping[tuple[Component, str], Mapping[tuple[Place, ...], list[str]]],
) -> dict[str, Any]:
    names, spelled = dict(known), dict[str, tuple[Place, ...]]()
    for (part, name), choices in found.items():
        if part != component:
            continue
        if len(choices) > 1:
            spelled |= {text: places for places, texts in choices.items() for text in texts}
        if not any(_same(names.get(name, ()), places) for places in choices):
            names[name] = next(iter(choices))
    return {"names": names, "spelled": spelled}


def _key(to: object) -> object:
    return to[0] if isinstance(to, tuple) else to


def _too_long(entries: Iterable[object], parts: Mapping[str, _Part]) -> set[object]:
    """Keys of which the host cuts rows that are not there: its widths are another model's, so that no cut of them counts.

    Lumina 2's keys and values are narrower than its queries, which the host's map for Z-Image does not know.
    """
    cuts = (to for to in entries if isinstance(to, tuple) and to[1] is not None and to[1][0] == 0)
    return {_key(to) for to in cuts if not _places(to, parts)}


def _same(some: tuple[Place, ...], others: tuple[Place, ...]) -> bool:
    return set(some) == set(others)


def _places(to: object, parts: Mapping[str, _Part]) -> tuple[Place, ...]:
    """Where an entry of the host's map leads; nothing for what our places cannot say."""
    key, offset, function = (*to, None)[:3] if isinstance(to, tuple) else (to, None, None)
    if not isinstance(key, str):
        return ()
    prefix = DENOISER if key.startswith(DENOISER) else ""
    part = parts.get(prefix)
    place = None if part is None else part.place(key[len(prefix) :])
    if place is None or part is None:
        return ()
    start, length = 0, (part.targets[place.path].shape or (1,))[0]
    if offset is not None:
        axis, start, number = (int(n) for n in offset)
        if axis != 0 or start < 0 or number < 1 or start + number > length:
            return ()
        length = number
    elif function is None:
        return (place,)
    runs = _runs(function, length) if callable(function) else ((0, 0, length),)
    return tuple(replace(place, rows=Rows(source, start + target, number)) for source, target, number in runs)


@lru_cache(maxsize=256)
def _runs(function: Callable[[Tensor], Tensor], length: int) -> tuple[tuple[int, int, int], ...]:
    """(source, target, number) of the runs of rows that a function moves; nothing if it does more than move rows."""
    try:
        moved: list[float] = function(torch.arange(length, dtype=torch.float64).unsqueeze(1)).flatten().tolist()
    except Exception:  # a function of the host's for other shapes: its name is not served, which the report says
        return ()
    if sorted(moved) != list(range(length)):
        return ()
    runs: list[tuple[int, int, int]] = []
    for target, source in enumerate(map(int, moved)):
        if runs and source == runs[-1][0] + runs[-1][2]:
            first, at, number = runs[-1]
            runs[-1] = first, at, number + 1
        else:
            runs.append((source, target, 1))
    return tuple(runs)
