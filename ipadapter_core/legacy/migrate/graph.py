"""A graph while it is rewritten: its nodes, and what every input is fed from. Where it came from, its format knows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeGuard

from ...compatibility import COMPATIBILITIES
from ...errors import quoted
from ..settings import todays_option
from .names import DEFAULTS, OPTIONS, OUR_NODES, SETTINGS, SWITCH, TEXTS

Json = dict[str, object]
Settings = dict[str, Any]
"""Widgets of an old node by name, each of the kind that its node has there."""
NodeId = int | str
Target = tuple[NodeId, str]
"""A node and one of its inputs."""

REROUTE = "Reroute"
FAR = 500
"""Nodes that are looked through from one to what feeds it; no real graph has so many in a row."""


@dataclass(frozen=True, slots=True)
class Edge:
    """What an input is fed from: a node, which of its outputs, the type, and the saved link's own number."""

    source: NodeId
    output: int
    type: str
    link: NodeId | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One node: widgets by name, or in order as most files have them; sockets (name to type) of those that we made."""

    id: NodeId
    type: str
    widgets: Mapping[str, object] | tuple[object, ...] = ()
    place: tuple[float, float] = (0.0, 0.0)
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    outputs: Mapping[str, str] = field(default_factory=dict[str, str])
    pinned: str = ""
    """Why it cannot change, where something outside of the node says so."""

    def named(self, names: tuple[str, ...]) -> Json:
        """Its widgets by name; old files may have fewer."""
        if isinstance(self.widgets, Mapping):
            return {name: self.widgets[name] for name in names if name in self.widgets}
        return dict(zip(names, self.widgets, strict=False))

    @property
    def switch(self) -> str:
        """The last widget that our old nodes have and the old pack's have not."""
        widgets = self.widgets
        last = widgets.get("compatibility") if isinstance(widgets, Mapping) else widgets[-1] if widgets else None
        return last if isinstance(last, str) and last in COMPATIBILITIES else SWITCH


class Wires:
    """Which output feeds which input, found from both ends."""

    def __init__(self) -> None:
        self._into: dict[NodeId, dict[str, Edge]] = {}
        self._from: dict[tuple[NodeId, int], dict[Target, None]] = {}

    def __getitem__(self, target: Target) -> Edge:
        return self._into[target[0]][target[1]]

    def get(self, target: Target) -> Edge | None:
        return self._into.get(target[0], {}).get(target[1])

    def __setitem__(self, target: Target, edge: Edge) -> None:
        self.pop(target)
        self._into.setdefault(target[0], {})[target[1]] = edge
        self._from.setdefault((edge.source, edge.output), {})[target] = None

    def pop(self, target: Target) -> Edge | None:
        edge = self._into.get(target[0], {}).pop(target[1], None)
        if edge is not None:
            self._from[edge.source, edge.output].pop(target)
        return edge

    def into(self, number: NodeId) -> dict[str, Edge]:
        """What feeds a node, by its inputs."""
        return dict(self._into.get(number, {}))

    def first(self, number: NodeId, count: int) -> list[tuple[str, Edge]]:
        """At most so many of what feeds a node, by its inputs."""
        return list(islice(self._into.get(number, {}).items(), count))

    def consumers(self, number: NodeId, output: int) -> list[Target]:
        return list(self._from.get((number, output), {}))

    def items(self) -> Iterator[tuple[Target, Edge]]:
        for number, edges in self._into.items():
            for name, edge in edges.items():
                yield (number, name), edge

    def copy(self) -> Wires:
        new = Wires()
        for target, edge in self.items():
            new[target] = edge
        return new


