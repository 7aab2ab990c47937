"""Which image encoder an adapter needs."""

from __future__ import annotations

from ..checkpoints import AdapterSpec
from ..errors import IncompatibleEncoderError
from ..features import ENCODERS, Encoded, ImageEncoder, width_of

WORDS: dict[Encoded, str] = {
    "image_embeds": "image_embeds",
    "penultimate": "penultimate hidden states",
    "pooled": "the pooled vector",
    "last": "the last hidden states",
    "packed": "the hidden states",
}
"""What adapters read of an encoder, for messages."""


def check_encoder(spec: AdapterSpec, encoder: ImageEncoder) -> None:
    """Raise IncompatibleEncoderError unless ``encoder`` gives the feature that an adapter's projector reads."""
    encoded = spec.format.feature.encoded
    if encoded is None or width_of(encoder, encoded) == spec.feature_dim:
        return
    adapter = f"this {spec.base_model} {spec.family} adapter reads {WORDS[encoded]} of width {spec.feature_dim}"
    if encoded == "pooled" and encoder.hidden_size == spec.feature_dim:
        raise IncompatibleEncoderError(
            f"{adapter}, which the attention pooling head of {encoder.name} makes, and its file has no such head "
            f"(vision_model.head.probe): use a file with it, {files_of(spec.encoder)}"
        )
    wanted = (
        f"it needs {needed}"
        if (needed := files_of(spec.encoder))
        else "it was trained with an encoder of its own, use that one"
    )
    known = [
        other.name
        for other in ENCODERS.values()
        if (other.hidden_size, other.projection_dim) == (encoder.hidden_size, encoder.projection_dim)
    ]
    identity = f", the widths of {' or '.join(known)}" if known and encoder.name not in known else ""
    embeds = f"image_embeds of width {encoder.projection_dim} and " if encoder.projection_dim else ""
    raise IncompatibleEncoderError(
        f"{adapter}: {wanted}; got {encoder.name} with {embeds}hidden states of width {encoder.hidden_size}{identity}"
    )


def files_of(encoder: str) -> str:
    """A published encoder and the files that people have of it, for messages; empty for another."""
    known = ENCODERS.get(encoder)
    return "" if known is None else f"{known.name}, which people have as {', or '.join(known.files)}"
