"""Workflows of ComfyUI_IPAdapter_plus, of packs for transformers and of rgthree's LoRA rows rewritten with this pack's nodes.

Works on the format that ComfyUI's menu saves, subgraphs included, and on the one that it runs (exported as API). Nodes
keep their numbers, places and titles, links their numbers; an apply node becomes Apply Adapter to Model with Encode Image
Prompt above it, a unified loader becomes Load IP-Adapter and Load CLIP Vision, a Power Lora Loader becomes LoRA Rows. What has no counterpart, or cannot change,
stays as it is, is named with the reason, and runs under its old name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from ...errors import InvalidInputError, quoted
from .apply import apply_nodes, is_chained, load_adapter_nodes, load_face_model, loader_obstacle
from .bases import Bases
from .embeds import change_embeds, embed_pairs, embeds_obstacle
from .graph import Json, Migration, NodeId, fed_besides, is_row, label, number_of, row, settings_of, shown, table
from .names import (
    EMBEDS,
    FACE_LOADER,
    FACE_MODELS,
    FACE_WIDGETS,
    LOADERS,
    NOISE,
    OLD_TYPES,
    PICTURE_APPLIES,
    PICTURE_LOADERS,
    POWER_LORAS,
    SOCKETS,
    UNIFIED,
    WIDGETS,
)
from .power_loras import power_loras, power_loras_obstacle
from .prompt import Prompt, is_prompt
from .replacements import REPLACEMENTS, Replacement, replace_in_prompt
from .saved import Numbers, Saved
from .transformers import apply_picture_node, load_picture_adapter, picture_obstacle, samplers_told

__all__ = ["REPLACEMENTS", "Migrated", "Replacement", "migrate", "migrate_graph", "replace_in_prompt"]

MAX_NODES = 20_000
"""Of one file; the largest workflows that people share have a tenth of that."""


@dataclass(frozen=True, slots=True)
class Migrated:
    """A graph with our nodes, one line for each thing that changed or stays, and how many old nodes there were."""

    graph: Json
    report: list[str]
    found: int
    rewritten: int


def migrate(workflow: Mapping[str, object], base: str | None = None) -> tuple[Json, list[str]]:
    """The workflow with our nodes, and one line for each thing that changed or stays, as ``migrate_graph`` gives them."""
    made = migrate_graph(workflow, base)
    return made.graph, made.report


def migrate_graph(
    graph: object, base: str | None = None, only: Collection[NodeId] | None = None, inside: str | None = None
) -> Migrated:
    """A workflow (as saved, or as exported for the API) with our nodes; ``graph`` itself stays as it is.

    ``base`` (sd15 or sdxl) tells which files unified loaders mean; by default the names of checkpoints do, and where these
    do not tell, such loaders stay. ``only`` are numbers of nodes that shall change, with those that cannot change without each
    other: a loader and what it feeds. They are numbers of the graph itself, or of the subgraph with the id ``inside``; a graph
    for the API has none. Raises InvalidInputError for what is no workflow, and never anything else.
    """
    raw = table(graph)
    for wrapper in ("workflow", "prompt"):  # what was sent to ComfyUI, or kept beside a picture
        inner = table(raw.get(wrapper))
        if "nodes" not in raw and (is_row(inner.get("nodes")) or is_prompt(inner)):
            made = migrate_graph(inner, base, only, inside)
            return Migrated({**raw, wrapper: made.graph}, made.report, made.found, made.rewritten)
    if not is_row(raw.get("nodes")) and is_prompt(raw):
        _check_size(len(raw))
        return _migrate_prompt(raw, base, only)
    if not is_row(raw.get("nodes")):
        raise InvalidInputError(
            "this is no workflow: neither as ComfyUI's menu saves it (nodes and links) nor exported as API (a table of nodes "
            "with class_type); load it in ComfyUI and save it"
        )
    return _migrate_saved(raw, base, only, inside)


# --- the two formats --------------------------------------------------------------------------------------------------


def _migrate_prompt(raw: Json, base: str | None, only: Collection[NodeId] | None) -> Migrated:
    read = Prompt(raw)
    numbers = Numbers()
    numbers.last_node = max((number for number in read.nodes if isinstance(number, int)), default=0)
    bases = Bases(base, read.nodes.values())
    made = _rewrite(read, numbers.node, bases, only)
    return _told([made], read.written(made), made.report, 0, 0)


def _migrate_saved(raw: Json, base: str | None, only: Collection[NodeId] | None, inside: str | None) -> Migrated:
    """The graph itself and every subgraph that it defines, wherever that is; group nodes are told and stay."""
    graphs = list(_graphs(raw, "", 0))
    _check_size(sum(len(row(graph.get("nodes"))) for _, graph in graphs))
    numbers = Numbers()
    for _, graph in graphs:
        numbers.see(graph)
    promoted = _promoted(graphs)
    read = [Saved(graph, lambda n, name=name: promoted.get((name, n), "")) for name, graph in graphs]
    bases = Bases(base, [node for one in read for node in one.nodes.values()])
    report: list[str] = []
    made: list[Migration] = []
    written: dict[int, Json] = {}
    for (name, graph), one in zip(graphs, read, strict=True):
        meant = graph is raw if inside is None else graph is not raw and name == inside
        change = _rewrite(one, numbers.node, bases, only if only is None or meant else ())
        made.append(change)
        title = graph.get("name")
        where = f"in the subgraph {quoted(title or graph.get('id'))}: " if graph is not raw else ""
        report += [where + line for line in change.report]
        written[id(graph)] = one.written(change, numbers)
    groups, lines = _group_nodes(raw)
    unclear = Counter(kind for one in read for kind in one.unclear)
    lines += [
        f"{count} x {kind} stays: its number is missing or another node has it too" for kind, count in unclear.items()
    ]
    graph = _with_subgraphs(raw, written, 0)
    return _told(made, graph, report + lines, groups, unclear.total())


def _told(made: list[Migration], graph: Json, report: list[str], groups: int, unclear: int) -> Migrated:
    rewritten = sum(one.rewritten for one in made)
    stay = sum(node.type in OLD_TYPES for one in made for node in one.nodes.values()) + groups + unclear
    found = rewritten + stay
    total = (
        f"{found} nodes of other packs found: {rewritten} rewritten, {stay} as they were"
        if found
        else "no nodes of ComfyUI_IPAdapter_plus, of packs for FLUX and SD3, or Power Lora Loaders of rgthree found"
    )
    return Migrated(graph, [*report, total], found, rewritten)


def _check_size(nodes: int) -> None:
    if nodes > MAX_NODES:
        raise InvalidInputError(f"this workflow has {nodes:,} nodes; at most {MAX_NODES:,} can be read")


MAX_NESTING = 20


def _graphs(raw: Json, name: str, depth: int) -> Iterable[tuple[str, Json]]:
    yield name, raw
    for entry in map(table, row(table(raw.get("definitions")).get("subgraphs"))):
        if depth < MAX_NESTING and is_row(entry.get("nodes")):
            yield from _graphs(entry, str(entry.get("id")), depth + 1)


def _with_subgraphs(raw: Json, written: Mapping[int, Json], depth: int) -> Json:
    out = written[id(raw)]
    definitions = table(raw.get("definitions"))
    if depth >= MAX_NESTING or not is_row(definitions.get("subgraphs")):
        return out
    subgraphs = [
        _with_subgraphs(table(entry), written, depth + 1) if is_row(table(entry).get("nodes")) else entry
        for entry in row(definitions["subgraphs"])
    ]
    return {**out, "definitions": {**definitions, "subgraphs": subgraphs}}


def _promoted(graphs: list[tuple[str, Json]]) -> dict[tuple[str, NodeId], str]:
    """Nodes of which a subgraph's own node shows a widget, by (the subgraph, the node), and why they cannot change."""
    found: dict[tuple[str, NodeId], str] = {}
    for _, graph in graphs:
        for node in map(table, row(graph.get("nodes"))):
            for entry in map(row, row(table(node.get("properties")).get("proxyWidgets"))):
                number = number_of(entry[0]) if len(entry) > 1 else None
                if number is not None:
                    found[str(node.get("type")), number] = f"the subgraph's node shows its {quoted(entry[1])}"
    return found


