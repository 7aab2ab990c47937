"""References of an old node to image prompts: which encoder call each of its inputs becomes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...ipadapter_core import (
    ImagePrompt,
    InvalidInputError,
    Rules,
    encode_features,
    prompt_from_features,
    unconditional_features,
)
from ...ipadapter_core.image_encoder import check_encoder
from ...ipadapter_core.legacy import LegacySettings
from .. import host
from .pipeline import Pipeline


@dataclass(frozen=True)
class Reference:
    """What an old apply node is given to look at."""

    image: Tensor
    composition: Tensor | None = None
    negative: Tensor | None = None
    weight_faceidv2: float | None = None
    weight_kolors: float = 1.0
    batch_size: int = 0
    tiles: int = 1
    tile_ratio: float = 1.0


@dataclass(frozen=True)
class Encoded:
    prompt: ImagePrompt
    composition: ImagePrompt | None = None
    faces: Tensor | None = None


def encode_reference(pipeline: Pipeline, reference: Reference, settings: LegacySettings, rules: Rules) -> Encoded:
    """Encode and project the pictures of one node."""
    encoder = vision(pipeline)
    adapter = pipeline.adapter.to_device()
    feature = adapter.spec.feature
    check_encoder(adapter.spec, encoder)
    chunk = reference.batch_size or 8
    options = {"rules": rules, "chunk": chunk, "progress": host.progress_bar()}
    tiled = {**options, "tiles": min(reference.tiles, 16), "tile_ratio": reference.tile_ratio}
    features = encode_features(feature, encoder, reference.image, **tiled)
    if reference.negative is None:
        uncond = unconditional_features(adapter, encoder, features, rules)
    else:
        uncond = encode_features(feature, encoder, reference.negative, **options)

    def prompt(features: Tensor) -> ImagePrompt:
        return prompt_from_features(
            adapter, features, uncond, combine=settings.combine_embeds, per_latent=settings.unfold_batch,
            chunk=chunk, encoder=encoder.name, rules=rules,
        )  # fmt: skip

    composition = None
    if reference.composition is not None:
        composition = prompt(encode_features(feature, encoder, reference.composition, **tiled))
    return Encoded(prompt(features), composition)


def vision(pipeline: Pipeline) -> host.ClipVisionEncoder:
    """The image encoder. Raises InvalidInputError where none is connected."""
    if pipeline.clip_vision is None:
        spec = pipeline.adapter.weights.spec
        raise InvalidInputError(
            f"{pipeline.adapter.weights.name} needs an image encoder ({spec.encoder}): connect Load CLIP Vision to "
            "clip_vision, or load everything with an IPAdapter Unified Loader"
        )
    return host.ClipVisionEncoder(pipeline.clip_vision)
