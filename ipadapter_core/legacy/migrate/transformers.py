"""Nodes of packs for FLUX.1 and SD3.5, rewritten: a loader, and what applies a picture."""

from __future__ import annotations

from ..block_strengths import Smoothing, strengths_of_blocks
from .graph import Edge, Json, Migration, NodeId, fed_besides, label, settings_of
from .names import ADAPTER, PICTURE_APPLIES, PICTURE_LOADERS

SIGLIP = "siglip-so400m-patch14-384.safetensors"
CROPS = {"center": "center", "none": "stretch"}
"""Of CLIP Vision Encode, by Encode Image Prompt's."""


def picture_obstacle(made: Migration, number: NodeId) -> str:
    """Why a node of these packs stays as it is; empty if it need not."""
    node = made.nodes[number]
    values, wrong = settings_of(node)
    if node.type in PICTURE_LOADERS:
        file = values.get(PICTURE_LOADERS[node.type][0])
        return wrong or fed_besides(made, number, ()) or ("" if file else "it names no file")
    adapter, picture = PICTURE_APPLIES[node.type][0]
    wrong = wrong or fed_besides(made, number, ("model", adapter, picture))
    linked = made.edges.into(number)
    if wrong or not {"model", adapter, picture} <= linked.keys():
        return wrong or "it is not connected"
    loader = made.type_of(made.origin(linked[adapter]).source)
    if loader not in PICTURE_LOADERS:
        return f"its adapter comes from {loader or 'nowhere'}"
    if picture == "image_embed" and _seen(made, linked[picture]) is None:
        return "its image_embed comes from no CLIP Vision Encode with a picture and an encoder"
    return ""


def load_picture_adapter(made: Migration, number: NodeId) -> NodeId | None:
    """A loader becomes Load IP-Adapter; the node that loads the image encoder beside it, where it loaded one."""
    node = made.nodes[number]
    values, _ = settings_of(node)
    x, y = node.place
    parts, vision = ["Load IP-Adapter"], None
    if node.type == "LoadFluxIPAdapter":
        vision = made.add("CLIPVisionLoader", (x, y + 130), clip_name=values.get("clip_vision", ""))
        parts.append("Load CLIP Vision")
    elif "clip_vision" in PICTURE_LOADERS[node.type]:
        vision = made.add("ImagePromptLoadEncoder", (x, y + 130), file=SIGLIP)
        parts.append(f"Load Image Encoder ({SIGLIP}: choose yours)")
    made.become(number, "ImagePromptLoadAdapter", file=values[PICTURE_LOADERS[node.type][0]])
    for target in made.edges.consumers(number, 0):
        made.feed(target, number, 0, ADAPTER)
    made.report.append(f"{node.type} (node {label(number)}) is {' and '.join(parts)}")
    return vision


def apply_picture_node(made: Migration, number: NodeId, vision: NodeId | None) -> None:
    """A node that applies a picture becomes Apply Adapter to Model, with Encode Image Prompt above it."""
    node = made.nodes[number]
    values, _ = settings_of(node)
    (socket, picture), _ = PICTURE_APPLIES[node.type]
    adapter = made.edges[number, socket]
    x, y = node.place
    widgets: Json = {
        "crop": "auto", "combine": "concat", "strengths": "", "unconditional": "auto", "per_latent": False,
        "compatibility": "correct",
    }  # fmt: skip
    steering: Json = {
        "strength": values.get("ip_scale", values.get("weight", 1.0)), "preset": "linear", "scaling": "V only",
        "start": values.get("start_percent", 0.0), "end": values.get("end_percent", 1.0), "compatibility": "correct",
    }  # fmt: skip
    schedule: Json = {}
    if node.type == "ApplyAdvancedFluxIPAdapter":
        widgets["combine"] = "average"
        kind: Smoothing = values["smothing_type"]
        strengths = strengths_of_blocks(kind, values["begin_strength"], values["end_strength"])
        schedule = {
            "curve": "0: 1, 1: 1",
            "sites": ", ".join(f"double {i}: {round(s, 6):g}" for i, s in enumerate(strengths)),
        }
    elif "Flux" in node.type and node.type.startswith("ApplyIPAdapter"):
        steering["compatibility"] = "IPAdapter-Flux"
        if "weight_start" in values:
            start, end = sorted((float(values.get("start_percent", 0.0)), float(values.get("end_percent", 1.0))))
            schedule = {
                "curve": f"{start:g}: {values['weight_start']:g}, {end:g}: {values['weight_end']:g}",
                "sites": "",
            }
    seen = _seen(made, made.edges[number, picture]) if picture == "image_embed" else None
    if seen is not None:
        widgets["crop"] = seen[2]
    encode = made.add("ImagePromptEncode", (x, y - 320), **widgets)
    if seen is None:
        made.move((number, picture), (encode, "image"))
        if vision is not None:
            made.feed((encode, "clip_vision"), vision, 0, "CLIP_VISION")
    else:
        made.edges.pop((number, picture))
        for name, edge in (("image", seen[0]), ("clip_vision", seen[1])):
            made.feed((encode, name), edge.source, edge.output, edge.type)
    made.move((number, socket), (number, "adapter"), ADAPTER)
    made.feed((encode, "adapter"), adapter.source, adapter.output, ADAPTER)
    made.feed((number, "image_prompt"), encode, 0, "IMAGE_PROMPT")
    made.become(number, "ImagePromptApply", **steering)
    if schedule:
        plain: Json = {"top": 1.0, "separate_composition": False, "composition_strength": 1.0, "boost": 1.0}
        above = made.add("ImagePromptSchedule", (x, y - 580), **schedule, **plain)
        made.feed((number, "schedule"), above, 0, "IMAGE_PROMPT_SCHEDULE")
    made.report.append(
        f"{node.type} (node {label(number)}) is Encode Image Prompt (node {label(encode)}) and Apply Adapter to Model"
        + (" with Adapter Schedule" if schedule else "")
    )


def samplers_told(made: Migration) -> list[str]:
    """A line for each sampler of x-flux-comfyui: it is no node of ours, and that pack runs on no current ComfyUI."""
    return [
        f"XlabsSampler (node {label(number)}) runs here under its old name; in a new graph put KSampler in its place, euler "
        "and simple, with cfg 1 (or its true_gs, where that begins at step 1)"
        for number, node in made.nodes.items()
        if node.type == "XlabsSampler"
    ]


def _seen(made: Migration, edge: Edge) -> tuple[Edge, Edge, str] | None:
    """The picture, the encoder and the crop of the CLIP Vision Encode that an edge comes from; None if it is none."""
    source = made.nodes.get(made.origin(edge).source)
    if source is None or source.type != "CLIPVisionEncode":
        return None
    linked = made.edges.into(source.id)
    crop = source.named(("crop",)).get("crop", "center")
    if not {"image", "clip_vision"} <= linked.keys() or crop not in CROPS:
        return None
    return linked["image"], linked["clip_vision"], CROPS[str(crop)]
