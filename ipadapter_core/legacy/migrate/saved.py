"""Graphs as ComfyUI's menu saves them, and subgraphs inside: read once into typed nodes and edges, written back.

Such files come from deleted packs, other tools and hand edits. What is not as it should be is no node and no edge here,
and is written back as it was; so is everything that a rewritten node has nothing to do with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .graph import Edge, Json, Migration, Node, NodeId, Target, Wires, is_row, is_table, number_of, row, table
from .names import OLD_TYPES

ROW = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
"""A link, as an array in this order or as an object with these names."""

OUTSIDE = "the outside of its subgraph"
Output = tuple[NodeId, int]


@dataclass(frozen=True, slots=True)
class Link:
    id: NodeId
    source: NodeId
    output: int
    target: NodeId
    slot: int
    type: str


class Numbers:
    """Numbers for new nodes and links, above all that a file has in any of its graphs."""

    def __init__(self) -> None:
        self.last_node = self.last_link = 0

    def see(self, graph: Json) -> None:
        state = table(graph.get("state"))
        for value in (
            graph.get("last_node_id"),
            state.get("lastNodeId"),
            *(table(n).get("id") for n in row(graph.get("nodes"))),
        ):
            self.last_node = max(self.last_node, _whole(value))
        links = [link for link in map(read_link, row(graph.get("links"))) if link is not None]
        links += [link for link in map(read_link, row(graph.get("floatingLinks"))) if link is not None]
        for value in (graph.get("last_link_id"), state.get("lastLinkId"), *(link.id for link in links)):
            self.last_link = max(self.last_link, _whole(value))

    def node(self) -> int:
        self.last_node += 1
        return self.last_node

    def link(self) -> int:
        self.last_link += 1
        return self.last_link


class Saved:
    """One graph of a file. ``pinned`` tells for which nodes something outside of them needs them as they are."""

    def __init__(self, raw: Json, pinned: Callable[[NodeId], str] = lambda _: "") -> None:
        self.raw = raw
        self.nodes: dict[NodeId, Node] = {}
        self.edges = Wires()
        self.lost: list[Target] = []
        """Inputs whose link comes from nowhere; such links fall away when ComfyUI loads the file."""
        self.unclear: list[str] = []
        """Types of old nodes that are not whole enough to be told apart."""
        self._slots: dict[Target, int] = {}
        self._links = {link.id: link for link in map(read_link, row(raw.get("links"))) if link is not None}
        entries = [table(entry) for entry in row(raw.get("nodes"))]
        self._entries = Counter(number_of(entry.get("id")) for entry in entries if entry)
        for entry in entries:
            number, kind = number_of(entry.get("id")), entry.get("type")
            if number is None or self._entries[number] > 1 or not isinstance(kind, str):
                self.unclear += [kind] if isinstance(kind, str) and kind in OLD_TYPES else []
                continue
            widgets = entry.get("widgets_values")
            self.nodes[number] = Node(
                number, kind, table(widgets) or tuple(row(widgets)), _place(entry.get("pos")), pinned=pinned(number)
            )
        self._inlet, self._outlet = self._outside("inputNode", -10), self._outside("outputNode", -20)
        for entry in entries:
            number = number_of(entry.get("id"))
            if number in self.nodes:
                self._read_inputs(number, row(entry.get("inputs")))
        for link in self._links.values():
            if link.target == self._outlet:
                target = (link.target, f"#{link.slot}")
                self._slots[target] = link.slot
                self._connect(target, link)
        self._before = self.edges.copy()

    def _read_inputs(self, number: NodeId, inputs: list[object]) -> None:
        for slot, entry in enumerate(map(table, inputs)):
            name, link = entry.get("name"), number_of(entry.get("link"))
            target = (number, name if isinstance(name, str) else f"#{slot}")
            if target in self._slots:
                target = (number, f"#{slot}")
            self._slots[target] = slot
            if link is not None and link in self._links:
                self._connect(target, self._links[link])
            elif link is not None:
                self.lost.append(target)

    def _connect(self, target: Target, link: Link) -> None:
        if link.source in self.nodes or link.source in self._entries:
            self.edges[target] = Edge(link.source, link.output, link.type, link.id)
        else:
            self.lost.append(target)

    def _outside(self, key: str, default: int) -> NodeId | None:
        """What a subgraph is given, or gives, as a node of its own; None for a graph that is none, or has none."""
        if not is_table(self.raw.get(key)):
            return None
        number = number_of(table(self.raw[key]).get("id"))
        number = default if number is None else number
        if number in self._entries:
            return None
        self.nodes[number] = Node(number, OUTSIDE)
        return number

    # --- writing ------------------------------------------------------------------------------------------------------

    def written(self, made: Migration, numbers: Numbers) -> Json:
        """The graph with what changed in it; everything else as it was."""
        if not any(node.type in OLD_TYPES for node in self.nodes.values()):
            return self.raw
        before, after = dict(self._before.items()), dict(made.edges.items())
        ids: dict[Target, NodeId] = {
            target: edge.link
            for target, edge in after.items()
            if edge.link is not None and target[0] not in made.changed and before.get(target) == edge
        }
        taken = set(ids.values())
        links: dict[NodeId, Link] = {}
        for target, edge in after.items():
            if target in ids:
                continue
            number = numbers.link() if edge.link is None or edge.link in taken else edge.link
            taken.add(number)
            ids[target] = number
            links[number] = Link(number, edge.source, edge.output, target[0], self._slot(made, target), edge.type)
        gone = {edge.link for edge in before.values() if edge.link is not None} - taken
        gone |= {
            link.id
            for link in self._links.values()
            if link.id not in taken and (link.target in made.changed or link.source in made.changed)
        }
        leaving: dict[Output, list[NodeId]] = {}
        for target, edge in after.items():
            leaving.setdefault((edge.source, edge.output), []).append(ids[target])
        out = {**self.raw, "nodes": self._nodes(made, ids, leaving)}
        if not made.changed:
            return out
        out["links"] = self._rows(links, gone)
        self._outsides(out, ids, leaving)
        _forget(out, gone, made.changed)
        _count(out, numbers)
        return out

    def _slot(self, made: Migration, target: Target) -> int:
        if target[0] in made.changed:
            return list(made.nodes[target[0]].inputs).index(target[1])
        return self._slots[target]

    def _nodes(self, made: Migration, ids: dict[Target, NodeId], leaving: dict[Output, list[NodeId]]) -> list[object]:
        def sockets(node: Node) -> Json:
            return {
                "type": node.type,
                "inputs": [
                    {"name": name, "type": kind, "link": ids.get((node.id, name))} for name, kind in node.inputs.items()
                ],
                "outputs": [
                    {"name": name, "type": kind, "links": leaving.get((node.id, slot), [])}
                    for slot, (name, kind) in enumerate(node.outputs.items())
                ],
                "properties": {"Node name for S&R": node.type},
                "widgets_values": list(node.widgets),
            }

        nodes: list[object] = []
        for entry in row(self.raw.get("nodes")):
            number = number_of(table(entry).get("id"))
            if number is None or self._entries[number] > 1:
                nodes.append(entry)
            elif number in made.changed:
                nodes.append({**table(entry), **sockets(made.nodes[number])})
            else:
                nodes.append(self._rewired(table(entry), number, ids, leaving))
        for number, node in made.nodes.items():
            if number not in self.nodes:
                frame: Json = {
                    "id": number,
                    "pos": list(node.place),
                    "size": [320, 200],
                    "flags": {},
                    "order": 0,
                    "mode": 0,
                }
                nodes.append({**frame, **sockets(node)})
        return nodes

    def _rewired(
        self, entry: Json, number: NodeId, ids: dict[Target, NodeId], leaving: dict[Output, list[NodeId]]
    ) -> Json:
        """An untouched node with the numbers of the links that changed at its sockets."""
        inputs = list(row(entry.get("inputs")))
        for name, edge in self._before.into(number).items():
            if ids.get((number, name)) != edge.link:
                slot = self._slots[number, name]
                inputs[slot] = {**table(inputs[slot]), "link": ids.get((number, name))}
        outputs = self._with_links(row(entry.get("outputs")), number, "links", leaving)
        changes: Json = {"inputs": inputs} if inputs != entry.get("inputs") and inputs else {}
        return {**entry, **changes, **({} if outputs is None else {"outputs": outputs})}

    def _with_links(
        self, sockets: list[object], number: NodeId, key: str, leaving: dict[Output, list[NodeId]]
    ) -> list[object] | None:
        """Sockets with the links that leave them (inputs know them better in a damaged file); None where they have these."""
        new = list(sockets)
        for slot, raw in enumerate(sockets):
            was = {self._before[target].link for target in self._before.consumers(number, slot)}
            now = leaving.get((number, slot), [])
            held = table(raw).get(key)
            if not is_table(raw) or not (held is None or is_row(held)):
                continue
            kept = [link for link in row(held) if number_of(link) not in was - set(now)]
            known = {number_of(link) for link in kept}
            links = [*kept, *(link for link in now if link not in known)]
            if links != row(held):
                new[slot] = {**raw, key: links}
        return new if new != sockets else None

    def _outsides(self, out: Json, ids: dict[Target, NodeId], leaving: dict[Output, list[NodeId]]) -> None:
        """The numbers of links in a subgraph's own sockets."""
        if self._inlet is not None:
            inputs = self._with_links(row(self.raw.get("inputs")), self._inlet, "linkIds", leaving)
            out |= {} if inputs is None else {"inputs": inputs}
        if self._outlet is None:
            return
        outputs = list(row(self.raw.get("outputs")))
        for name, edge in self._before.into(self._outlet).items():
            slot, now = self._slots[self._outlet, name], ids.get((self._outlet, name))
            if now != edge.link and slot < len(outputs) and is_table(outputs[slot]):
                outputs[slot] = {**table(outputs[slot]), "linkIds": [] if now is None else [now]}
                out["outputs"] = outputs

    def _rows(self, links: dict[NodeId, Link], gone: set[NodeId]) -> list[object]:
        rows: list[object] = []
        entries = row(self.raw.get("links"))
        last = {link.id: place for place, link in enumerate(map(read_link, entries)) if link is not None}
        for place, raw in enumerate(entries):
            link = read_link(raw)
            if link is None or (link.id not in gone and link.id not in links):
                rows.append(raw)
            elif link.id in links and last[link.id] == place:
                rows.append(_link_row(links[link.id], raw))
        as_objects = is_table(entries[0]) if entries else is_table(self.raw.get("inputNode"))
        rows += [_link_row(link, {} if as_objects else []) for link in links.values() if link.id not in last]
        return rows


