"""Workflows of ComfyUI_IPAdapter_plus rewritten with the nodes of this pack; the picture stays the same.

Works on the format that ComfyUI's menu saves. Nodes keep their numbers, places and titles; an apply node becomes Apply
Adapter to Model with Encode Image Prompt above it, a unified loader becomes Load IP-Adapter and Load CLIP Vision. What
has no counterpart stays as it is, and runs under its old name.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from .compatibility import COMPATIBILITIES
from .errors import InvalidInputError
from .image_encoder import ENCODERS
from .known_files import known_file
from .legacy import SIMPLE_WEIGHT_TYPES

Json = dict[str, Any]

ADAPTER = "IMAGE_PROMPT_ADAPTER"
SWITCH = "IPAdapter_plus"

# class type: its widgets in order. Every one of these becomes an encode and an apply node.
APPLY_WIDGETS: dict[str, tuple[str, ...]] = {
    "IPAdapter": ("weight", "start_at", "end_at", "weight_type"),
    "IPAdapterAdvanced": ("weight", "weight_type", "combine_embeds", "start_at", "end_at", "embeds_scaling"),
    "IPAdapterBatch": ("weight", "weight_type", "start_at", "end_at", "embeds_scaling"),
}
FACE_WIDGETS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("IPAdapterFaceID", "IPAAdapterFaceIDBatch"), ("weight", "weight_faceidv2", *APPLY_WIDGETS["IPAdapterAdvanced"][1:])
)
"""Every one of these becomes a node that encodes faces and one that applies them."""
_TILED = ("weight", "weight_type", "combine_embeds", "start_at", "end_at", "sharpening", "embeds_scaling")
TILED_WIDGETS: dict[str, tuple[str, ...]] = {
    "IPAdapterTiled": _TILED,
    "IPAdapterTiledBatch": (*_TILED[:2], *_TILED[3:], "encode_batch_size"),
}
"""Every one of these becomes one node."""
PRECISE: dict[str, str] = {
    "IPAdapterPreciseStyleTransfer": "style transfer precise", "IPAdapterPreciseStyleTransferBatch": "style transfer precise",
    "IPAdapterPreciseComposition": "composition precise", "IPAdapterPreciseCompositionBatch": "composition precise",
}  # fmt: skip
"""Every one of these has a preset and becomes a schedule, an encode and an apply node."""
PRECISE_WIDGETS: dict[str, tuple[str, ...]] = dict.fromkeys(
    PRECISE, ("weight", "boost", "combine_embeds", "start_at", "end_at", "embeds_scaling")
)
WIDGETS = APPLY_WIDGETS | FACE_WIDGETS | TILED_WIDGETS | PRECISE_WIDGETS
NEW_NAMES = {
    "ipadapter": "adapter", "image_negative": "negative", "attn_mask": "mask", "weight": "strength",
    "weight_type": "preset", "combine_embeds": "combine", "embeds_scaling": "scaling", "start_at": "start",
    "end_at": "end", "ipadapter_file": "file", "model_name": "pack", "type": "kind", "image_optional": "image",
}  # fmt: skip
"""What inputs of the old nodes are called here; others have the same name."""
FACE_LOADER = "IPAdapterUnifiedLoaderFaceID"
FACE_MODELS = ("IPAdapterInsightFaceLoader", "InsightFaceLoader")
UNIFIED = ("IPAdapterUnifiedLoader", "IPAdapterUnifiedLoaderCommunity", FACE_LOADER)
LOADERS = ("IPAdapterModelLoader", *UNIFIED)
SOCKETS = {"model", "ipadapter", "image", "image_negative", "attn_mask", "clip_vision"}
NOISE = "IPAdapterNoise"
EMBEDS: dict[str, set[str]] = {
    "IPAdapterEncoder": {"ipadapter", "image", "mask", "clip_vision"},
    "IPAdapterCombineEmbeds": {f"embed{i}" for i in range(1, 6)},
    "IPAdapterSaveEmbeds": {"embeds"},
    "IPAdapterLoadEmbeds": set(),
    "IPAdapterEmbeds": {"model", "ipadapter", "pos_embed", "neg_embed", "attn_mask", "clip_vision"},
    "IPAdapterEmbedsBatch": {"model", "ipadapter", "pos_embed", "neg_embed", "attn_mask", "clip_vision"},
}
"""Nodes that hand encoded references to one another, with their sockets. All that are connected change, or none does."""

ENCODE_INPUTS = {
    "adapter": ADAPTER,
    "clip_vision": "CLIP_VISION",
    "image": "IMAGE",
    "mask": "MASK",
    "negative": "IMAGE",
}
FACE_MODEL = "IMAGE_PROMPT_FACE_MODEL"
FACE_INPUTS = {
    "adapter": ADAPTER,
    "face_model": FACE_MODEL,
    "image": "IMAGE",
    "clip_vision": "CLIP_VISION",
    "mask": "MASK",
    "negative": "IMAGE",
}
TILED_INPUTS = {
    "model": "MODEL",
    "adapter": ADAPTER,
    "clip_vision": "CLIP_VISION",
    "image": "IMAGE",
    "mask": "MASK",
    "negative": "IMAGE",
    "schedule": "IMAGE_PROMPT_SCHEDULE",
}
APPLY_INPUTS = {
    "model": "MODEL",
    "adapter": ADAPTER,
    "image_prompt": "IMAGE_PROMPT",
    "mask": "MASK",
    "schedule": "IMAGE_PROMPT_SCHEDULE",
}

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
    made = _read(copy.deepcopy(dict(workflow)), base)
    groups = _embed_groups(made)
    kept = dict(_kept(made, groups))
    loaders = [n for n, node in made.nodes.items() if node["type"] in LOADERS and n not in kept]
    appliers = [n for n, node in made.nodes.items() if node["type"] in WIDGETS and n not in kept]
    for number in [n for n, node in made.nodes.items() if node["type"] in FACE_MODELS and n not in kept]:
        _load_face_model(made, number)
    loaded = {number: _load(made, number) for number in loaders}
    for number in appliers:
        _apply(made, number, loaded)
    for group in groups:
        if not group & kept.keys():
            _change_embeds(made, group, loaded)
    for number in [n for n, node in made.nodes.items() if node["type"] == NOISE]:
        _noise(made, number)
    made.report += [f"{made.nodes[n]['type']} (node {n}) stays: {reason}" for n, reason in kept.items()]
    return made.finished(), made.report


def _read(workflow: Json, base: str | None) -> Migration:
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


def _kept(made: Migration, groups: list[set[int]]) -> Iterator[tuple[int, str]]:
    """Nodes of the old pack that stay, and why; a loader stays with what it feeds."""
    reasons: dict[int, str] = {}
    for group in groups:
        reason = _embeds_obstacle(made, group)
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
            used = [target for target in made.consumers(number, slot) if not _is_chained(made, target)]
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


def _is_chained(made: Migration, target: tuple[int, str]) -> bool:
    """Whether an input is that of a unified loader that may reuse what another one loaded; it can load by itself."""
    return target[1] == "ipadapter" and made.nodes[target[0]]["type"] in UNIFIED


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


def _values(node: Json) -> Json:
    return dict(zip(WIDGETS[node["type"]], node.get("widgets_values") or [], strict=False))


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an old loader loaded besides the adapter, as nodes of its own."""

    vision: int | None = None
    faces: int | None = None


