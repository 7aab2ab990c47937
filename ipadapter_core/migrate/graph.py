"""A saved workflow while it is rewritten: nodes, and what every input is fed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..compatibility import COMPATIBILITIES
from .names import SWITCH, WIDGETS

Json = dict[str, Any]
Edge = tuple[int, int, str]  # source node, its output, type


@dataclass
class Migration:
    """A workflow being rewritten: its nodes, what every input is fed from, and what is to be told."""

    workflow: Json
    nodes: dict[int, Json]
    edges: dict[tuple[int, str], Edge]
    base: str
    report: list[str] = field(default_factory=list[str])

    def add(
        self, kind: str, pos: list[float], inputs: Mapping[str, str], outputs: Mapping[str, str], widgets: list[Any]
    ) -> int:
        number = max(self.nodes) + 1
        self.nodes[number] = {"id": number, "pos": pos, "size": [320, 200], "flags": {}, "order": 0, "mode": 0}
        self.become(number, kind, inputs, outputs, widgets)
        return number

    def become(
        self, number: int, kind: str, inputs: Mapping[str, str], outputs: Mapping[str, str], widgets: list[Any]
    ) -> None:
        node = self.nodes[number]
        node |= {
            "type": kind,
            "inputs": [{"name": name, "type": type_, "link": None} for name, type_ in inputs.items()],
            "outputs": [{"name": name, "type": type_, "links": []} for name, type_ in outputs.items()],
            "properties": {"Node name for S&R": kind},
            "widgets_values": widgets,
        }

    def consumers(self, number: int, slot: int) -> list[tuple[int, str]]:
        return [target for target, (source, output, _) in self.edges.items() if (source, output) == (number, slot)]

    def finished(self) -> Json:
        """The workflow with links numbered anew."""
        links: list[list[Any]] = []
        for node in self.nodes.values():
            for output in node.get("outputs") or ():
                output["links"] = []
        for number, node in self.nodes.items():
            for slot, entry in enumerate(node.get("inputs") or ()):
                edge = self.edges.get((number, entry["name"]))
                entry["link"] = None
                if edge is not None:
                    source, output, type_ = edge
                    entry["link"] = len(links) + 1
                    self.nodes[source]["outputs"][output]["links"].append(entry["link"])
                    links.append([entry["link"], source, output, number, slot, type_])
        last = {"last_node_id": max(self.nodes), "last_link_id": len(links)}
        return {**self.workflow, "nodes": list(self.nodes.values()), "links": links, **last}


def read_workflow(workflow: Json, base: str | None) -> Migration:
    """A workflow as saved, with links as lists or as objects; ``base`` None: told by the checkpoint's name."""
    nodes: dict[int, Json] = {node["id"]: node for node in workflow["nodes"]}
    sources: dict[int, Edge] = {}
    for link in workflow["links"]:
        row = (
            [link[k] for k in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")]
            if isinstance(link, dict)
            else link
        )
        sources[row[0]] = (row[1], row[2], row[5])
    edges = {
        (number, entry["name"]): sources[entry["link"]]
        for number, node in nodes.items()
        for entry in node.get("inputs") or ()
        if entry.get("link") in sources
    }
    if base is None:
        names = [
            str(v) for node in nodes.values() if "Checkpoint" in node["type"] for v in node.get("widgets_values") or ()
        ]
        base = "sdxl" if any("xl" in name.lower() for name in names) else "sd15"
    return Migration(workflow, nodes, edges, base)


def values_of(node: Json) -> Json:
    """Widgets of a node of WIDGETS by name; old files may have fewer."""
    return dict(zip(WIDGETS[node["type"]], node.get("widgets_values") or [], strict=False))


def switch_of(node: Json) -> str:
    """The last widget that our old nodes have and the old pack's have not."""
    last = (node.get("widgets_values") or [None])[-1]
    return last if last in COMPATIBILITIES else SWITCH


def place_of(node: Json) -> tuple[float, float]:
    """Left and top on the canvas."""
    pos = node.get("pos") or [0, 0]
    return (float(pos["0"]), float(pos["1"])) if isinstance(pos, dict) else (float(pos[0]), float(pos[1]))