def read_link(raw: object) -> Link | None:
    """A link that says where it comes from and goes to; None for anything else."""
    values = [table(raw).get(key) for key in ROW] if is_table(raw) else row(raw)[:6]
    if len(values) < 6:
        return None
    number, source, target = (number_of(values[i]) for i in (0, 1, 3))
    output, slot = values[2], values[4]
    if number is None or source is None or target is None:
        return None
    if isinstance(output, bool) or not isinstance(output, int) or isinstance(slot, bool) or not isinstance(slot, int):
        return None
    if not 0 <= output < 10_000 or not 0 <= slot < 10_000:
        return None
    return Link(number, source, output, target, slot, values[5] if isinstance(values[5], str) else "*")


def _link_row(link: Link, raw: object) -> object:
    values = [link.id, link.source, link.output, link.target, link.slot, link.type]
    return {**table(raw), **dict(zip(ROW, values, strict=True))} if is_table(raw) else [*values, *row(raw)[6:]]


def _forget(out: Json, gone: set[NodeId], changed: set[NodeId]) -> None:
    """Take links that are no more out of the dots on wires, and loose ends at rewritten nodes away."""
    loose = {
        link.id
        for link in map(read_link, row(out.get("floatingLinks")))
        if link is not None and (link.source in changed or link.target in changed)
    }
    if loose:
        out["floatingLinks"] = [
            raw for raw in row(out["floatingLinks"]) if (link := read_link(raw)) is None or link.id not in loose
        ]

    def dots(raw: object) -> object:
        ids = table(raw).get("linkIds")
        if not is_row(ids) or not any(number_of(link) in gone for link in row(ids)):
            return raw
        return {**table(raw), "linkIds": [link for link in row(ids) if number_of(link) not in gone]}

    if is_row(out.get("reroutes")):
        out["reroutes"] = [dots(raw) for raw in row(out["reroutes"])]
    extra = table(out.get("extra"))
    if is_row(extra.get("reroutes")):
        extra = {**extra, "reroutes": [dots(raw) for raw in row(extra["reroutes"])]}
    if is_row(extra.get("linkExtensions")):
        kept = [raw for raw in row(extra["linkExtensions"]) if number_of(table(raw).get("id")) not in gone]
        extra = {**extra, "linkExtensions": kept}
    if extra:
        out["extra"] = extra


def _count(out: Json, numbers: Numbers) -> None:
    """The last numbers given out, where a file of its kind has them."""
    if is_table(out.get("state")):
        out["state"] = {**table(out["state"]), "lastNodeId": numbers.last_node, "lastLinkId": numbers.last_link}
    if "last_node_id" in out or not is_table(out.get("state")):
        out |= {"last_node_id": numbers.last_node, "last_link_id": numbers.last_link}


def _whole(value: object) -> int:
    number = number_of(value)
    return number if isinstance(number, int) else 0


def _place(pos: object) -> tuple[float, float]:
    """Left and top on the canvas, saved as an array or as a table of its places."""
    found = [table(pos).get(key) for key in ("0", "1")] if is_table(pos) else row(pos)[:2]
    numbers = [float(v) for v in found if isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0.0, 0.0)
