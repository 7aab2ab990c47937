"""Faces in pictures to an image prompt: found, chosen, embedded, and for FaceID Plus looked at by the image encoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checkpoints import AdapterWeights
from ..compatibility import CORRECT, Rules
from ..errors import IncompatibleEncoderError, InvalidInputError
from ..features import ImageEncoder
from ..images.faces import FaceAnalyzer, FoundFaces, Which, find_faces
from .encode import Combine, ImagePrompt, encode_features, prompt_from_features, unconditional_features
from .needs import check_encoder


@torch.no_grad()
def encode_face_prompt(
    adapter: AdapterWeights,
    analyzer: FaceAnalyzer,
    encoder: ImageEncoder | None,
    images: Tensor,
    *,
    which: Which = "best",
    mask: Tensor | None = None,
    combine: Combine = "concat",
    per_latent: bool = False,
    picture_scale: float = 1.0,
    negative: Tensor | Callable[[Tensor], Tensor] | None = None,
    crop: int | None = None,
    chunk: int = 8,
    progress: Callable[[int, int], None] | None = None,
    rules: Rules = CORRECT,
) -> tuple[ImagePrompt, FoundFaces]:
    """Encode the faces in ``images`` ``b h w c`` (0..1) for a FaceID adapter; also returns what was found.

    Args:
        encoder: needed by FaceID Plus, which also looks at the aligned face; others do not use it.
        which, mask: the choice among the faces of a picture, see find_faces().
        combine, per_latent: as in encode_image_prompt(), over the chosen faces.
        picture_scale: how much FaceID Plus v2 reads in the picture of the face beside its embedding; 1 as trained.
        negative: pictures to steer away from, ``1|f h w c``, or what makes them of the aligned faces: FaceID Plus from their
            look, as its image encoder sees the whole picture, others from the best face in each.
        crop: side in pixels of the aligned face; None: as the adapter was trained.
        chunk, progress, rules: see encode_image_prompt().

    Raises IncompatibleEncoderError for an adapter that reads no faces or an encoder it was not trained with, and
    InvalidInputError where a face or the encoder is missing.
    """
    spec, feature = adapter.spec, adapter.spec.format.feature
    if feature.embedding is None:
        raise IncompatibleEncoderError(
            f"{adapter.name} is a {spec.family} adapter, which reads whole pictures and not faces; use Encode Image Prompt (in "
            "Python: encode_image_prompt), or a FaceID adapter"
        )
    if feature.encoded is None:
        encoder = None
    else:
        if encoder is None:
            raise InvalidInputError(
                f"{adapter.name} also looks at the face with an image encoder ({spec.encoder}): connect Load CLIP Vision to "
                "clip_vision"
            )
        check_encoder(spec, encoder)
    found = find_faces(analyzer, images, crop or spec.face_side, which=which, mask=mask)
    faces = found.get(feature.embedding)
    away = None
    if feature.encoded is None or encoder is None:
        features, name = faces, analyzer.name
        if isinstance(negative, Tensor) and not rules.faces_without_negative:
            away = _faces_of(adapter, analyzer, negative).get(feature.embedding)
    else:
        seen = encode_features(feature.encoded, encoder, found.crops, rules=rules, chunk=chunk, progress=progress)
        features, name = feature.join(faces, seen), encoder.name
        if negative is not None:
            pictures = negative if isinstance(negative, Tensor) else negative(found.crops)
            tokens = encode_features(feature.encoded, encoder, pictures, rules=rules, chunk=chunk)
            away = feature.without_face(tokens)
    neutral = unconditional_features(adapter, encoder, features, rules)
    prompt = prompt_from_features(
        adapter, features, neutral if away is None else away, neutral=None if away is None else neutral, combine=combine,
        per_latent=per_latent, chunk=chunk, encoder=name, rules=rules, face_scale=picture_scale,
    )  # fmt: skip
    return prompt, found


def _faces_of(adapter: AdapterWeights, analyzer: FaceAnalyzer, pictures: Tensor) -> FoundFaces:
    """The best face of each negative picture."""
    try:
        return find_faces(analyzer, pictures, adapter.spec.face_side)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"{adapter.name} reads nothing but faces, also in the negative picture: {error}, or disconnect negative"
        ) from error
