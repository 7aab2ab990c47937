"""Loaders and the nodes that apply an image, rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import InvalidInputError
from ...features import ENCODERS
from ...known_files import known_file
from ..settings import SIMPLE_WEIGHT_TYPES
from .graph import Json, Migration, NodeId, Settings, Target, fed_besides, label, settings_of
from .names import (
    ADAPTER,
    FACE_LOADER,
    FACE_MODEL,
    FACE_WIDGETS,
    NEW_NAMES,
    PRECISE,
    TILED_WIDGETS,
    UNIFIED,
)

ENCODE_WIDGETS: Json = {"crop": "center", "strengths": "", "unconditional": "auto"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an old loader loaded besides the adapter, as nodes of its own."""

    vision: NodeId | None = None
    faces: NodeId | None = None


def load_face_model(made: Migration, number: NodeId) -> None:
    """A loader of face models becomes Load Face Model."""
    node = made.nodes[number]
    values, _ = settings_of(node)
    made.become(number, "ImagePromptLoadFaceModel", pack=values["model_name"], provider=values["provider"])
    made.report.append(f"{node.type} (node {label(number)}) is Load Face Model")


def is_chained(made: Migration, target: Target) -> bool:
    """Whether an input is that of a unified loader that may reuse what another one loaded; it can load by itself."""
    return target[1] == "ipadapter" and made.type_of(target[0]) in UNIFIED


def loader_obstacle(made: Migration, number: NodeId) -> str:
    """Why a loader of adapters stays as it is; empty if it need not."""
    node = made.nodes[number]
    values, wrong = settings_of(node)
    wrong = wrong or fed_besides(made, number, ("model", "ipadapter") if node.type in UNIFIED else ())
    if wrong:
        return wrong
    if node.type not in UNIFIED:
        return "" if "ipadapter_file" in values else "it names no file"
    if made.edges.get((number, "model")) is None or "preset" not in values:
        return "it is not connected" if "preset" in values else "it names no preset"
    base, unknown = made.base_for(number)
    try:
        if not unknown:
            known_file(values["preset"], base)
    except InvalidInputError as error:
        return str(error)
    return unknown


def load_adapter_nodes(made: Migration, number: NodeId) -> Loaded:
    """Rewrite a loader, with nodes for all else that the old one loaded."""
    node = made.nodes[number]
    values, _ = settings_of(node)
    if node.type not in UNIFIED:
        made.become(number, "ImagePromptLoadAdapter", file=values["ipadapter_file"])
        for target in made.edges.consumers(number, 0):
            made.feed(target, number, 0, ADAPTER)
        made.report.append(f"IPAdapterModelLoader (node {label(number)}) is Load IP-Adapter")
        return Loaded()
    base, _ = made.base_for(number)
    entry = known_file(values["preset"], base)
    file = entry.release.split(" from ")[0]
    x, y = node.place
    model = made.edges[number, "model"]
    lora = float(values["lora_strength"]) if node.type == FACE_LOADER else 0.0
    models, adapters = (made.edges.consumers(number, slot) for slot in (0, 1))
    applied = None
    if lora and entry.lora:
        applied = made.add("ImagePromptApplyFaceLoRA", (x, y - 140), strength=lora, layers="all")
        made.move((number, "model"), (applied, "model"))
        made.feed((applied, "adapter"), number, 0, ADAPTER)
    source, output = (model.source, model.output) if applied is None else (applied, 0)
    for target in models:
        made.feed(target, source, output, "MODEL")
    for target in [target for target in made.uses(number, 1) if is_chained(made, target)]:
        made.edges.pop(target)
    for target in adapters:
        if made.edges.get(target) is not None:
            made.feed(target, number, 0, ADAPTER)
    for name in ("model", "ipadapter"):
        made.edges.pop((number, name))
    vision = faces = None
    parts = [f"Load IP-Adapter ({file})"]
    if entry.encoder in ENCODERS:
        encoder = ENCODERS[entry.encoder].files[0]
        vision = made.add("CLIPVisionLoader", (x, y + 130), clip_name=encoder)
        parts.append(f"Load CLIP Vision ({encoder})")
    if node.type == FACE_LOADER:
        faces = made.add("ImagePromptLoadFaceModel", (x, y + 260), pack="buffalo_l", provider=values["provider"])
        parts += ["Load Face Model", *([] if applied is None else ["Apply Face LoRA"])]
    made.become(number, "ImagePromptLoadAdapter", file=file)
    made.report.append(
        f"{node.type} (node {label(number)}, {values['preset']}) is {' and '.join(parts)}, taken for an "
        f"{'SDXL' if base == 'sdxl' else 'SD1.5'} model: choose your own files where they are called otherwise"
    )
    return Loaded(vision, faces)