def _group_nodes(raw: Json) -> tuple[int, list[str]]:
    """How many old nodes are in group nodes, and a line for each of these."""
    total = 0
    lines: list[str] = []
    for name, group in table(table(raw.get("extra")).get("groupNodes")).items():
        kinds = [table(node).get("type") for node in row(table(group).get("nodes"))]
        old = [kind for kind in kinds if isinstance(kind, str) and kind in OLD_TYPES]
        if old:
            total += len(old)
            lines.append(
                f"{len(old)} old nodes inside the group node {quoted(name)} ({', '.join(sorted(set(old)))}) stay as they are, "
                "because its widgets and sockets are made of theirs: convert it to nodes or to a subgraph and migrate again"
            )
    return total, lines


# --- rewriting --------------------------------------------------------------------------------------------------------


def _rewrite(
    read: Saved | Prompt, fresh: Callable[[], NodeId], bases: Bases, only: Collection[NodeId] | None
) -> Migration:
    """Change what can change in one graph."""
    told: dict[NodeId, tuple[str, str]] = {}

    def base_for(number: NodeId) -> tuple[str, str]:  # as the graph was before anything changed
        if number not in told:
            told[number] = bases.of(made, number)
        return told[number]

    made = Migration(dict(read.nodes), read.edges, fresh, base_for)
    groups, kept = _kept(made, only)
    old = {n: node.type for n, node in made.nodes.items() if node.type in OLD_TYPES and n not in kept}
    made.report += [
        f"{shown([name])} of {made.nodes[number].type} (node {label(number)}) comes from a node that is not there"
        for number, name in read.lost
        if made.type_of(number) in OLD_TYPES and kept.get(number, "told")
    ]
    for number in [n for n, kind in old.items() if kind in FACE_MODELS]:
        load_face_model(made, number)
    loaded = {n: load_adapter_nodes(made, n) for n, kind in old.items() if kind in LOADERS}
    for number in [n for n, kind in old.items() if kind in WIDGETS]:
        apply_nodes(made, number, loaded)
    for group in groups:
        if group[0] not in kept:
            change_embeds(made, group, loaded)
    for number in [n for n, kind in old.items() if kind == NOISE]:
        change_noise(made, number)
    for number in [n for n, kind in old.items() if kind == POWER_LORAS]:
        power_loras(made, number)
    seen_by = {n: load_picture_adapter(made, n) for n, kind in old.items() if kind in PICTURE_LOADERS}
    for number in [n for n, kind in old.items() if kind in PICTURE_APPLIES]:
        loader = made.origin(made.edges[number, PICTURE_APPLIES[old[number]][0][0]]).source
        apply_picture_node(made, number, seen_by.get(loader))
    if seen_by:
        made.report += samplers_told(made)
    made.follow_reroutes()
    made.report += [f"{made.nodes[n].type} (node {label(n)}) stays: {reason}" for n, reason in kept.items() if reason]
    return made