def _load_face_model(made: Migration, number: int) -> None:
    node = made.nodes[number]
    provider, *pack = node.get("widgets_values") or ["CPU"]
    old = node["type"]
    made.become(
        number, "ImagePromptLoadFaceModel", {}, {"face_model": FACE_MODEL}, [*(pack or ["buffalo_l"]), provider]
    )
    made.report.append(f"{old} (node {number}) is Load Face Model")


def _load(made: Migration, number: int) -> Loaded:
    """Rewrite a loader, with nodes for all else that the old one loaded."""
    node = made.nodes[number]
    values = node.get("widgets_values") or [""]
    if node["type"] not in UNIFIED:
        made.become(number, "ImagePromptLoadAdapter", {}, {"adapter": ADAPTER}, [values[0]])
        made.report.append(f"IPAdapterModelLoader (node {number}) is Load IP-Adapter")
        return Loaded()
    entry = known_file(str(values[0]), made.base)
    file = entry.release.split(" from ")[0]
    x, y = _place(node)
    model = made.edges.get((number, "model"))
    lora = float(values[1]) if node["type"] == FACE_LOADER and len(values) > 1 else 0.0
    if lora and entry.lora and model is not None:
        applied = made.add(
            "ImagePromptApplyFaceLoRA", [x, y - 140], {"model": "MODEL", "adapter": ADAPTER}, {"model": "MODEL"}, [lora]
        )
        made.edges[applied, "model"], made.edges[applied, "adapter"] = model, (number, 1, ADAPTER)
        model = (applied, 0, "MODEL")
    for target in made.consumers(number, 0):
        if model is not None:
            made.edges[target] = model
        else:
            made.edges.pop(target)
    for target in made.consumers(number, 1):
        if _is_chained(made, target):
            made.edges.pop(target)
        else:
            made.edges[target] = (number, 0, ADAPTER)
    for name in ("model", "ipadapter"):
        made.edges.pop((number, name), None)
    vision = faces = None
    parts = [f"Load IP-Adapter ({file})"]
    if entry.encoder in ENCODERS:
        encoder = ENCODERS[entry.encoder].files[0]
        vision = made.add("CLIPVisionLoader", [x, y + 130], {}, {"CLIP_VISION": "CLIP_VISION"}, [encoder])
        parts.append(f"Load CLIP Vision ({encoder})")
    if node["type"] == FACE_LOADER:
        provider = values[2] if len(values) > 2 else "CPU"
        where = [x, y + 260]
        faces = made.add("ImagePromptLoadFaceModel", where, {}, {"face_model": FACE_MODEL}, ["buffalo_l", provider])
        parts += ["Load Face Model", *(["Apply Face LoRA"] if lora and entry.lora else [])]
    old = node["type"]
    made.become(number, "ImagePromptLoadAdapter", {}, {"adapter": ADAPTER}, [file])
    made.report.append(
        f"{old} (node {number}, {values[0]}) is {' and '.join(parts)}, taken for an "
        f"{'SDXL' if made.base == 'sdxl' else 'SD1.5'} model: choose your own files where they are called otherwise"
    )
    return Loaded(vision, faces)


