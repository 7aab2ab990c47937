"""Workflow files (the frontend's UI format) to prompts (API format), by the rules of ComfyUI's frontend.

The UI format keeps widget values as a bare list, so names and order come from the server's object_info.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from host.comfy_server import Graph

WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
FRONTEND_ONLY = frozenset({"Note", "MarkdownNote"})
ALWAYS, MUTED, BYPASSED = 0, 2, 4

Workflow = Mapping[str, Any]
Source = tuple[int, int]  # node id, output slot


class WorkflowError(ValueError):
    """A workflow file that the frontend could not turn into a prompt either."""


def to_prompt(workflow: Workflow, object_info: Mapping[str, Any], *, bypass: frozenset[str] = frozenset()) -> Graph:
    """The prompt that the frontend would queue; nodes of the types in `bypass` count as bypassed.

    Raises WorkflowError for node types the server does not know and for widget values that do not fit the node.
    """
    nodes: dict[int, Mapping[str, Any]] = {node["id"]: node for node in workflow["nodes"]}
    links: dict[int, Source] = {link[0]: (link[1], link[2]) for link in map(_as_list, workflow["links"])}
    modes = {i: BYPASSED if node["type"] in bypass else node.get("mode", ALWAYS) for i, node in nodes.items()}

    def source(link: int | None) -> Source | Any | None:
        """The real node behind a link: Reroutes and bypassed nodes passed, muted ones gone; a Primitive's value."""
        while link is not None:
            node_id, slot = links[link]
            node = nodes[node_id]
            if node["type"] == "PrimitiveNode":
                return Constant(node["widgets_values"][0])
            if modes[node_id] == MUTED:
                return None
            if node["type"] == "Reroute":
                link = node["inputs"][0].get("link")
            elif modes[node_id] == BYPASSED:
                link = _passed_on(node, slot)
            else:
                return node_id, slot
        return None

    prompt = Graph()
    for node_id, node in nodes.items():
        kind = node["type"]
        if kind in FRONTEND_ONLY | {"Reroute", "PrimitiveNode"} or modes[node_id] != ALWAYS:
            continue
        if kind not in object_info:
            raise WorkflowError(f"node {node_id} is a {kind}, which this server does not have")
        inputs = dict(_widget_values(node, object_info[kind]))
        for entry in node.get("inputs") or ():
            found = source(entry.get("link"))
            if isinstance(found, Constant):
                inputs[entry["name"]] = found.value
            elif found is not None:
                inputs[entry["name"]] = [str(found[0]), found[1]]
        prompt[str(node_id)] = {"class_type": kind, "inputs": inputs}
    return prompt


class Constant:
    """The value of a PrimitiveNode."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _as_list(link: Any) -> list[Any]:
    if isinstance(link, Mapping):  # the schema of version 1 writes links as objects
        return [link[k] for k in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")]
    return list(link)


def _passed_on(node: Mapping[str, Any], slot: int) -> int | None:
    """The link that a bypassed node hands to its output: the input at the same place, else the first of its type."""
    wanted = node["outputs"][slot]["type"]
    inputs = list(node.get("inputs") or ())
    for entry in [*inputs[slot : slot + 1], *inputs]:
        if entry["type"] == wanted:
            return entry.get("link")
    return None


def _widget_values(node: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    values = node.get("widgets_values") or []
    names = list(widget_names(info))
    if isinstance(values, Mapping):
        yield from ((name, values[name]) for name in names if name is not None and name in values)
        return
    if len(values) != len(names):
        raise WorkflowError(
            f"node {node['id']} ({node['type']}) has {len(values)} widget values, its widgets are {names} (None: the "
            "frontend's own)"
        )
    yield from ((name, value) for name, value in zip(names, values, strict=True) if name is not None)


def widget_names(info: Mapping[str, Any]) -> Iterator[str | None]:
    """Widgets of a node in the frontend's order; None for those it adds itself (seed control, upload button)."""
    uploads = False
    for section in ("required", "optional"):
        inputs = info["input"].get(section, {})
        for name in info.get("input_order", {}).get(section, inputs):
            kind, *rest = inputs[name]
            options = rest[0] if rest else {}
            if not (isinstance(kind, list) or kind in WIDGET_TYPES) or options.get("forceInput"):
                continue
            yield name
            if kind == "INT" and (name in ("seed", "noise_seed") or options.get("control_after_generate")):
                yield None
            uploads = uploads or bool(options.get("image_upload"))
    if uploads:
        yield None
