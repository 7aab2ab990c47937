"""References of an old node to image prompts: which encoder call each of its inputs becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from torch import Tensor

from ...ipadapter_core import (
    AdapterWeights,
    EncodeOptions,
    ImageEncoder,
    ImagePrompt,
    InvalidInputError,
    Rules,
    encode_face_prompt,
    encode_features,
    prompt_from_features,
    unconditional_features,
)
from ...ipadapter_core.images.faces import FaceAnalyzer, InsightFaceAnalyzer
from ...ipadapter_core.legacy.settings import LegacySettings
from ...ipadapter_core.prompt.combine import Combine
from ...ipadapter_core.prompt.encode import negative_branch
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
    options = EncodeOptions(
        combine=cast("Combine", settings.combine_embeds), per_latent=settings.unfold_batch, chunk=reference.batch_size or 8,
        progress=host.frontend.progress_bar(), rules=rules,
    )  # fmt: skip
    feature = pipeline.adapter.weights.spec.format.feature
    if feature.embedding is not None or feature.encoded is None:
        return _encode_faces(pipeline, reference, settings, options)
    encoder, adapter = vision(pipeline), pipeline.adapter.to_device()
    tiled = replace(options, tiles=min(reference.tiles, 16), tile_ratio=reference.tile_ratio)
    negative = reference.negative
    if negative is not None and not isinstance(negative, Tensor):
        negative = negative(reference.image)
    features, uncond = encode_pictures(adapter, encoder, reference.image, negative, tiled)
    branch = negative_branch(adapter.spec.unconditional) if negative is None else "tokens"
    prompt = partial(
        prompt_from_features, adapter, uncond=uncond, options=options, encoder=encoder.name, negative_branch=branch
    )
    if reference.composition is None:
        return Encoded(prompt(features))
    framing = adapter.spec.format.framing
    composition = encode_features(feature.encoded, encoder, reference.composition, tiled, framing=framing)
    return Encoded(prompt(features), prompt(composition))


def encode_pictures(
    adapter: AdapterWeights,
    encoder: ImageEncoder,
    images: Tensor,
    negative: Tensor | None,
    options: EncodeOptions,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Features of pictures, and of what stands for no image beside them or of the negative pictures."""
    encoded = adapter.spec.format.feature.encoded
    if encoded is None:
        raise InvalidInputError(f"{adapter.name} reads nothing but faces: take IPAdapter FaceID in this node's place")
    check_encoder(adapter.spec, encoder)
    look = partial(encode_features, encoded, encoder, framing=adapter.spec.format.framing)
    features = look(images, options, mask=mask)
    if negative is None:
        return features, unconditional_features(adapter, encoder, features, options.rules)
    return features, look(negative, replace(options, tiles=1))


def _encode_faces(
    pipeline: Pipeline, reference: Reference, settings: LegacySettings, options: EncodeOptions
) -> Encoded:
    """The face of every picture, and what an image encoder sees in its crop where the adapter reads that too."""
    adapter = pipeline.adapter.to_device()
    encoder = None if adapter.spec.format.feature.encoded is None else vision(pipeline)
    # as the old pack: where the node has no weight of its own for it, twice the weight
    weight = settings.weight if isinstance(settings.weight, (int, float)) else settings.weight[0]
    scale = 2 * weight if reference.weight_faceidv2 is None else reference.weight_faceidv2
    options = replace(options, face_scale=scale, face_side=reference.crop)
    prompt, found = encode_face_prompt(
        adapter, face_analyzer(pipeline), encoder, reference.image, options, negative=reference.negative
    )
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


def vision(pipeline: Pipeline) -> ImageEncoder:
    """The image encoder. Raises InvalidInputError where none is connected."""
    if pipeline.clip_vision is None:
        spec = pipeline.adapter.weights.spec
        raise InvalidInputError(
            f"{pipeline.adapter.weights.name} needs an image encoder ({spec.encoder}): connect Load CLIP Vision to "
            "clip_vision, or load everything with an IPAdapter Unified Loader"
        )
    return host.clip_vision.encoder_of(pipeline.clip_vision)