def _apply(made: Migration, number: int, loaded: Mapping[int, Loaded]) -> None:
    node = made.nodes[number]
    old, values, switch = node["type"], _values(node), _switch(node)
    source, _, _ = made.edges.pop((number, "ipadapter"))
    beside = loaded.get(source, Loaded())
    vision = beside.vision
    x, y = _place(node)
    combine, batch = values.get("combine_embeds", "concat"), old.endswith("Batch")
    if old in TILED_WIDGETS:
        steering = _steering(values, values.get("weight_type", "linear"), switch)
        settings = [*steering[:-1], combine, batch, values.get("sharpening", 0.0), switch]
        for name in ("image_negative", "attn_mask"):
            edge = made.edges.pop((number, name), None)
            if edge is not None:
                made.edges[number, NEW_NAMES[name]] = edge
        if (number, "clip_vision") not in made.edges and vision is not None:
            made.edges[number, "clip_vision"] = (vision, 0, "CLIP_VISION")
        made.edges[number, "adapter"] = (source, 0, ADAPTER)
        outputs = {"model": "MODEL", "tiles": "IMAGE", "masks": "MASK"}
        made.become(number, "ImagePromptApplyTiled", TILED_INPUTS, outputs, settings)
        _schedule(made, number, settings)
        made.report.append(f"{old} (node {number}) is Apply Tiled Image to Model")
        return
    if old in FACE_WIDGETS:
        outputs = {"image_prompt": "IMAGE_PROMPT", "faces": "IMAGE"}
        # the old pack takes the best detection
        settings = ["best", 1, combine, values.get("weight_faceidv2", 1.0), batch, switch]
        encode = made.add("ImagePromptEncodeFace", [x, y - 340], FACE_INPUTS, outputs, settings)
        for target in made.consumers(number, 1):
            made.edges[target] = (encode, 1, "IMAGE")
        face_model = made.edges.pop((number, "insightface"), None)
        if face_model is None and beside.faces is not None:
            face_model = (beside.faces, 0, FACE_MODEL)
        if face_model is not None:
            made.edges[encode, "face_model"] = (face_model[0], face_model[1], FACE_MODEL)
    else:
        outputs = {"image_prompt": "IMAGE_PROMPT"}
        settings = ["center", combine, "", "auto", batch, switch]
        encode = made.add("ImagePromptEncode", [x, y - 320], ENCODE_INPUTS, outputs, settings)
    for name in ("clip_vision", "image", "image_negative"):
        edge = made.edges.pop((number, name), None)
        if edge is not None:
            made.edges[encode, NEW_NAMES.get(name, name)] = edge
    if (encode, "clip_vision") not in made.edges and vision is not None:
        made.edges[encode, "clip_vision"] = (vision, 0, "CLIP_VISION")
    mask = made.edges.pop((number, "attn_mask"), None)
    if mask is not None:
        made.edges[number, NEW_NAMES["attn_mask"]] = mask
    made.edges[encode, "adapter"] = made.edges[number, "adapter"] = (source, 0, ADAPTER)
    made.edges[number, "image_prompt"] = (encode, 0, "IMAGE_PROMPT")
    kind = str(values.get("weight_type", "linear"))
    preset = SIMPLE_WEIGHT_TYPES.get(kind, "linear") if old == "IPAdapter" else PRECISE.get(old, kind)
    steering = _steering(values, preset, switch)
    made.become(number, "ImagePromptApply", APPLY_INPUTS, {"model": "MODEL"}, steering)
    _schedule(made, number, steering, values.get("boost"))
    encoder = "Encode Face Prompt" if old in FACE_WIDGETS else "Encode Image Prompt"
    made.report.append(f"{old} (node {number}) is {encoder} (node {encode}) and Apply Adapter to Model")