def _kept(made: Migration, only: Collection[NodeId] | None) -> tuple[list[list[NodeId]], dict[NodeId, str]]:
    """Groups of nodes that hand embeds to one another, and the old nodes that stay, each with the reason, none if nobody asked for it.

    A loader stays with what it feeds, and what it feeds with it.
    """
    reasons: dict[NodeId, str] = {}
    groups = components(embed_pairs(made))
    pairs = [(group[0], number) for group in groups for number in group]
    chained: list[tuple[NodeId, NodeId]] = []
    for group in groups:
        reason = embeds_obstacle(made, set(group))
        if reason:
            reasons |= dict.fromkeys(group, reason)
    old = [(number, node) for number, node in made.nodes.items() if node.type in OLD_TYPES]
    for number, node in old:
        kind = node.type
        if kind in WIDGETS:
            reason = _obstacle(made, number)
        elif kind in LOADERS:
            reason = loader_obstacle(made, number)
        elif kind in PICTURE_LOADERS or kind in PICTURE_APPLIES:
            reason = picture_obstacle(made, number)
        elif kind in FACE_MODELS or kind == NOISE:
            reason = settings_of(node)[1] or fed_besides(made, number, ("image_optional",) if kind == NOISE else ())
        elif kind == POWER_LORAS:
            reason = power_loras_obstacle(made, number)
        else:
            reason = "" if kind in EMBEDS else "there is no node of ours for it"
        reason = node.pinned or reason
        if reason:
            reasons.setdefault(number, reason)
        if kind in PICTURE_LOADERS:
            for target, name in made.uses(number, 0):
                applies = PICTURE_APPLIES.get(made.type_of(target))
                if applies is not None and applies[0][0] == name:
                    pairs.append((number, target))
                else:
                    reasons.setdefault(number, "something that stays is fed by it")
        if kind in LOADERS or kind in FACE_MODELS:
            slot, socket = 1 if kind in UNIFIED else 0, "insightface" if kind in FACE_MODELS else "ipadapter"
            for target, name in made.uses(number, slot):
                if is_chained(made, (target, name)):
                    chained.append((number, target))
                    continue
                if name == socket and (made.type_of(target) in WIDGETS or made.type_of(target) in EMBEDS):
                    pairs.append((number, target))
                else:
                    reasons.setdefault(number, "something that stays is fed by it")
    for together in components(pairs):
        if any(number in reasons for number in together):
            for number in together:
                kind = made.nodes[number].type
                feeds = kind in LOADERS or kind in FACE_MODELS or kind in PICTURE_LOADERS
                told = "something that stays is fed by it" if feeds else "its loader feeds nodes that stay"
                reasons.setdefault(number, "something connected with it stays" if kind in EMBEDS else told)
    if only is not None:
        asked = {number for number in map(number_of, only) if number is not None}
        for together in components([*pairs, *chained]):
            asked |= set(together) if asked & set(together) else set()
        reasons |= {number: "" for number, _ in old if number not in asked}
    return groups, {number: reasons[number] for number, _ in old if number in reasons}


