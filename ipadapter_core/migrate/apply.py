"""Loaders and the nodes that apply an image, rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..image_encoder import ENCODERS
from ..known_files import known_file
from ..legacy import SIMPLE_WEIGHT_TYPES
from .graph import Json, Migration, place_of, switch_of, values_of
from .names import (
    ADAPTER,
    APPLY_INPUTS,
    ENCODE_INPUTS,
    FACE_INPUTS,
    FACE_LOADER,
    FACE_MODEL,
    FACE_WIDGETS,
    NEW_NAMES,
    PRECISE,
    TILED_INPUTS,
    TILED_WIDGETS,
    UNIFIED,
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an old loader loaded besides the adapter, as nodes of its own."""

    vision: int | None = None
    faces: int | None = None


def load_face_model(made: Migration, number: int) -> None:
    """A loader of face models becomes Load Face Model."""
    node = made.nodes[number]
    provider, *pack = node.get("widgets_values") or ["CPU"]
    old = node["type"]
    made.become(
        number, "ImagePromptLoadFaceModel", {}, {"face_model": FACE_MODEL}, [*(pack or ["buffalo_l"]), provider]
    )
    made.report.append(f"{old} (node {number}) is Load Face Model")


def is_chained(made: Migration, target: tuple[int, str]) -> bool:
    """Whether an input is that of a unified loader that may reuse what another one loaded; it can load by itself."""
    return target[1] == "ipadapter" and made.nodes[target[0]]["type"] in UNIFIED


def load_adapter_nodes(made: Migration, number: int) -> Loaded:
    """Rewrite a loader, with nodes for all else that the old one loaded."""
    node = made.nodes[number]
    values = node.get("widgets_values") or [""]
    if node["type"] not in UNIFIED:
        made.become(number, "ImagePromptLoadAdapter", {}, {"adapter": ADAPTER}, [values[0]])
        made.report.append(f"IPAdapterModelLoader (node {number}) is Load IP-Adapter")
        return Loaded()
    entry = known_file(str(values[0]), made.base)
    file = entry.release.split(" from ")[0]
    x, y = place_of(node)
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
        if is_chained(made, target):
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


def apply_nodes(made: Migration, number: int, loaded: Mapping[int, Loaded]) -> None:
    """Rewrite a node of WIDGETS: it becomes the one that applies, and one that encodes is added unless one does both."""
    node = made.nodes[number]
    old, values, switch = node["type"], values_of(node), switch_of(node)
    source, _, _ = made.edges.pop((number, "ipadapter"))
    beside = loaded.get(source, Loaded())
    vision = beside.vision
    x, y = place_of(node)
    combine, batch = values.get("combine_embeds", "concat"), old.endswith("Batch")
    if old in TILED_WIDGETS:
        steering = steering_widgets(values, values.get("weight_type", "linear"), switch)
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
        add_schedule(made, number, settings)
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
    steering = steering_widgets(values, preset, switch)
    made.become(number, "ImagePromptApply", APPLY_INPUTS, {"model": "MODEL"}, steering)
    add_schedule(made, number, steering, values.get("boost"))
    encoder = "Encode Face Prompt" if old in FACE_WIDGETS else "Encode Image Prompt"
    made.report.append(f"{old} (node {number}) is {encoder} (node {encode}) and Apply Adapter to Model")


def steering_widgets(values: Json, preset: str, switch: str) -> list[Any]:
    """Widgets of Apply Adapter to Model."""
    steering = [values.get("weight", 1.0), preset, values.get("embeds_scaling", "V only")]
    return [*steering, values.get("start_at", 0.0), values.get("end_at", 1.0), switch]


def add_schedule(made: Migration, number: int, steering: list[Any], boost: float | None = None) -> None:
    """An Adapter Schedule where the old node's strength is not that of all its preset does: composition has 1 there."""
    if boost is None and not (steering[1] == "style and composition" and steering[0] != 1):
        return
    x, y = place_of(made.nodes[number])
    settings = ["0: 1, 1: 1", "", True, 1.0, 1.0 if boost is None else boost]
    outputs = {"schedule": "IMAGE_PROMPT_SCHEDULE"}
    schedule = made.add("ImagePromptSchedule", [x, y - 580], {}, outputs, settings)
    made.edges[number, "schedule"] = (schedule, 0, "IMAGE_PROMPT_SCHEDULE")
    made.report.append(f"Adapter Schedule (node {schedule}) holds what node {number} had of its own")
