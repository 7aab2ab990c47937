"""FaceID portrait unnorm and InstantID's adapter, the same shapes: a resampler reads one raw face embedding.

They differ in the face model (buffalo_l, antelopev2) and in that InstantID wants its ControlNet beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..files.state_dict import StateDict
from . import plus
from .format import AdapterSpec, Format


def parse(state: StateDict) -> AdapterSpec:
    spec = plus.parse(state)
    return replace(spec, family=FORMAT.name, feature="face", unconditional="zero_embeds", encoder="InsightFace")


def released_as(name: str, metadata: Mapping[str, str]) -> str:
    """Which of the two a file is, which no shape tells: by metadata, else by name."""
    told = metadata.get("family", "")
    if told in ("faceid-unnorm", "instantid"):
        return told
    return "faceid-unnorm" if "unnorm" in name.lower() else "instantid"


FORMAT = Format(
    name="face-resampler",
    anchor="latents",
    allowed=plus.FORMAT.allowed,
    parse=parse,
    build=plus.build,
    unless=lambda state: not plus.is_face_embedding(state),
)