@dataclass
class Migration:
    """A graph being rewritten: its nodes, what every input is fed from, and what is to be told.

    ``fresh`` gives numbers that no node has, ``base_for`` the model family that a loader's preset is for, or why it is
    not known.
    """

    nodes: dict[NodeId, Node]
    edges: Wires
    fresh: Callable[[], NodeId]
    base_for: Callable[[NodeId], tuple[str, str]]
    changed: set[NodeId] = field(default_factory=set[NodeId])
    rewritten: int = 0
    report: list[str] = field(default_factory=list[str])

    def add(self, kind: str, place: tuple[float, float], /, **widgets: object) -> NodeId:
        """Put a node of OUR_NODES into the graph, at a place on the canvas, with a value for each of its widgets."""
        number = self.fresh()
        self.nodes[number] = Node(
            number, kind, _in_order(kind, widgets), place, OUR_NODES[kind].inputs, OUR_NODES[kind].outputs
        )
        self.changed.add(number)
        return number

    def become(self, number: NodeId, kind: str, /, **widgets: object) -> None:
        """Make a node one of OUR_NODES, with a value for each of its widgets."""
        ours = OUR_NODES[kind]
        self.nodes[number] = replace(
            self.nodes[number], type=kind, widgets=_in_order(kind, widgets), inputs=ours.inputs, outputs=ours.outputs
        )
        self.changed.add(number)
        self.rewritten += 1

    def type_of(self, number: NodeId) -> str:
        return self.nodes[number].type if number in self.nodes else ""

    def feed(self, target: Target, source: NodeId, output: int, kind: str) -> None:
        """Connect an input; what is connected already keeps the number of its link."""
        old = self.edges.get(target)
        self.edges[target] = Edge(source, output, kind, None if old is None else old.link)

    def move(self, old: Target, new: Target, kind: str = "") -> None:
        """Let another input have what feeds this one, if anything does, by the same link."""
        edge = self.edges.pop(old)
        if edge is not None:
            self.edges[new] = replace(edge, type=kind or edge.type)

    def origin(self, edge: Edge) -> Edge:
        """What feeds an edge, seen through reroute nodes."""
        seen: set[NodeId] = set()
        while self.type_of(edge.source) == REROUTE and edge.source not in seen and len(seen) < FAR:
            seen.add(edge.source)
            into = self.edges.first(edge.source, 2)
            if len(into) != 1:
                break
            edge = into[0][1]
        return edge

    def uses(self, number: NodeId, output: int) -> list[Target]:
        """Inputs that an output feeds, seen through reroute nodes."""
        found: list[Target] = []
        todo, seen = [(number, output)], {number}
        while todo:
            for target in self.edges.consumers(*todo.pop()):
                if self.type_of(target[0]) != REROUTE:
                    found.append(target)
                elif target[0] not in seen:
                    seen.add(target[0])
                    todo.append((target[0], 0))
        return found

    def follow_reroutes(self) -> None:
        """Give what leaves a reroute node the type of what enters it."""
        todo = [(t, e) for t, e in self.edges.items() if self.type_of(t[0]) == REROUTE and e.source in self.changed]
        seen: set[NodeId] = set()
        while todo:
            (number, _), edge = todo.pop()
            if number in seen:
                continue
            seen.add(number)
            for target in self.edges.consumers(number, 0):
                self.edges[target] = replace(self.edges[target], type=edge.type)
                if self.type_of(target[0]) == REROUTE:
                    todo.append((target, self.edges[target]))


def _in_order(kind: str, widgets: Mapping[str, object]) -> tuple[object, ...]:
    """Values as saved graphs give them, by position. Raises ValueError unless each widget has one."""
    names = OUR_NODES[kind].widgets
    if set(names) != set(widgets):
        raise ValueError(f"{kind} has the widgets {', '.join(names)}; values were given for {', '.join(widgets)}")
    return tuple(widgets[name] for name in names)


def label(number: NodeId) -> str:
    """A node's number as a message may show it."""
    return str(number) if isinstance(number, int) else quoted(number, 40)


def shown(names: Iterable[str]) -> str:
    """Names of inputs as a message may show them."""
    return ", ".join(name if re.fullmatch(r"\w{1,40}", name) else quoted(name, 40) for name in sorted(names)[:5])


def settings_of(node: Node) -> tuple[Settings, str]:
    """The widgets of an old node by name, under today's names of options; and what is wrong with one, if anything is."""
    values: Settings = {}
    for name, value in node.named(SETTINGS[node.type]).items():
        value = todays_option(name, value)
        if name in OPTIONS:
            options = OPTIONS[name](node.type)
            if not isinstance(value, str) or value not in options:
                return {}, f"its {name} is {quoted(value)}, which the old pack has not"
        elif name in TEXTS:
            if not isinstance(value, str):
                return {}, f"its {name} is {quoted(value)}, which is no text"
        else:
            value = number_in(value)
            if value is None:
                return {}, f"its {name} is no number"
        values[name] = value
    return {**DEFAULTS.get(node.type, {}), **values}, ""


def fed_besides(made: Migration, number: NodeId, sockets: Collection[str]) -> str:
    """What is wrong where a node has another input connected than those that ours has too; empty if nothing is."""
    others = made.edges.into(number).keys() - set(sockets)
    return f"{shown(others)} comes from another node" if others else ""


def number_in(value: object) -> float | int | None:
    """A number, also one that is written as a text; None for anything else."""
    if isinstance(value, str) and len(value) < 40:
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < 2**53 and math.isfinite(value) else None


def number_of(value: object) -> NodeId | None:
    """What JavaScript takes for the same key: 5, 5.0 and "5" are one node. None for what can be no key."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"0|-?[1-9]\d{0,14}", value, re.ASCII) else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2**53:
        return None
    return int(value) if value == int(value) else None


def is_table(value: object) -> TypeGuard[Json]:
    """Whether it is a JSON object."""
    return isinstance(value, dict)


def is_row(value: object) -> TypeGuard[list[object]]:
    """Whether it is a JSON array."""
    return isinstance(value, list)


def table(value: object) -> Json:
    """A JSON object; empty for anything else."""
    return value if is_table(value) else {}


def row(value: object) -> list[object]:
    """A JSON array; empty for anything else."""
    return value if is_row(value) else []