def components(pairs: Iterable[tuple[NodeId, NodeId]]) -> list[list[NodeId]]:
    """What hangs together by pairs, in the order in which it comes."""
    above: dict[NodeId, NodeId] = {}

    def top(number: NodeId) -> NodeId:
        while above.setdefault(number, number) != number:
            above[number] = above[above[number]]
            number = above[number]
        return number

    for one, other in pairs:
        first, second = top(one), top(other)
        above[second] = first
    found: dict[NodeId, list[NodeId]] = {}
    for number in above:
        found.setdefault(top(number), []).append(number)
    return list(found.values())


def _obstacle(made: Migration, number: NodeId) -> str:
    node = made.nodes[number]
    linked = made.edges.into(number)
    faces = node.type in FACE_WIDGETS
    others = fed_besides(made, number, {*SOCKETS, "insightface"} if faces else SOCKETS)
    if others:
        return others
    if not {"model", "ipadapter", "image"} <= linked.keys():
        return "it is not connected"
    wrong = settings_of(node)[1]
    if wrong:
        return wrong
    loader = made.type_of(made.origin(linked["ipadapter"]).source)
    if loader not in LOADERS:
        return f"its adapter comes from {quoted(loader)}"
    if faces and loader != FACE_LOADER and "insightface" not in linked:
        return "no face model is connected"
    if faces and "insightface" in linked and made.type_of(made.origin(linked["insightface"]).source) not in FACE_MODELS:
        return "its face model comes from another pack"
    if not faces and loader == FACE_LOADER:
        return "its adapter comes from a loader of faces"
    if not faces and loader not in UNIFIED and "clip_vision" not in linked:
        return "no image encoder is connected"
    return ""


def change_noise(made: Migration, number: NodeId) -> None:
    """Make a noise node ours."""
    values, _ = settings_of(made.nodes[number])
    made.move((number, "image_optional"), (number, "image"))
    made.become(number, "ImagePromptNoise", kind=values["type"], strength=values["strength"], blur=values["blur"])
    made.report.append(f"{NOISE} (node {label(number)}) is Noise Image")
