"""The old pack's class types with their widgets and sockets, and what they are called here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import get_args

from ...attention.schedule import SCALINGS
from ...images.noise import Noise
from ..block_strengths import SMOOTHINGS
from ..settings import COMBINE_METHODS, SIMPLE_WEIGHT_TYPES, WEIGHT_TYPES

ADAPTER = "IMAGE_PROMPT_ADAPTER"
FACE_MODEL = "IMAGE_PROMPT_FACE_MODEL"
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
TILED = ("weight", "weight_type", "combine_embeds", "start_at", "end_at", "sharpening", "embeds_scaling")
TILED_WIDGETS: dict[str, tuple[str, ...]] = {
    "IPAdapterTiled": TILED,
    "IPAdapterTiledBatch": (*TILED[:2], *TILED[3:], "encode_batch_size"),
}
"""Every one of these becomes one node."""
PRECISE: dict[str, str] = {
    "IPAdapterPreciseStyleTransfer": "style transfer precise", "IPAdapterPreciseStyleTransferBatch": "style transfer precise",
    "IPAdapterPreciseComposition": "composition precise", "IPAdapterPreciseCompositionBatch": "composition precise",
}  # fmt: skip
"""Every one of these has a preset and becomes a schedule, an encode and an apply node."""
PRECISE_WIDGETS: dict[str, tuple[str, ...]] = {
    name: (
        "weight", "style_boost" if "Style" in name else "composition_boost", "combine_embeds", "start_at", "end_at",
        "embeds_scaling",
    )
    for name in PRECISE
}  # fmt: skip
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

EMBED_SOCKETS = {"pos_embed", "neg_embed", "embeds", *EMBEDS["IPAdapterCombineEmbeds"]}

# packs for transformers
PICTURE_LOADERS: dict[str, tuple[str, ...]] = {
    "LoadFluxIPAdapter": ("ipadatper", "clip_vision", "provider"),
    "IPAdapterFluxLoader": ("ipadapter", "clip_vision", "provider"),
    "IPAdapterFluxLoaderAdvanced": ("ipadapter", "clip_vision", "provider"),
    "IPAdapterSD3Loader": ("ipadapter", "provider"),
}
"""Loaders, with their widgets in order; the first names the adapter's file."""
PICTURE_APPLIES: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "ApplyFluxIPAdapter": (("ip_adapter_flux", "image"), ("ip_scale",)),
    "ApplyAdvancedFluxIPAdapter": (("ip_adapter_flux", "image"), ("begin_strength", "end_strength", "smothing_type")),
    "ApplyIPAdapterFlux": (("ipadapter_flux", "image"), ("weight", "start_percent", "end_percent")),
    "ApplyIPAdapterFluxAdvanced": (
        ("ipadapter_flux", "image"), ("weight_start", "weight_end", "steps", "start_percent", "end_percent"),
    ),
    "ApplyIPAdapterSD3": (("ipadapter", "image_embed"), ("weight", "start_percent", "end_percent")),
}  # fmt: skip
"""What applies a picture: the sockets of adapter and picture, and the widgets in order."""

SETTINGS: dict[str, tuple[str, ...]] = {
    **WIDGETS,
    **PICTURE_LOADERS,
    **{kind: widgets for kind, (_, widgets) in PICTURE_APPLIES.items()},
    "IPAdapterModelLoader": ("ipadapter_file",),
    "IPAdapterUnifiedLoader": ("preset",),
    "IPAdapterUnifiedLoaderCommunity": ("preset",),
    FACE_LOADER: ("preset", "lora_strength", "provider"),
    "IPAdapterInsightFaceLoader": ("provider", "model_name"),
    "InsightFaceLoader": ("provider",),
    NOISE: ("type", "strength", "blur"),
    "IPAdapterEncoder": ("weight",),
    "IPAdapterCombineEmbeds": ("method",),
    "IPAdapterSaveEmbeds": ("filename_prefix",),
    "IPAdapterLoadEmbeds": ("embeds",),
    "IPAdapterEmbeds": ("weight", "weight_type", "start_at", "end_at", "embeds_scaling"),
    "IPAdapterEmbedsBatch": ("weight", "weight_type", "start_at", "end_at", "embeds_scaling"),
}
"""Old nodes that are rewritten, with their widgets in order."""

