"""Graphs as ComfyUI runs them (exported as API): a table of nodes, each with its inputs by name, without places."""

from __future__ import annotations

from .graph import Edge, Json, Migration, Node, NodeId, Target, Wires, is_table, number_of, row, table
from .names import OUR_NODES


def is_prompt(value: object) -> bool:
    """Whether it is a table of nodes that say what they are."""
    entries = [table(entry) for entry in table(value).values()]
    return bool(entries) and all(
        isinstance(entry.get("class_type"), str) and is_table(entry.get("inputs")) for entry in entries
    )


class Prompt:
    """A prompt as nodes and edges."""

    def __init__(self, raw: Json) -> None:
        self.raw = raw
        self.nodes: dict[NodeId, Node] = {}
        self.edges = Wires()
        self.lost: list[Target] = []
        self.unclear: list[str] = []
        self._keys: dict[NodeId, str] = {}
        for key in raw:
            number = number_of(key)
            if number is not None and number not in self._keys:
                self._keys[number] = key
        for number, key in self._keys.items():
            inputs = table(table(raw[key]).get("inputs"))
            widgets = {name: value for name, value in inputs.items() if self._edge(value) is None}
            self.nodes[number] = Node(number, str(table(raw[key])["class_type"]), widgets)
        for number, key in self._keys.items():
            for name, value in table(table(raw[key]).get("inputs")).items():
                edge = self._edge(value)
                if edge is not None:
                    self.edges[number, name] = edge
        self._before = self.edges.copy()

    def _edge(self, value: object) -> Edge | None:
        match row(value):
            case [origin, int(output)] if not isinstance(output, bool) and output >= 0:
                source = number_of(origin)
                return Edge(source, output, "*") if source in self._keys else None
            case _:
                return None

    def written(self, made: Migration) -> Json:
        """The prompt with what changed in it; other nodes as they were."""
        out: Json = {}
        for number, node in made.nodes.items():
            key = self._keys.get(number, str(number))
            into = {
                name: [self._keys.get(e.source, str(e.source)), e.output] for name, e in made.edges.into(number).items()
            }
            if number not in made.changed:
                before = self._before.into(number)
                if made.edges.into(number) == before:
                    out[key] = self.raw[key]
                    continue
                old = table(self.raw[key])
                inputs = {n: v for n, v in table(old.get("inputs")).items() if n in into or n not in before}
                out[key] = {**old, "inputs": {**inputs, **into}}
                continue
            widgets = dict(zip(OUR_NODES[node.type].widgets, node.widgets, strict=True))
            out[key] = {**table(self.raw.get(key)), "class_type": node.type, "inputs": {**widgets, **into}}
        return out
