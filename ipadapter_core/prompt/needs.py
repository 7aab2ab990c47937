"""Which image encoder an adapter needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from ..checkpoints import AdapterSpec
from ..errors import IncompatibleEncoderError, InvalidInputError
from ..features import ENCODERS, Encoded, ImageEncoder, Look, width_of
from ..images.packed import PackedEncoder, StateEncoder

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
    if encoded is None:
        return
    if width_of(encoder, encoded) == spec.feature_dim:
        _check_size(spec, encoder)
        return
    if spec.format.feature.looks and not isinstance(encoder, PackedEncoder):
        encoder_for(spec, encoder)
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


def _check_size(spec: AdapterSpec, encoder: ImageEncoder) -> None:
    """SigLIPs of several sizes are equally wide, and see other tokens. Of families that people train, nobody knows which it was."""
    known = None if spec.format.trains else ENCODERS.get(spec.encoder)
    if known is not None and not known.projection_dim and encoder.image_size != known.image_size:
        raise IncompatibleEncoderError(
            f"this {spec.base_model} {spec.family} adapter was trained with pictures of {known.image_size} pixels: it needs "
            f"{files_of(spec.encoder)}; {encoder.name} sees {encoder.image_size} pixels"
        )


def encoder_for(spec: AdapterSpec, encoders: ImageEncoder | Sequence[ImageEncoder]) -> ImageEncoder:
    """The encoder among those given that an adapter reads, or those of them that it reads as one.

    Raises IncompatibleEncoderError where there is none, InvalidInputError for no encoder at all.
    """
    given = list(encoders) if isinstance(encoders, Sequence) else [encoders]
    if not given:
        raise InvalidInputError("the list of image encoders is empty; give at least one")
    feature = spec.format.feature
    if not feature.looks:
        fitting = [e for e in given if feature.encoded is not None and width_of(e, feature.encoded) == spec.feature_dim]
        check_encoder(spec, chosen := (fitting or given)[0])
        return chosen
    if len(given) == 1 and isinstance(given[0], PackedEncoder):
        check_encoder(spec, given[0])
        return given[0]
    found = [_seen_through(look, given) for look in feature.looks]
    missing = [look.encoder for look, encoder in zip(feature.looks, found, strict=True) if encoder is None]
    if missing:
        raise IncompatibleEncoderError(
            f"this {spec.base_model} {spec.family} adapter reads the hidden states of {len(found)} image encoders at once, and of "
            f"{' and '.join(missing)} there is none: give {'; and '.join(map(files_of, missing))}; got "
            f"{' and '.join(encoder.name for encoder in given)}"
        )
    return PackedEncoder(feature, [encoder for encoder in found if encoder is not None])


def _seen_through(look: Look, given: Sequence[ImageEncoder]) -> StateEncoder | None:
    """The encoder that a look means: of its width and size, and with inner layers to give; None if there is none."""
    known = ENCODERS[look.encoder]
    sizes = known.hidden_size, known.image_size
    found = (e for e in given if (e.hidden_size, e.image_size) == sizes and callable(getattr(e, "states", None)))
    return cast("StateEncoder | None", next(found, None))


def files_of(encoder: str) -> str:
    """A published encoder and the files that people have of it, for messages; empty for another."""
    known = ENCODERS.get(encoder)
    if known is None:
        return ""
    node = "" if known.projection_dim else " (in ComfyUI load it with Load Image Encoder)"
    return f"{known.name}, which people have as {', or '.join(known.files)}{node}"