STAYING = (
    "IPAdapterFaceIDKolors", "IPAdapterStyleComposition", "IPAdapterStyleCompositionBatch", "IPAdapterMS",
    "IPAdapterClipVisionEnhancer", "IPAdapterClipVisionEnhancerBatch", "IPAdapterFromParams", "PrepImageForClipVision",
    "IPAdapterWeights", "IPAdapterCombineWeights", "IPAdapterWeightsFromStrategy",
    "IPAdapterPromptScheduleFromWeightsStrategy", "IPAdapterRegionalConditioning", "IPAdapterCombineParams",
    "IPAdapterApply", "IPAdapterApplyFaceID", "IPAdapterApplyEncoded", "IPAdapterTilesMasked", "IPAdapterBatchEmbeds",
    "PrepImageForInsightFace", "IPAdapterCLIPVisionEncode", "FluxLoraLoader", "XlabsSampler",
)  # fmt: skip
"""Old nodes for which there is none of ours; they run under their old names."""
POWER_LORAS = "Power Lora Loader (rgthree)"
"""LoRAs in rows; its rows are no widgets of a fixed number, so it has no entry in ``SETTINGS``."""
OLD_TYPES = frozenset((*SETTINGS, *STAYING, POWER_LORAS))


def _weight_types(kind: str) -> Collection[str]:
    return SIMPLE_WEIGHT_TYPES if kind == "IPAdapter" else WEIGHT_TYPES


def _any_of(*options: str) -> Callable[[str], Collection[str]]:
    return lambda _: options


OPTIONS: dict[str, Callable[[str], Collection[str]]] = {
    "weight_type": _weight_types,
    "combine_embeds": _any_of(*COMBINE_METHODS),
    "embeds_scaling": _any_of(*SCALINGS),
    "provider": _any_of("CPU", "CUDA", "ROCM", "DirectML", "OpenVINO", "CoreML", "GPU", "cuda", "cpu", "mps"),
    "smothing_type": _any_of(*SMOOTHINGS),
    "model_name": _any_of("buffalo_l", "antelopev2"),
    "type": _any_of(*get_args(Noise)),
    "method": _any_of(*COMBINE_METHODS, "max", "min"),
}
"""Options of an old widget, by its name and the class type."""
TEXTS = ("preset", "ipadapter_file", "embeds", "filename_prefix", "ipadatper", "ipadapter", "clip_vision")

DEFAULTS: dict[str, dict[str, object]] = {
    **{name: {"style_boost": 1.0} if "Style" in name else {"composition_boost": 0.0} for name in PRECISE},
    FACE_LOADER: {"lora_strength": 0.6, "provider": "CPU"},
    "IPAdapterInsightFaceLoader": {"provider": "CPU", "model_name": "buffalo_l"},
    "InsightFaceLoader": {"provider": "CPU", "model_name": "buffalo_l"},
    NOISE: {"type": "fade", "strength": 1.0, "blur": 0},
    "IPAdapterEncoder": {"weight": 1.0},
    "IPAdapterCombineEmbeds": {"method": "concat"},
    "IPAdapterSaveEmbeds": {"filename_prefix": "IP_embeds"},
    "ApplyFluxIPAdapter": {"ip_scale": 0.93},
    "ApplyAdvancedFluxIPAdapter": {"begin_strength": 0.0, "end_strength": 1.0, "smothing_type": "Linear"},
    "ApplyIPAdapterFluxAdvanced": {"weight_start": 0.0, "weight_end": 1.0},
}
"""What widgets that a file does not have stand at."""