def _steering(values: Json, preset: str, switch: str) -> list[Any]:
    """Widgets of Apply Adapter to Model."""
    steering = [values.get("weight", 1.0), preset, values.get("embeds_scaling", "V only")]
    return [*steering, values.get("start_at", 0.0), values.get("end_at", 1.0), switch]


def _schedule(made: Migration, number: int, steering: list[Any], boost: float | None = None) -> None:
    """An Adapter Schedule where the old node's strength is not that of all its preset does: composition has 1 there."""
    if boost is None and not (steering[1] == "style and composition" and steering[0] != 1):
        return
    x, y = _place(made.nodes[number])
    settings = ["0: 1, 1: 1", "", True, 1.0, 1.0 if boost is None else boost]
    outputs = {"schedule": "IMAGE_PROMPT_SCHEDULE"}
    schedule = made.add("ImagePromptSchedule", [x, y - 580], {}, outputs, settings)
    made.edges[number, "schedule"] = (schedule, 0, "IMAGE_PROMPT_SCHEDULE")
    made.report.append(f"Adapter Schedule (node {schedule}) holds what node {number} had of its own")


def _switch(node: Json) -> str:
    """The last widget that our old nodes have and the old pack's have not."""
    last = (node.get("widgets_values") or [None])[-1]
    return last if last in COMPATIBILITIES else SWITCH


# --- encoded references -----------------------------------------------------------------------------------------------


def _embed_groups(made: Migration) -> list[set[int]]:
    """Numbers of the nodes of EMBEDS, those that are connected by embeds together."""
    groups = [{n} for n, node in made.nodes.items() if node["type"] in EMBEDS]
    for (target, _), (source, _, kind) in made.edges.items():
        if kind == "EMBEDS":
            joined = [group for group in groups if group & {source, target}]
            groups = [group for group in groups if group not in joined] + (
                [set[int]().union(*joined)] if joined else []
            )
    return groups


def _embeds_obstacle(made: Migration, group: set[int]) -> str:
    linked = {number: {name for target, name in made.edges if target == number} for number in group}
    loaders = {made.edges[number, "ipadapter"][0] for number in group if "ipadapter" in linked[number]}
    for number in group:
        kind = made.nodes[number]["type"]
        if linked[number] - EMBEDS[kind]:
            return f"{', '.join(sorted(linked[number] - EMBEDS[kind]))} comes from another node"
        if EMBEDS[kind] & {"model", "ipadapter", "image", "pos_embed", "embeds", "embed1"} - linked[number]:
            return "it is not connected"
        if any(t not in group for slot in (0, 1) for t, _ in made.consumers(number, slot) if kind not in APPLY_EMBEDS):
            return "its embeds go to another pack"
    if len(loaders) != 1:
        return "its embeds are for several adapters" if loaders else "it does not say for which adapter"
    loader = made.nodes[next(iter(loaders))]["type"]
    if loader not in LOADERS or loader == FACE_LOADER:
        return f"its adapter comes from {loader}"
    for number in group:
        node = made.nodes[number]
        kind, widgets = node["type"], node.get("widgets_values") or []
        if kind == "IPAdapterEncoder" and loader not in UNIFIED and "clip_vision" not in linked[number]:
            return "no image encoder is connected"
        beside = made.consumers(number, 1) if kind == "IPAdapterEncoder" else []
        if any(name != "neg_embed" for _, name in beside):
            return "what stands for no image is used as an image"
        if "neg_embed" in linked[number]:
            source, slot, _ = made.edges[number, "neg_embed"]
            if made.nodes[source]["type"] != "IPAdapterEncoder" or slot != 1:
                return "its negative embeds are not those of no image: give Encode Image Prompt a negative image"
        if kind == "IPAdapterCombineEmbeds" and widgets[:1] != ["concat"]:
            if widgets[:1] == ["norm average"]:
                return "its norm average is not ours"
            if not all(_is_single(made, made.edges[number, name]) for name in linked[number]):
                return f"it mixes the images inside its inputs too ({', '.join(map(str, widgets[:1]))}), ours mixes input with input"
        if kind == "IPAdapterEmbedsBatch" and not _feeds_alone(made, made.edges[number, "pos_embed"]):
            return "its embeds are combined or used twice"
        if kind == "IPAdapterLoadEmbeds" and not str(next(iter(widgets), "")).endswith(
            (".ipadpt", ".ipadpt.safetensors")
        ):
            return "its file has another name than such files have"
    return ""


