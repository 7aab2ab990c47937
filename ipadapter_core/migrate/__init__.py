"""Workflows of ComfyUI_IPAdapter_plus rewritten with the nodes of this pack; the picture stays the same.

Works on the format that ComfyUI's menu saves. Nodes keep their numbers, places and titles; an apply node becomes Apply
Adapter to Model with Encode Image Prompt above it, a unified loader becomes Load IP-Adapter and Load CLIP Vision. What
has no counterpart stays as it is, and runs under its old name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import InvalidInputError
from .apply import apply_nodes, is_chained, load_adapter_nodes, load_face_model
from .embeds import change_embeds, embed_groups, embeds_obstacle
from .graph import Json, Migration, read_workflow
from .names import EMBEDS, FACE_LOADER, FACE_MODELS, FACE_WIDGETS, LOADERS, NOISE, SOCKETS, UNIFIED, WIDGETS
from .replacements import REPLACEMENTS, Replacement, replace_in_prompt

__all__ = ["REPLACEMENTS", "Replacement", "migrate", "replace_in_prompt"]


def migrate(workflow: Mapping[str, Any], base: str | None = None) -> tuple[Json, list[str]]:
    """The workflow with our nodes, and one line for each thing that changed or stays.

    ``base`` (sd15 or sdxl) tells which files unified loaders mean; by default the checkpoint's name does.
    Raises InvalidInputError for what is no saved workflow.
    """
    if not isinstance(workflow.get("nodes"), list) or not isinstance(workflow.get("links"), list):
        raise InvalidInputError(
            "this is no workflow as ComfyUI's menu saves it (nodes and links); one exported as API has no places: load it in "
            "ComfyUI and save it"
        )
    made = read_workflow(copy.deepcopy(dict(workflow)), base)
    groups = embed_groups(made)
    kept = dict(_kept(made, groups))
    loaders = [n for n, node in made.nodes.items() if node["type"] in LOADERS and n not in kept]
    appliers = [n for n, node in made.nodes.items() if node["type"] in WIDGETS and n not in kept]
    for number in [n for n, node in made.nodes.items() if node["type"] in FACE_MODELS and n not in kept]:
        load_face_model(made, number)
    loaded = {number: load_adapter_nodes(made, number) for number in loaders}
    for number in appliers:
        apply_nodes(made, number, loaded)
    for group in groups:
        if not group & kept.keys():
            change_embeds(made, group, loaded)
    for number in [n for n, node in made.nodes.items() if node["type"] == NOISE]:
        change_noise(made, number)
    made.report += [f"{made.nodes[n]['type']} (node {n}) stays: {reason}" for n, reason in kept.items()]
    return made.finished(), made.report


def _kept(made: Migration, groups: list[set[int]]) -> Iterator[tuple[int, str]]:
    """Nodes of the old pack that stay, and why; a loader stays with what it feeds."""
    reasons: dict[int, str] = {}
    for group in groups:
        reason = embeds_obstacle(made, group)
        if reason:
            reasons |= dict.fromkeys(group, reason)
    for number, node in made.nodes.items():
        kind = node["type"]
        if kind in WIDGETS:
            reason = _obstacle(made, number)
            if reason:
                reasons[number] = reason
        elif (
            kind not in LOADERS
            and kind not in FACE_MODELS
            and kind not in EMBEDS
            and kind != NOISE
            and (kind.startswith(("IPA", "PrepImageFor")) or kind == "InsightFaceLoader")
        ):
            reasons[number] = "there is no node of ours for it"
    changed = True
    while changed:
        changed = False
        for group in groups:
            if group & reasons.keys() and not group <= reasons.keys():
                reasons, changed = dict.fromkeys(group, "something connected with it stays") | reasons, True
        for number, node in made.nodes.items():
            kind = node["type"]
            if kind not in LOADERS and kind not in FACE_MODELS:
                continue
            slot, socket = 1 if kind in UNIFIED else 0, "insightface" if kind in FACE_MODELS else "ipadapter"
            used = [target for target in made.consumers(number, slot) if not is_chained(made, target)]
            fed = [target for target, name in used if name == socket]
            if number not in reasons and (
                len(fed) < len(used)
                or any(t in reasons or made.nodes[t]["type"] not in {*WIDGETS, *EMBEDS} for t in fed)
            ):
                reasons[number], changed = "something that stays is fed by it", True
            if number in reasons:
                for target in fed:
                    if target not in reasons:
                        reasons[target], changed = "its loader feeds nodes that stay", True
    yield from reasons.items()


def _obstacle(made: Migration, number: int) -> str:
    node = made.nodes[number]
    linked = {name for target, name in made.edges if target == number}
    faces = node["type"] in FACE_WIDGETS
    if linked - SOCKETS - ({"insightface"} if faces else set[str]()):
        return f"{', '.join(sorted(linked - SOCKETS))} comes from another node"
    if not {"model", "ipadapter", "image"} <= linked:
        return "it is not connected"
    loader = made.nodes[made.edges[number, "ipadapter"][0]]["type"]
    if loader not in LOADERS:
        return f"its adapter comes from {loader}"
    if faces and loader != FACE_LOADER and "insightface" not in linked:
        return "no face model is connected"
    if (
        faces
        and "insightface" in linked
        and made.nodes[made.edges[number, "insightface"][0]]["type"] not in FACE_MODELS
    ):
        return "its face model comes from another pack"
    if not faces and loader == FACE_LOADER:
        return "its adapter comes from a loader of faces"
    if not faces and loader not in UNIFIED and "clip_vision" not in linked:
        return "no image encoder is connected"
    return ""


def change_noise(made: Migration, number: int) -> None:
    widgets = made.nodes[number].get("widgets_values") or []
    settings = [*widgets[:3], *["fade", 1.0, 0][len(widgets) :]]
    image = made.edges.pop((number, "image_optional"), None)
    made.become(number, "ImagePromptNoise", {"image": "IMAGE"}, {"image": "IMAGE"}, settings)
    if image is not None:
        made.edges[number, "image"] = image
    made.report.append(f"{NOISE} (node {number}) is Noise Image")