def apply_nodes(made: Migration, number: NodeId, loaded: Mapping[NodeId, Loaded]) -> None:
    """Rewrite a node of WIDGETS: it becomes the one that applies, and one that encodes is added unless one does both."""
    node = made.nodes[number]
    old, switch = node.type, node.switch
    values, _ = settings_of(node)
    adapter = made.edges[number, "ipadapter"]
    beside = loaded.get(made.origin(adapter).source, Loaded())
    vision = beside.vision
    x, y = node.place
    references = {
        "combine": values.get("combine_embeds", "concat"), "per_latent": old.endswith("Batch"), "compatibility": switch,
    }  # fmt: skip
    made.move((number, "ipadapter"), (number, "adapter"), ADAPTER)
    if old in TILED_WIDGETS:
        steering = steering_widgets(values, values.get("weight_type", "linear"))
        for name in ("image_negative", "attn_mask"):
            made.move((number, name), (number, NEW_NAMES[name]))
        if made.edges.get((number, "clip_vision")) is None and vision is not None:
            made.feed((number, "clip_vision"), vision, 0, "CLIP_VISION")
        sharpening = values.get("sharpening", 0.0)
        made.become(number, "ImagePromptApplyTiled", **steering, **references, sharpening=sharpening)
        add_schedule(made, number, steering)
        made.report.append(f"{old} (node {label(number)}) is Apply Tiled Image to Model")
        return
    if old in FACE_WIDGETS:
        strength = values.get("weight_faceidv2", 1.0)
        # the old pack takes the best detection
        chosen = {"face": "best", "number": 1, "picture_strength": strength}
        encode = made.add("ImagePromptEncodeFace", (x, y - 340), **chosen, **references)
        for target in made.edges.consumers(number, 1):
            made.feed(target, encode, 1, "IMAGE")
        made.move((number, "insightface"), (encode, "face_model"), FACE_MODEL)
        if made.edges.get((encode, "face_model")) is None and beside.faces is not None:
            made.feed((encode, "face_model"), beside.faces, 0, FACE_MODEL)
    else:
        encode = made.add("ImagePromptEncode", (x, y - 320), **ENCODE_WIDGETS, **references)
    for name in ("clip_vision", "image", "image_negative"):
        made.move((number, name), (encode, NEW_NAMES.get(name, name)))
    if made.edges.get((encode, "clip_vision")) is None and vision is not None:
        made.feed((encode, "clip_vision"), vision, 0, "CLIP_VISION")
    made.move((number, "attn_mask"), (number, NEW_NAMES["attn_mask"]))
    made.feed((encode, "adapter"), adapter.source, adapter.output, ADAPTER)
    made.feed((number, "image_prompt"), encode, 0, "IMAGE_PROMPT")
    kind = str(values.get("weight_type", "linear"))
    preset = SIMPLE_WEIGHT_TYPES.get(kind, "linear") if old == "IPAdapter" else PRECISE.get(old, kind)
    steering = steering_widgets(values, preset)
    made.become(number, "ImagePromptApply", **steering, compatibility=switch)
    add_schedule(made, number, steering, values.get("style_boost", values.get("composition_boost")))
    encoder = "Encode Face Prompt" if old in FACE_WIDGETS else "Encode Image Prompt"
    made.report.append(f"{old} (node {label(number)}) is {encoder} (node {label(encode)}) and Apply Adapter to Model")


def steering_widgets(values: Settings, preset: str) -> Json:
    """Widgets of the nodes that apply, all but the last."""
    return {
        "strength": values.get("weight", 1.0), "preset": preset, "scaling": values.get("embeds_scaling", "V only"),
        "start": values.get("start_at", 0.0), "end": values.get("end_at", 1.0),
    }  # fmt: skip


def add_schedule(made: Migration, number: NodeId, steering: Json, boost: float | None = None) -> None:
    """An Adapter Schedule where the old node's strength is not that of all its preset does: composition has 1 there."""
    if boost is None and not (steering["preset"] == "style and composition" and steering["strength"] != 1):
        return
    x, y = made.nodes[number].place
    schedule = made.add(
        "ImagePromptSchedule", (x, y - 580), curve="0: 1, 1: 1", sites="", top=1.0, separate_composition=True,
        composition_strength=1.0, boost=1.0 if boost is None else boost,
    )  # fmt: skip
    made.feed((number, "schedule"), schedule, 0, "IMAGE_PROMPT_SCHEDULE")
    made.report.append(f"Adapter Schedule (node {label(schedule)}) holds what node {label(number)} had of its own")
