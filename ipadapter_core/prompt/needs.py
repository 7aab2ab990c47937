"""Which image encoder an adapter needs."""

from __future__ import annotations

from ..checkpoints import AdapterSpec
from ..errors import IncompatibleEncoderError
from ..features import ENCODERS, ImageEncoder, width_of


def check_encoder(spec: AdapterSpec, encoder: ImageEncoder) -> None:
    """Raise IncompatibleEncoderError unless ``encoder`` gives the feature that an adapter's projector reads."""
    encoded = spec.format.feature.encoded
    if encoded is None or width_of(encoder, encoded) == spec.feature_dim:
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
    kind = "image_embeds" if encoded == "image_embeds" else "penultimate hidden states"
    raise IncompatibleEncoderError(
        f"this {spec.base_model} {spec.family} adapter reads {kind} of width {spec.feature_dim}: {wanted}; "
        f"got {encoder.name} with image_embeds of width {encoder.projection_dim} and hidden states of width "
        f"{encoder.hidden_size}{identity}"
    )
