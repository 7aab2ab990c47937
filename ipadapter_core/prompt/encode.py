"""Reference images to image prompts, in three steps that can be taken apart: encode, arrange, project."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.batch import fit_batch
from ..checkpoints import AdapterWeights
from ..checkpoints.format import TrainedUnconditional
from ..compatibility import CORRECT, Rules
from ..errors import IncompatibleEncoderError, InvalidInputError
from ..features import Encoded, Framing, ImageEncoder
from ..images.pictures import Picture
from ..images.tiles import split_tiles
from .combine import at_strength, check_strengths, combine_features
from .image_prompt import ImagePrompt, NegativeBranch, project_features
from .needs import check_encoder, encoder_for
from .options import EncodeOptions, NoImage, changed
from .references import (
    Part,
    View,
    negatives_of,
    no_image_pixels,
    parts_of,
    pixels_of,
    single_images,
    single_masks,
    view_of,
)
from .tiles import merge_tiles

ENCODED_RULES = ("zero_pixels", "black", "black_picture")
"""Rules under which what stands for no image is a picture that the encoder sees; under the others its feature is zeros."""


@torch.no_grad()
def encode_image_prompt(
    adapter: AdapterWeights,
    encoder: ImageEncoder | Sequence[ImageEncoder],
    images: Picture | Sequence[Picture],
    options: EncodeOptions | None = None,
    *,
    masks: Picture | Sequence[Picture | None] | None = None,
    negative: Picture | None = None,
    **changes: Any,
) -> ImagePrompt:
    """Encode reference images for ``adapter``; everything is checked before the encoder runs.

    Args:
        encoder: the adapter's image encoder, or several in any order where it reads more than one; those that it does not read
            are not asked.
        images: ``i h w c`` in 0..1, or a sequence of ``h w c`` or ``i h w c`` tensors of any sizes; wherever a picture or mask is
            asked for, an array, a picture of Pillow or a path does as well, see ``images.pictures.Picture``.
        options, changes: fields of EncodeOptions, as one value or as keyword arguments (``crop="pad"``).
        masks: what of each image is seen, see preprocess(): ``i h w`` (or one for all images of one size), or a
            sequence with one ``h w`` tensor or None per image.
        negative: one image ``1 h w c`` (or ``h w c``) to steer away from, or with per_latent one per image; its
            features replace the unconditional ones.

    Raises IncompatibleEncoderError for an encoder the adapter was not trained with, InvalidInputError for bad values.
    """
    options = changed(options, changes)
    encoded = adapter.spec.format.feature.encoded
    if encoded is None or adapter.spec.format.feature.embedding is not None:
        raise IncompatibleEncoderError(
            f"{adapter.name} is a {adapter.spec.family} adapter, which reads faces and not whole pictures; use the FaceID "
            "nodes (in Python: encode_face_prompt)"
        )
    encoder = encoder_for(adapter.spec, encoder)
    parts = parts_of(images, masks, options)
    strengths = check_strengths(options.strengths, len(parts))
    negatives = negatives_of(negative, len(parts), options)
    rule = options.no_image(adapter.spec.unconditional)
    view = view_of(options, adapter.spec.format.framing, [*(image for part in parts for image, _ in part), *negatives])
    seen, neutral, away = _look(encoded, encoder, parts, negatives, rule, options, view)
    references = [
        _joined(at_strength(tiles, neutral, strength, options.rules), options)
        for tiles, strength in zip(seen, strengths, strict=True)
    ]
    if options.per_latent:
        features = torch.cat(references)
    else:
        features = combine_features(references, options.combine, options.rules)
    branch = negative_branch(rule) if away is None else "tokens"
    uncond, neutral = (neutral, None) if away is None else (away, neutral)
    return project_features(
        adapter,
        encoder.name,
        features=features,
        uncond=uncond,
        neutral=neutral,
        chunk=options.chunk,
        negative_branch=branch,
    )


@torch.no_grad()
def encode_features(
    encoded: Encoded,
    encoder: ImageEncoder,
    images: Picture | Sequence[Picture],
    options: EncodeOptions | None = None,
    *,
    mask: Picture | None = None,
    framing: Framing = "center",
    **changes: Any,
) -> Tensor:
    """What ``encoder`` sees in each image, ``i ...`` in float32: the first step of encode_image_prompt().

    ``framing`` is that of the adapter's family, where ``crop`` is "auto".

    With ``tiles`` n > 1 every image is also cut into n x n parts that are encoded alone and put together again
    (see merge_tiles): of one image the result is [whole · tile_ratio, tiled], of several each is
    whole · tile_ratio + tiled · (1 - tile_ratio), as ComfyUI_IPAdapter_plus' ClipVision enhancer does.
    """
    options = changed(options, changes)
    singles = single_images(images)
    masks = single_masks(mask, singles)
    view = view_of(options, framing, singles)
    pixels = [pixels_of(*one, encoder, view) for one in zip(singles, masks, strict=True)]
    cut = options.tiles
    if cut > 1:
        pixels += [pixels_of(tile, None, encoder, view) for image in singles for tile in split_tiles(image, cut)]
    seen = _encode(encoded, encoder, pixels, options)
    if cut == 1:
        return seen
    whole, parts = seen[: len(singles)] * options.tile_ratio, seen[len(singles) :]
    tiled = torch.cat([merge_tiles(part) for part in parts.split(cut * cut)])
    return torch.cat([whole, tiled]) if len(singles) == 1 else whole + tiled * (1 - options.tile_ratio)


def unconditional_features(
    adapter: AdapterWeights, encoder: ImageEncoder | None, like: Tensor, rules: Rules = CORRECT
) -> Tensor:
    """What stands for no image beside features ``like`` (``i ...``): one entry ``1 ...``.

    Raises InvalidInputError where that takes an encoder and there is none.
    """
    feature, trained = adapter.spec.format.feature, adapter.spec.unconditional
    if feature.encoded is None or trained not in ENCODED_RULES:
        return torch.zeros_like(like[:1])
    if encoder is None:
        raise InvalidInputError(
            f"{adapter.name} needs the encoded picture of no image beside these embeds: connect the negative embeds of "
            "the encoder node, or a CLIP vision model"
        )
    check_encoder(adapter.spec, encoder)
    return feature.without_face(_no_image(feature.encoded, encoder, rules, trained))


def no_image_features(encoded: Encoded, encoder: ImageEncoder, like: Tensor, rules: Rules = CORRECT) -> Tensor:
    """What stands for no image beside features ``like`` (``i ...``) where no adapter tells: one entry ``1 ...``.

    Zeros for image_embeds; for penultimate tokens those of an encoded empty picture, as rules say which.
    """
    return torch.zeros_like(like[:1]) if encoded == "image_embeds" else _no_image(encoded, encoder, rules)


def _no_image(
    encoded: Encoded, encoder: ImageEncoder, rules: Rules, trained: TrainedUnconditional = "zero_pixels"
) -> Tensor:
    """The feature ``1 ...`` of an encoded empty picture."""
    options = EncodeOptions(rules=rules)
    zeros = torch.zeros(1, 3, encoder.image_size, encoder.image_size)
    return _encode(encoded, encoder, [no_image_pixels(options.no_image(trained), encoder, zeros)], options)


def negative_branch(rule: NoImage | TrainedUnconditional) -> NegativeBranch:
    """What the negative branch gets under a rule, where no negative image is given."""
    return rule if rule == "same" or rule == "off" else "tokens"


@torch.no_grad()
def prompt_from_features(
    adapter: AdapterWeights,
    features: Tensor,
    uncond: Tensor,
    options: EncodeOptions | None = None,
    *,
    neutral: Tensor | None = None,
    encoder: str = "saved embeds",
    negative_branch: NegativeBranch = "tokens",
    **changes: Any,
) -> ImagePrompt:
    """The other steps of encode_image_prompt(): features ``i ...`` and those of no image ``1|i ...`` to a prompt.

    ``neutral`` ``1 ...`` stands for no image where ``uncond`` is a negative one; ``negative_branch`` says whether the negative
    branch gets ``uncond`` at all; ``options`` and ``changes`` are fields of EncodeOptions.

    Raises IncompatibleEncoderError for features of another encoder.
    """
    options, feature = changed(options, changes), adapter.spec.format.feature
    for name, tensor in (("embeds", features), ("negative embeds", uncond)):
        if tensor.ndim != feature.rank or tensor.shape[-1] != adapter.spec.feature_dim or len(tensor) == 0:
            raise IncompatibleEncoderError(
                f"the {name} have shape {tuple(tensor.shape)}, but {adapter.name} reads {adapter.spec.feature} of shape "
                f"({', '.join(map(str, feature.shape(adapter.spec.feature_dim)))}); make them with this adapter and the "
                f"encoder {adapter.spec.encoder}"
            )
    uncond = fit_batch(uncond, len(features)).to(features)
    if options.per_latent:
        both = features[:, None], uncond[:, None]
    elif options.combine == "concat" or len(features) == 1:
        both = features[None], uncond[None]
    else:
        both = combine_features(features[None].split(1, dim=1), options.combine, options.rules), uncond[None, :1]
    return project_features(
        adapter,
        encoder,
        features=both[0],
        uncond=both[1],
        neutral=None if neutral is None else neutral[None, :1].to(features),
        chunk=options.chunk,
        face_scale=options.face_scale,
        negative_branch=negative_branch,
    )


def _look(
    encoded: Encoded,
    encoder: ImageEncoder,
    parts: list[list[Part]],
    negatives: list[Tensor],
    rule: NoImage,
    options: EncodeOptions,
    view: View,
) -> tuple[Sequence[Tensor], Tensor, Tensor | None]:
    """What the encoder sees, in one go: every reference's tiles ``t 1 ...``, no image ``1 1 ...``, negatives ``i 1 ...``."""
    pixels = [pixels_of(*part, encoder, view) for reference in parts for part in reference]
    count = len(pixels)
    if rule in ENCODED_RULES:
        pixels.append(no_image_pixels(rule, encoder, pixels[0]))
    pixels += [pixels_of(image, None, encoder, view) for image in negatives]
    seen = _encode(encoded, encoder, pixels, options)[:, None]
    neutral = seen[count : count + 1] if rule in ENCODED_RULES else torch.zeros_like(seen[:1])
    away = seen[-len(negatives) :] if negatives else None
    return seen[:count].split([len(reference) for reference in parts]), neutral, away


def _joined(tiles: Tensor, options: EncodeOptions) -> Tensor:
    """The tiles ``t 1 ...`` of one reference as one ``1 k ...``: side by side, or their mean where references are mixed."""
    if options.per_latent or options.combine == "concat" or len(tiles) == 1:
        return tiles.transpose(0, 1)
    return tiles.mean(0, keepdim=True)


def _encode(encoded: Encoded, encoder: ImageEncoder, pixels: list[Tensor], options: EncodeOptions) -> Tensor:
    """The feature of each image, ``i ...`` in float32 (sums of fp16 features could overflow)."""
    parts: list[Tensor] = []
    for start in range(0, len(pixels), options.chunk):
        group = [p.to(pixels[0].device) for p in pixels[start : start + options.chunk]]
        parts.append(encoder.encode(torch.cat(group)).get(encoded).float())
        if options.progress is not None:
            options.progress(min(start + options.chunk, len(pixels)), len(pixels))
    features = torch.cat(parts)
    if not bool(torch.isfinite(features).all()):
        raise InvalidInputError(f"{encoder.name} returned NaN or infinite features; run it in float32 or bfloat16")
    return features
