"""Nodes that hand encoded references to one another, rewritten: all that are connected, or none."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ...errors import quoted
from .apply import ENCODE_WIDGETS, Loaded, add_schedule, steering_widgets
from .graph import FAR, Edge, Migration, NodeId, fed_besides, label, settings_of
from .names import ADAPTER, EMBED_SOCKETS, EMBEDS, FACE_LOADER, LOADERS, UNIFIED


def embed_pairs(made: Migration) -> list[tuple[NodeId, NodeId]]:
    """Nodes of EMBEDS of which one hands embeds to the other; each with itself too."""
    pairs = [(n, n) for n, node in made.nodes.items() if node.type in EMBEDS]
    for number, _ in list(pairs):
        for name, edge in made.edges.into(number).items():
            if name in EMBED_SOCKETS and made.type_of(edge.source) in EMBEDS:
                pairs.append((number, edge.source))
    return pairs


def embeds_obstacle(made: Migration, group: Collection[NodeId]) -> str:
    """Why a group stays as it is; empty if it need not."""
    linked = {number: made.edges.into(number) for number in group}
    loaders = {made.origin(edges["ipadapter"]).source for edges in linked.values() if "ipadapter" in edges}
    for number in group:
        kind = made.nodes[number].type
        others = fed_besides(made, number, EMBEDS[kind])
        if others:
            return others
        if EMBEDS[kind] & {"model", "ipadapter", "image", "pos_embed", "embeds", "embed1"} - linked[number].keys():
            return "it is not connected"
        if any(
            t not in group for slot in (0, 1) for t, _ in made.edges.consumers(number, slot) if kind not in APPLY_EMBEDS
        ):
            return "its embeds go to another pack"
    if len(loaders) != 1:
        return "its embeds are for several adapters" if loaders else "it does not say for which adapter"
    loader = made.type_of(next(iter(loaders)))
    if loader not in LOADERS or loader == FACE_LOADER:
        return f"its adapter comes from {quoted(loader)}"
    for number in group:
        kind = made.nodes[number].type
        values, wrong = settings_of(made.nodes[number])
        if wrong:
            return wrong
        if kind == "IPAdapterEncoder" and loader not in UNIFIED and "clip_vision" not in linked[number]:
            return "no image encoder is connected"
        beside = made.edges.consumers(number, 1) if kind == "IPAdapterEncoder" else []
        if any(name != "neg_embed" for _, name in beside):
            return "what stands for no image is used as an image"
        if "neg_embed" in linked[number]:
            edge = linked[number]["neg_embed"]
            if made.type_of(edge.source) != "IPAdapterEncoder" or edge.output != 1:
                return "its negative embeds are not those of no image: give Encode Image Prompt a negative image"
        if kind == "IPAdapterCombineEmbeds" and values["method"] != "concat":
            if values["method"] == "norm average":
                return "its norm average is not ours"
            if not all(_is_single(made, edge) for edge in linked[number].values()):
                return f"it mixes the images inside its inputs too ({values['method']}), ours mixes input with input"
        if kind == "IPAdapterEmbedsBatch" and not _feeds_alone(made, linked[number]["pos_embed"]):
            return "its embeds are combined or used twice"
        if kind == "IPAdapterLoadEmbeds" and not str(values.get("embeds", "")).endswith(
            (".ipadpt", ".ipadpt.safetensors")
        ):
            return "its file has another name than such files have"
    return ""


APPLY_EMBEDS = ("IPAdapterEmbeds", "IPAdapterEmbedsBatch")


def _is_single(made: Migration, edge: Edge) -> bool:
    """Whether it is one picture for certain: of Load Image, or the mix of such."""
    source = made.nodes.get(edge.source)
    if source is not None and source.type == "IPAdapterCombineEmbeds":
        return settings_of(source)[0].get("method") != "concat"
    seen: set[NodeId] = set()
    while len(seen) < FAR and (
        source is not None and source.type in ("IPAdapterEncoder", "PrepImageForClipVision") and source.id not in seen
    ):
        seen.add(source.id)
        image = made.edges.get((source.id, "image"))
        source = None if image is None else made.nodes.get(image.source)
    return source is not None and source.type == "LoadImage"


def _feeds_alone(made: Migration, edge: Edge) -> bool:
    kind = made.type_of(edge.source)
    return (
        kind in ("IPAdapterEncoder", "IPAdapterLoadEmbeds") and len(made.edges.consumers(edge.source, edge.output)) == 1
    )


def change_embeds(made: Migration, group: Collection[NodeId], loaded: Mapping[NodeId, Loaded]) -> None:
    """Rewrite nodes of EMBEDS that are connected; each keeps its number."""
    numbers = sorted(group, key=str)
    adapter = next(edge for n in numbers if (edge := made.edges.get((n, "ipadapter"))))
    vision = loaded.get(made.origin(adapter).source, Loaded()).vision
    encoders = [edge for n in numbers if (edge := made.edges.get((n, "clip_vision")))]
    encoder = Edge(vision, 0, "CLIP_VISION") if vision is not None else next(iter(encoders), None)
    batches = {made.edges[n, "pos_embed"].source for n in numbers if made.nodes[n].type == "IPAdapterEmbedsBatch"}
    renamed = {"pos_embed": "image_prompt", "embeds": "image_prompt", "attn_mask": "mask"}
    renamed |= {f"embed{i}": f"prompt_{i}" for i in range(1, 6)}
    for number in numbers:
        node = made.nodes[number]
        kind, switch = node.type, node.switch
        values, _ = settings_of(node)
        made.edges.pop((number, "neg_embed"))
        made.move((number, "ipadapter"), (number, "adapter"), ADAPTER)
        for name in EMBEDS[kind] - {"clip_vision", "neg_embed", "ipadapter"}:
            made.move(
                (number, name), (number, renamed.get(name, name)), "IMAGE_PROMPT" if name in EMBED_SOCKETS else ""
            )
        match kind:
            case "IPAdapterEncoder":
                weight = values["weight"]
                settings = {**ENCODE_WIDGETS, "strengths": "" if weight == 1 else f"{weight:g}", "combine": "concat"}
                made.become(number, "ImagePromptEncode", **settings, per_latent=number in batches, compatibility=switch)
                title = "Encode Image Prompt"
            case "IPAdapterCombineEmbeds":
                strengths = {f"strength_{i}": 1.0 for i in range(1, 6)}
                made.become(number, "ImagePromptCombine", combine=values["method"], **strengths)
                title = "Combine Image Prompts"
            case "IPAdapterSaveEmbeds":
                made.become(number, "ImagePromptSave", filename_prefix=values["filename_prefix"])
                title = "Save Image Prompt"
            case "IPAdapterLoadEmbeds":
                file = f"{values['embeds']} [input]"
                made.become(number, "ImagePromptLoad", file=file, per_latent=number in batches, compatibility=switch)
                title = "Load Image Prompt"
            case _:
                steering = steering_widgets(values, values.get("weight_type", "linear"))
                made.become(number, "ImagePromptApply", **steering, compatibility=switch)
                add_schedule(made, number, steering)
                title = "Apply Adapter to Model"
        inputs = made.nodes[number].inputs
        if "adapter" not in inputs:
            made.edges.pop((number, "adapter"))
        elif made.edges.get((number, "adapter")) is None:
            made.feed((number, "adapter"), adapter.source, adapter.output, ADAPTER)
        if "clip_vision" not in inputs:
            made.edges.pop((number, "clip_vision"))
        elif made.edges.get((number, "clip_vision")) is None and encoder is not None:
            made.feed((number, "clip_vision"), encoder.source, encoder.output, "CLIP_VISION")
        made.report.append(f"{kind} (node {label(number)}) is {title}")