APPLY_EMBEDS = ("IPAdapterEmbeds", "IPAdapterEmbedsBatch")


def _is_single(made: Migration, edge: Edge) -> bool:
    """Whether it is one picture for certain: of Load Image, or the mix of such."""
    source = made.nodes[edge[0]]
    if source["type"] == "IPAdapterCombineEmbeds":
        return (source.get("widgets_values") or ["concat"])[0] != "concat"
    while source["type"] in ("IPAdapterEncoder", "PrepImageForClipVision") and (source["id"], "image") in made.edges:
        source = made.nodes[made.edges[source["id"], "image"][0]]
    return source["type"] == "LoadImage"


def _feeds_alone(made: Migration, edge: Edge) -> bool:
    kind = made.nodes[edge[0]]["type"]
    return kind in ("IPAdapterEncoder", "IPAdapterLoadEmbeds") and len(made.consumers(edge[0], edge[1])) == 1


def _change_embeds(made: Migration, group: set[int], loaded: Mapping[int, Loaded]) -> None:
    """Rewrite nodes of EMBEDS that are connected; each keeps its number."""
    numbers = sorted(group)
    adapter = next(edge for n in numbers if (edge := made.edges.get((n, "ipadapter"))))
    vision = loaded.get(adapter[0], Loaded()).vision
    encoders = [edge for n in numbers if (edge := made.edges.get((n, "clip_vision")))]
    encoder = (vision, 0, "CLIP_VISION") if vision is not None else next(iter(encoders), None)
    batches = {made.edges[n, "pos_embed"][0] for n in numbers if made.nodes[n]["type"] == "IPAdapterEmbedsBatch"}
    renamed = {"pos_embed": "image_prompt", "embeds": "image_prompt", "attn_mask": "mask"}
    renamed |= {f"embed{i}": f"prompt_{i}" for i in range(1, 6)}
    for number in numbers:
        node = made.nodes[number]
        kind, widgets, switch = node["type"], list(node.get("widgets_values") or []), _switch(node)
        own_encoder = made.edges.pop((number, "clip_vision"), encoder)
        for name in EMBEDS[kind] - {"clip_vision"}:
            edge = made.edges.pop((number, name), None)
            if edge is not None and name not in ("neg_embed", "ipadapter"):
                type_ = "IMAGE_PROMPT" if edge[2] == "EMBEDS" else edge[2]
                made.edges[number, renamed.get(name, name)] = (edge[0], edge[1], type_)
        prompt = {"image_prompt": "IMAGE_PROMPT"}
        match kind:
            case "IPAdapterEncoder":
                weight = widgets[0] if widgets else 1.0
                settings = ["center", "concat", "" if weight == 1 else f"{weight:g}", "auto", number in batches, switch]
                made.become(number, "ImagePromptEncode", ENCODE_INPUTS, prompt, settings)
                title = "Encode Image Prompt"
            case "IPAdapterCombineEmbeds":
                inputs = {"adapter": ADAPTER, **{f"prompt_{i}": "IMAGE_PROMPT" for i in range(1, 6)}}
                made.become(number, "ImagePromptCombine", inputs, prompt, [*(widgets[:1] or ["concat"]), *[1.0] * 5])
                title = "Combine Image Prompts"
            case "IPAdapterSaveEmbeds":
                made.become(number, "ImagePromptSave", prompt, {"path": "STRING"}, widgets[:1] or ["IP_embeds"])
                title = "Save Image Prompt"
            case "IPAdapterLoadEmbeds":
                inputs = {"adapter": ADAPTER, "clip_vision": "CLIP_VISION"}
                settings = [f"{widgets[0]} [input]", number in batches, switch]
                made.become(number, "ImagePromptLoad", inputs, prompt, settings)
                title = "Load Image Prompt"
            case _:
                names = ("weight", "weight_type", "start_at", "end_at", "embeds_scaling")
                values: Json = dict(zip(names, widgets, strict=False))
                settings = _steering(values, values.get("weight_type", "linear"), switch)
                made.become(number, "ImagePromptApply", APPLY_INPUTS, {"model": "MODEL"}, settings)
                _schedule(made, number, settings)
                title = "Apply Adapter to Model"
        names = {entry["name"] for entry in node["inputs"]}
        if "adapter" in names:
            made.edges[number, "adapter"] = adapter
        if "clip_vision" in names and own_encoder is not None:
            made.edges[number, "clip_vision"] = own_encoder
        made.report.append(f"{kind} (node {number}) is {title}")


