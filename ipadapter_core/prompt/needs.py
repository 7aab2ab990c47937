"""Which image encoder an adapter needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import (
    IncompatibleEncoderError,
)

if TYPE_CHECKING:
    from ..checkpoints.format import AdapterSpec
from ..features import ENCODERS, ImageEncoder


def check_encoder(spec: AdapterSpec, encoder: ImageEncoder) -> None:
    """Raise IncompatibleEncoderError unless ``encoder`` gives the feature that an adapter's projector reads."""
    if spec.feature == "face":
        return
    got = {
        "image_embeds": encoder.projection_dim,
        "penultimate": encoder.hidden_size,
        "face_tokens": encoder.hidden_size,
    }
    if got[spec.feature] == spec.feature_dim:
        return
    needed = ENCODERS.get(spec.encoder)
    if needed is None:
        wanted = "it was trained with an encoder of its own, use that one"
    else:
        wanted = f"it needs {needed.name}, which people have as {', or '.join(needed.files)}"
    known = [
        other.name
        for other in ENCODERS.values()
        if (other.hidden_size, other.projection_dim) == (encoder.hidden_size, encoder.projection_dim)
    ]
    identity = f", the widths of {' or '.join(known)}" if known and encoder.name not in known else ""
    kind = "image_embeds" if spec.feature == "image_embeds" else "penultimate hidden states"
    raise IncompatibleEncoderError(
        f"this {spec.base_model} {spec.family} adapter reads {kind} of width {spec.feature_dim}: {wanted}; "
        f"got {encoder.name} with image_embeds of width {got['image_embeds']} and hidden states of width "
        f"{got['penultimate']}{identity}"
    )
