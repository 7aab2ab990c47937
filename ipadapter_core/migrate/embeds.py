"""Nodes that hand encoded references to one another, rewritten: all that are connected, or none."""

from __future__ import annotations

from collections.abc import Mapping

from .apply import Loaded, add_schedule, steering_widgets
from .graph import Edge, Json, Migration, switch_of
from .names import ADAPTER, APPLY_INPUTS, EMBEDS, ENCODE_INPUTS, FACE_LOADER, LOADERS, UNIFIED


def embed_groups(made: Migration) -> list[set[int]]:
    """Numbers of the nodes of EMBEDS, those that are connected by embeds together."""
    groups = [{n} for n, node in made.nodes.items() if node["type"] in EMBEDS]
    for (target, _), (source, _, kind) in made.edges.items():
        if kind == "EMBEDS":
            joined = [group for group in groups if group & {source, target}]
            groups = [group for group in groups if group not in joined] + (
                [set[int]().union(*joined)] if joined else []
            )
    return groups


def embeds_obstacle(made: Migration, group: set[int]) -> str:
    """Why a group stays as it is; empty if it need not."""
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


def change_embeds(made: Migration, group: set[int], loaded: Mapping[int, Loaded]) -> None:
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
        kind, widgets, switch = node["type"], list(node.get("widgets_values") or []), switch_of(node)
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
                settings = steering_widgets(values, values.get("weight_type", "linear"), switch)
                made.become(number, "ImagePromptApply", APPLY_INPUTS, {"model": "MODEL"}, settings)
                add_schedule(made, number, settings)
                title = "Apply Adapter to Model"
        names = {entry["name"] for entry in node["inputs"]}
        if "adapter" in names:
            made.edges[number, "adapter"] = adapter
        if "clip_vision" in names and own_encoder is not None:
            made.edges[number, "clip_vision"] = own_encoder
        made.report.append(f"{kind} (node {number}) is {title}")
