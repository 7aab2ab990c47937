"""The old pack's class types with their widgets and sockets, and what they are called here."""

from __future__ import annotations

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
