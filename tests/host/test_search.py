"""Nodes are found by the words that people type, and show the inputs first that most need; on hosts that know how."""

from __future__ import annotations

from typing import Any

from host.comfy_server import ComfyServer

WORDS = {
    "unified loader": {"ImagePromptLoadModels"},
    "ipadapter": {
        "ImagePromptLoadModels",
        "ImagePromptLoadAdapter",
        "ImagePromptApply",
        "ImagePromptApplyImage",
        "ImagePromptEncode",
    },
    "ip adapter": {"ImagePromptLoadAdapter", "ImagePromptApply"},
    "style transfer": {"ImagePromptApply", "ImagePromptApplyImage"},
    "composition": {"ImagePromptApply", "ImagePromptSchedule"},
    "faceid": {"ImagePromptEncodeFace", "ImagePromptApplyFaceLoRA", "ImagePromptLoadFaceModel"},
    "face id": {"ImagePromptEncodeFace"},
    "instantid": {"ImagePromptEncodeFace"},
    "reference": {"ImagePromptEncode", "ImagePromptApplyImage"},
    "image reference": {"ImagePromptEncode", "ImagePromptApplyImage"},
    "regional": {"ImagePromptApply", "ImagePromptLoRAStrength"},
    "mask": {"ImagePromptApply", "ImagePromptLoRAStrength"},
    "block weight": {"ImagePromptLoRAStrength", "ImagePromptSchedule", "ImagePromptLoRAInspect"},
    "lbw": {"ImagePromptLoRAStrength"},
    "weights": {"ImagePromptSchedule", "ImagePromptLoRAStrength"},
    "power lora": {"ImagePromptLoRARows", "ImagePromptLoRAStack"},
    "lora stack": {"ImagePromptLoRARows", "ImagePromptLoRAStack"},
    "lora loader": {"ImagePromptLoRARows", "ImagePromptLoRAStrength", "ImagePromptLoRAStack"},
    "train": {"ImagePromptTrain", "ImagePromptTrainLoRA"},
    "kohya": {"ImagePromptTrainLoRA", "ImagePromptLoRASave"},
    "insightface": {"ImagePromptLoadFaceModel"},
    "siglip": {"ImagePromptLoadEncoder"},
    "ipadapter load embeds": {"ImagePromptLoad"},
    "ipadapter save embeds": {"ImagePromptSave"},
    "ipadapter noise": {"ImagePromptNoise"},
    "ipadapter tiled": {"ImagePromptApplyTiled"},
    "try": {"ImagePromptDemoWorld"},
    "example": {"ImagePromptDemoWorld"},
    "trigger words": {"ImagePromptLoRAInspect"},
    "style": {"ImagePromptApply", "ImagePromptApplyImage", "ImagePromptLoadModels"},
    "style only": {"ImagePromptApply", "ImagePromptApplyImage"},
    "two regions": {"ImagePromptApply", "ImagePromptApplyImage", "ImagePromptPreviewRegion"},
    "region": {"ImagePromptApply", "ImagePromptPreviewRegion"},
    "lora by block": {"ImagePromptLoRAStrength", "ImagePromptLoRARows"},
    "face": {"ImagePromptEncodeFace", "ImagePromptLoadFaceModel"},
    "training": {"ImagePromptTrain", "ImagePromptTrainLoRA"},
    "train lora": {"ImagePromptTrainLoRA"},
    "image prompt": {"ImagePromptEncode", "ImagePromptApplyImage"},
    "attention map": {"ImagePromptRecord", "ImagePromptAttentionMaps"},
    "heatmap": {"ImagePromptRecord", "ImagePromptAttentionMaps"},
    "demo": {"ImagePromptDemoWorld"},
    "no download": {"ImagePromptDemoWorld"},
    "likeness": {"ImagePromptEncodeFace"},
    "character": {"ImagePromptEncodeFace", "ImagePromptLoadModels"},
}
"""What somebody types, and the nodes that must then be offered, whatever else is."""

ADVANCED = {
    "ImagePromptApply": {"scaling", "compatibility"},
    "ImagePromptEncode": {"unconditional", "per_latent", "compatibility"},
    "ImagePromptLoRAStrength": {"negative_strength", "partial"},
    "ImagePromptTrainLoRA": {"precision", "seed", "settings", "alpha"},
}


def found(nodes: dict[str, Any], words: str) -> set[str]:
    """Nodes of which one name, title or alias holds all words; ComfyUI's own search forgives errors besides."""
    texts = {kind: [kind, info["display_name"], *info["search_aliases"]] for kind, info in nodes.items()}
    parts = words.split()
    return {kind for kind, names in texts.items() if any(all(p in n.lower() for p in parts) for n in names)}


def test_people_find_nodes_by_their_own_words(server: ComfyServer) -> None:
    nodes = server.pack_nodes()
    assert set().union(*WORDS.values()) <= set(nodes), "a field that the host does not know disables the pack"
    if not any("search_aliases" in info for info in nodes.values()):
        assert server.host.version == "0.3.64", "newer hosts know other words than titles"
        return
    for kind, info in nodes.items():
        aliases = info["search_aliases"]
        assert len(aliases) >= 3, kind
        assert aliases == list(dict.fromkeys(word.lower().strip() for word in aliases)), kind
        assert info["display_name"].lower() not in aliases, f"{kind}: its title is searched anyhow"
    for words, wanted in WORDS.items():
        assert wanted <= found(nodes, words), words


def test_rare_inputs_are_folded_away(server: ComfyServer) -> None:
    """``advanced`` is passed on by every host; those that do not know it show the input in its place."""
    nodes = server.pack_nodes()
    for kind, wanted in ADVANCED.items():
        inputs = {**nodes[kind]["input"]["required"], **nodes[kind]["input"].get("optional", {})}
        folded = {name for name, (_, *more) in inputs.items() if more and more[0].get("advanced")}
        assert wanted <= folded, kind
        assert "strength" not in folded, kind
