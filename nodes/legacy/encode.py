"""References of an old node to image prompts: which encoder call each of its inputs becomes."""

from __future__ import annotations

from collections.abc import Callable
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
from ...ipadapter_core.images.faces import FaceAnalyzer, InsightFaceAnalyzer
from ...ipadapter_core.legacy.settings import LegacySettings
from ...ipadapter_core.prompt.faces import encode_face_prompt
from ...ipadapter_core.prompt.needs import check_encoder
from .. import host
from .pipeline import Pipeline


@dataclass(frozen=True)
class Reference:
    """What an old apply node is given to look at."""

    image: Tensor
    composition: Tensor | None = None
    negative: Tensor | Callable[[Tensor], Tensor] | None = None
    """Pictures to steer away from, or what makes them: of the image, or of the aligned faces where the adapter reads these."""
    weight_faceidv2: float | None = None
    weight_kolors: float = 1.0
    batch_size: int = 0
    tiles: int = 1
    tile_ratio: float = 1.0
    crop: int | None = None
    """Side of the aligned face; None: by base model."""


@dataclass(frozen=True)
class Encoded:
    prompt: ImagePrompt
    composition: ImagePrompt | None = None
    faces: Tensor | None = None


def encode_reference(pipeline: Pipeline, reference: Reference, settings: LegacySettings, rules: Rules) -> Encoded:
    """Encode and project the pictures of one node."""
    if pipeline.adapter.weights.spec.format.feature.embedding is not None:
        return _encode_faces(pipeline, reference, settings, rules)
    encoder = vision(pipeline)
    adapter = pipeline.adapter.to_device()
    feature = adapter.spec.format.feature.encoded
    check_encoder(adapter.spec, encoder)
    chunk = reference.batch_size or 8
    options = {"rules": rules, "chunk": chunk, "progress": host.frontend.progress_bar()}
    tiled = {**options, "tiles": min(reference.tiles, 16), "tile_ratio": reference.tile_ratio}
    features = encode_features(feature, encoder, reference.image, **tiled)
    if reference.negative is None:
        uncond = unconditional_features(adapter, encoder, features, rules)
    else:
        negative = reference.negative
        pictures = negative if isinstance(negative, Tensor) else negative(reference.image)
        uncond = encode_features(feature, encoder, pictures, **options)

    def prompt(features: Tensor) -> ImagePrompt:
        return prompt_from_features(
            adapter, features, uncond, combine=settings.combine_embeds, per_latent=settings.unfold_batch,
            chunk=chunk, encoder=encoder.name, rules=rules,
        )  # fmt: skip

    composition = None
    if reference.composition is not None:
        composition = prompt(encode_features(feature, encoder, reference.composition, **tiled))
    return Encoded(prompt(features), composition)


def _encode_faces(pipeline: Pipeline, reference: Reference, settings: LegacySettings, rules: Rules) -> Encoded:
    """The face of every picture, and what an image encoder sees in its crop where the adapter reads that too."""
    adapter = pipeline.adapter.to_device()
    encoder = None if adapter.spec.format.feature.encoded is None else vision(pipeline)
    # as the old pack: where the node has no weight of its own for it, twice the weight
    weight = settings.weight if isinstance(settings.weight, (int, float)) else settings.weight[0]
    scale = 2 * weight if reference.weight_faceidv2 is None else reference.weight_faceidv2
    prompt, found = encode_face_prompt(
        adapter, face_analyzer(pipeline), encoder, reference.image, combine=settings.combine_embeds,
        per_latent=settings.unfold_batch, picture_scale=scale, negative=reference.negative, crop=reference.crop,
        chunk=reference.batch_size or 8, progress=host.frontend.progress_bar(), rules=rules,
    )  # fmt: skip
    return Encoded(prompt, faces=found.crops)


def face_analyzer(pipeline: Pipeline) -> FaceAnalyzer:
    """The face model on the insightface input: ours, or an insightface FaceAnalysis of another pack."""
    model = pipeline.insightface
    if model is None:
        raise InvalidInputError(
            f"{pipeline.adapter.weights.name} reads faces: connect IPAdapter InsightFace Loader to insightface, or load "
            "everything with IPAdapter Unified Loader FaceID"
        )
    if hasattr(model, "find"):
        return model
    if hasattr(model, "get") and hasattr(model, "det_model"):
        return InsightFaceAnalyzer(model, f"InsightFace {id(model):x}")
    raise InvalidInputError(
        f"the insightface input carries a {type(model).__name__}, which finds no faces; use the loader"
    )


def vision(pipeline: Pipeline) -> host.clip_vision.ClipVisionEncoder:
    """The image encoder. Raises InvalidInputError where none is connected."""
    if pipeline.clip_vision is None:
        spec = pipeline.adapter.weights.spec
        raise InvalidInputError(
            f"{pipeline.adapter.weights.name} needs an image encoder ({spec.encoder}): connect Load CLIP Vision to "
            "clip_vision, or load everything with an IPAdapter Unified Loader"
        )
    return host.clip_vision.ClipVisionEncoder(pipeline.clip_vision)
