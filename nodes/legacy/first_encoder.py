"""IPAdapterEncoder as it was before 2024-03-23: pictures and weights without an adapter, embeds as one pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ipadapter_core import EncodeOptions, InvalidInputError, encode_features, rules_for
from ...ipadapter_core.images.noise import negative_picture
from ...ipadapter_core.legacy.settings import first_feature_weight
from ...ipadapter_core.prompt.combine import at_strength
from ...ipadapter_core.prompt.encode import no_image_features
from .. import host


def encode_first(
    clip_vision: Any,
    *,
    plus: bool,
    compatibility: str,
    image_1: Tensor,
    image_2: Tensor | None = None,
    image_3: Tensor | None = None,
    image_4: Tensor | None = None,
    noise: float = 0.0,
    weight_1: float = 1.0,
    weight_2: float = 1.0,
    weight_3: float = 1.0,
    weight_4: float = 1.0,
) -> tuple[Any, ...]:
    """Embeds ``2 i ...`` (positive, negative) of up to four inputs, those of other sizes brought to the first's."""
    if clip_vision is None:
        raise InvalidInputError("IPAdapter Encoder has pictures and no clip_vision: connect Load CLIP Vision")
    rules = rules_for(compatibility, v1=True)
    encoder = host.clip_vision.encoder_of(clip_vision)
    given = [(image_1, weight_1), (image_2, weight_2), (image_3, weight_3), (image_4, weight_4)]
    pictures = [(host.frontend.resized_like(image, image_1), weight) for image, weight in given if image is not None]
    images = torch.cat([image for image, _ in pictures])
    encoded = "penultimate" if plus else "image_embeds"
    options = EncodeOptions(rules=rules, progress=host.frontend.progress_bar())
    features = encode_features(encoded, encoder, images, options)
    neutral = no_image_features(encoded, encoder, features, rules)
    negative = neutral.expand_as(features)
    if noise > 0:
        negative = encode_features(encoded, encoder, negative_picture(images, noise), options)
    weights = [first_feature_weight(weight) for image, weight in pictures for _ in image]
    weighted = [at_strength(f, neutral, w, rules) for f, w in zip(torch.split(features, 1), weights, strict=True)]
    pair = torch.stack([torch.cat(weighted), negative])
    return pair, pair[1]
