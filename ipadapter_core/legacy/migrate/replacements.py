"""Nodes of ours that do alone what an old one did, for hosts that replace nodes one for one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from .graph import Json, table
from .names import APPLY_WIDGETS, NEW_NAMES, NOISE, SWITCH, TILED


@dataclass(frozen=True, slots=True)
class Replacement:
    """A node of ours that does alone what an old one did, for hosts that replace nodes one for one.

    ``widgets`` are the old node's in order, ``inputs`` its inputs by our names, ``values`` what ours is set to besides.
    """

    old: str
    new: str
    widgets: tuple[str, ...]
    inputs: Mapping[str, str]
    values: Mapping[str, object] = field(default_factory=dict[str, object])
    outputs: int = 1


def _replacement(
    old: str, new: str, widgets: tuple[str, ...], sockets: tuple[str, ...] = (), **values: object
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
            "IPAdapterTiled", "ImagePromptApplyTiled", TILED, _APPLY_SOCKETS, per_latent=False, compatibility=SWITCH
        ),
        outputs=3,
    ),
)  # fmt: skip
"""Nodes that one node of ours replaces; all others take two of ours (migrate() makes those) or stay as they are."""


def replace_in_prompt(prompt: Mapping[str, object], known: Collection[str]) -> None:
    """Put our nodes in the place of old ones that ``known`` does not list, in a prompt (API format).

    What is not connected in the old node stays unconnected. (ComfyUI's own replacement stops at such an input, and where
    a replaced node feeds another one.)
    """
    missing = {entry.old: entry for entry in REPLACEMENTS if entry.old not in known and entry.new in known}
    for value in table(prompt).values():
        node = table(value)
        kind = node.get("class_type")
        entry = missing.get(kind) if isinstance(kind, str) else None
        if entry is not None:
            given: Json = table(node.get("inputs"))
            inputs = {new: given[old] for new, old in entry.inputs.items() if old in given}
            node |= {"class_type": entry.new, "inputs": {**inputs, **entry.values}}