@dataclass(frozen=True, slots=True)
class OurNode:
    """A node that is put into a graph: sockets with their types, and widgets, both in order; outputs with their types."""

    inputs: Mapping[str, str]
    widgets: tuple[str, ...]
    outputs: Mapping[str, str]


_VISION, _SECOND = {"clip_vision": "CLIP_VISION"}, {"clip_vision_2": "CLIP_VISION"}
_REFERENCE = {"image": "IMAGE", "mask": "MASK", "negative": "IMAGE"}
_SCHEDULE = {"schedule": "IMAGE_PROMPT_SCHEDULE"}
_PROMPT = {"image_prompt": "IMAGE_PROMPT"}
_ADAPTER, _MODEL = {"adapter": ADAPTER}, {"model": "MODEL"}
_STEERING = ("strength", "preset", "scaling", "start", "end")

OUR_NODES: dict[str, OurNode] = {
    "ImagePromptLoadAdapter": OurNode({}, ("file",), _ADAPTER),
    "CLIPVisionLoader": OurNode({}, ("clip_name",), {"CLIP_VISION": "CLIP_VISION"}),
    "ImagePromptLoadEncoder": OurNode({}, ("file",), {"clip_vision": "CLIP_VISION"}),
    "ImagePromptLoadFaceModel": OurNode({}, ("pack", "provider"), {"face_model": FACE_MODEL}),
    "ImagePromptApplyFaceLoRA": OurNode(_MODEL | _ADAPTER, ("strength", "layers"), _MODEL),
    "ImagePromptNoise": OurNode({"image": "IMAGE"}, ("kind", "strength", "blur"), {"image": "IMAGE"}),
    "ImagePromptEncode": OurNode(
        _ADAPTER | _VISION | _REFERENCE | _SECOND,
        ("crop", "combine", "strengths", "unconditional", "per_latent", "compatibility"),
        _PROMPT,
    ),
    "ImagePromptEncodeFace": OurNode(
        _ADAPTER | {"face_model": FACE_MODEL, "image": "IMAGE"} | _VISION | _REFERENCE,
        ("face", "number", "combine", "picture_strength", "per_latent", "compatibility"),
        {**_PROMPT, "faces": "IMAGE"},
    ),
    "ImagePromptApply": OurNode(
        _MODEL | _ADAPTER | _PROMPT | {"mask": "MASK"} | _SCHEDULE, (*_STEERING, "compatibility"), _MODEL
    ),
    "ImagePromptApplyTiled": OurNode(
        _MODEL | _ADAPTER | _VISION | _REFERENCE | _SCHEDULE | _SECOND,
        (*_STEERING, "combine", "per_latent", "sharpening", "compatibility"),
        _MODEL | {"tiles": "IMAGE", "masks": "MASK"},
    ),
    "ImagePromptSchedule": OurNode(
        {"drawn": "FLOAT,CURVE"},
        ("curve", "sites", "separate_composition", "composition_strength", "boost", "top"),
        _SCHEDULE,
    ),
    "ImagePromptCombine": OurNode(
        _ADAPTER | {f"prompt_{i}": "IMAGE_PROMPT" for i in range(1, 6)},
        ("combine", *(f"strength_{i}" for i in range(1, 6))),
        _PROMPT,
    ),
    "ImagePromptLoRARows": OurNode(
        {**_MODEL, "clip": "CLIP", "lora_stack": "LORA_STACK"},
        ("rows", "mode", "partial"),
        {**_MODEL, "clip": "CLIP", "lora_stack": "LORA_STACK", "trigger_words": "STRING", "report": "STRING"},
    ),
    "ImagePromptSave": OurNode(_PROMPT, ("filename_prefix",), {"path": "STRING"}),
    "ImagePromptLoad": OurNode(_ADAPTER | _VISION, ("file", "per_latent", "compatibility"), _PROMPT),
}
"""Nodes that take an old one's place. tests/core compares them with what ComfyUI says of these nodes."""
