"""Faces in pictures to an image prompt: found, chosen, embedded, and for FaceID Plus looked at by the image encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import AdapterWeights
from ..errors import IncompatibleEncoderError, InvalidInputError
from ..features import Embedding, ImageEncoder
from ..images.faces import FaceAnalyzer, FoundFaces, find_faces
from ..images.pictures import Picture, as_mask, as_picture
from .encode import encode_features, prompt_from_features, unconditional_features
from .image_prompt import ImagePrompt
from .needs import check_encoder
from .options import EncodeOptions, changed

FORMER_NAMES = {"crop": "face_side", "picture_scale": "face_scale"}
"""Keyword arguments of encode_face_prompt() that are fields of EncodeOptions under other names."""


@torch.no_grad()
def encode_face_prompt(
    adapter: AdapterWeights,
    analyzer: FaceAnalyzer,
    encoder: ImageEncoder | None,
    images: Picture,
    options: EncodeOptions | None = None,
    *,
    mask: Picture | None = None,
    negative: Picture | Callable[[Tensor], Tensor] | None = None,
    **changes: Any,
) -> tuple[ImagePrompt, FoundFaces]:
    """Encode the faces in ``images`` ``b h w c`` (0..1, or another ``Picture``) for a FaceID adapter; also returns what was found.

    Args:
        encoder: needed by FaceID Plus, which also looks at the aligned face; others do not use it.
        options, changes: fields of EncodeOptions, as one value or as keyword arguments (``which="all"``).
        mask: restricts the choice among the faces of a picture, see find_faces().
        negative: pictures to steer away from, ``1|f h w c``, or what makes them of the aligned faces: FaceID Plus from their
            look, as its image encoder sees the whole picture, others from the best face in each.

    Raises IncompatibleEncoderError for an adapter that reads no faces or an encoder it was not trained with, and
    InvalidInputError where a face or the encoder is missing.
    """
    options = changed(options, {FORMER_NAMES.get(name, name): value for name, value in changes.items()})
    spec, feature = adapter.spec, adapter.spec.format.feature
    embedding, encoder = _needs(adapter, encoder)
    side = options.face_side or spec.face_side
    found = find_faces(
        analyzer, _batch(images), side, which=options.which, mask=None if mask is None else as_mask(mask)
    )
    if negative is not None and not callable(negative):
        negative = _batch(negative)
    faces, seen, away = found.get(embedding), None, None
    if feature.encoded is None or encoder is None:
        if isinstance(negative, Tensor) and not options.rules.faces_without_negative:
            away = _faces_of(adapter, analyzer, negative).get(embedding)
    else:
        seen = encode_features(feature.encoded, encoder, found.crops, options)
        if negative is not None:
            pictures = negative if isinstance(negative, Tensor) else negative(found.crops)
            quiet = replace(options, progress=None)
            away = feature.without_face(encode_features(feature.encoded, encoder, pictures, quiet))
    features = feature.join(faces, seen)
    neutral = unconditional_features(adapter, encoder, features, options.rules)
    prompt = prompt_from_features(
        adapter,
        features,
        neutral if away is None else away,
        options,
        neutral=None if away is None else neutral,
        encoder=analyzer.name if encoder is None else encoder.name,
    )
    return prompt, found


def _batch(pictures: Picture) -> Tensor:
    """Pictures ``b h w c``."""
    given = as_picture(pictures)
    return given[None] if given.ndim == 3 else given


def _needs(adapter: AdapterWeights, encoder: ImageEncoder | None) -> tuple[Embedding, ImageEncoder | None]:
    """Which embedding a FaceID adapter reads, and the encoder if it needs one too."""
    spec, feature = adapter.spec, adapter.spec.format.feature
    if feature.embedding is None:
        raise IncompatibleEncoderError(
            f"{adapter.name} is a {spec.family} adapter, which reads whole pictures and not faces; use Encode Image Prompt (in "
            "Python: encode_image_prompt), or a FaceID adapter"
        )
    if feature.encoded is None:
        return feature.embedding, None
    if encoder is None:
        raise InvalidInputError(
            f"{adapter.name} also looks at the face with an image encoder ({spec.encoder}): connect Load CLIP Vision to "
            "clip_vision"
        )
    check_encoder(spec, encoder)
    return feature.embedding, encoder


def _faces_of(adapter: AdapterWeights, analyzer: FaceAnalyzer, pictures: Tensor) -> FoundFaces:
    """The best face of each negative picture."""
    try:
        return find_faces(analyzer, pictures, adapter.spec.face_side)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"{adapter.name} reads nothing but faces, also in the negative picture: {error}, or disconnect negative"
        ) from error