def _noise(made: Migration, number: int) -> None:
    widgets = made.nodes[number].get("widgets_values") or []
    settings = [*widgets[:3], *["fade", 1.0, 0][len(widgets) :]]
    image = made.edges.pop((number, "image_optional"), None)
    made.become(number, "ImagePromptNoise", {"image": "IMAGE"}, {"image": "IMAGE"}, settings)
    if image is not None:
        made.edges[number, "image"] = image
    made.report.append(f"{NOISE} (node {number}) is Noise Image")


# --- one for one ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replacement:
    """A node of ours that does alone what an old one did, for hosts that replace nodes one for one.

    ``widgets`` are the old node's in order, ``inputs`` its inputs by our names, ``values`` what ours is set to besides.
    """

    old: str
    new: str
    widgets: tuple[str, ...]
    inputs: Mapping[str, str]
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    outputs: int = 1


def _replacement(
    old: str, new: str, widgets: tuple[str, ...], sockets: tuple[str, ...] = (), **values: Any
) -> Replacement:
    return Replacement(old, new, widgets, {NEW_NAMES.get(name, name): name for name in (*sockets, *widgets)}, values)


_APPLY_SOCKETS = ("model", "ipadapter", "image", "clip_vision", "image_negative", "attn_mask")

REPLACEMENTS: tuple[Replacement, ...] = (
    _replacement("IPAdapterModelLoader", "ImagePromptLoadAdapter", ("ipadapter_file",)),
    _replacement("IPAdapterInsightFaceLoader", "ImagePromptLoadFaceModel", ("provider", "model_name")),
    _replacement("InsightFaceLoader", "ImagePromptLoadFaceModel", ("provider",), pack="buffalo_l"),
    _replacement(NOISE, "ImagePromptNoise", ("type", "strength", "blur"), ("image_optional",)),
    _replacement(
        "IPAdapterAdvanced", "ImagePromptApplyImage", APPLY_WIDGETS["IPAdapterAdvanced"], _APPLY_SOCKETS,
        per_latent=False, compatibility=SWITCH,
    ),
    _replacement(
        "IPAdapterBatch", "ImagePromptApplyImage", APPLY_WIDGETS["IPAdapterBatch"], _APPLY_SOCKETS,
        combine="concat", per_latent=True, compatibility=SWITCH,
    ),
    replace(
        _replacement(
            "IPAdapterTiled", "ImagePromptApplyTiled", _TILED, _APPLY_SOCKETS, per_latent=False, compatibility=SWITCH
        ),
        outputs=3,
    ),
)  # fmt: skip
"""Nodes that one node of ours replaces; all others take two of ours (migrate() makes those) or stay as they are."""


def replace_in_prompt(prompt: Mapping[str, Any], known: Collection[str]) -> None:
    """Put our nodes in the place of old ones that ``known`` does not list, in a prompt (API format).

    What is not connected in the old node stays unconnected. (ComfyUI's own replacement stops at such an input, and where
    a replaced node feeds another one.)
    """
    missing = {entry.old: entry for entry in REPLACEMENTS if entry.old not in known and entry.new in known}
    for value in prompt.values():
        node = cast("Json", value) if isinstance(value, dict) else {}
        entry = missing.get(node.get("class_type", ""))
        if entry is not None:
            given: Json = node.get("inputs") or {}
            inputs = {new: given[old] for new, old in entry.inputs.items() if old in given}
            node |= {"class_type": entry.new, "inputs": {**inputs, **entry.values}}


def _place(node: Json) -> tuple[float, float]:
    pos = node.get("pos") or [0, 0]
    return (float(pos["0"]), float(pos["1"])) if isinstance(pos, dict) else (float(pos[0]), float(pos[1]))
