"""Reference images to image tokens: encode, weigh, combine, project, and the unconditional counterpart.

Shapes: ``b`` latents (1: shared by all), ``k`` images whose tokens stand side by side, ``n`` image tokens, ``d`` token
dim; features are ``b k e`` (image_embeds) or ``b k t c`` (penultimate tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .checkpoints import AdapterWeights
from .errors import IncompatibleEncoderError, InvalidInputError
from .image_encoder import Crop, ImageEncoder, check_encoder, preprocess

Combine = Literal["concat", "add", "subtract", "average", "norm average", "max", "min"]
Unconditional = Literal["auto", "zero_pixels", "zero_embeds", "black"]


@dataclass(frozen=True, eq=False)  # no slots: baked K/V are kept per prompt by weak reference
class ImagePrompt:
    """Encoded references: image tokens with their unconditional counterpart, and the features they came from.

    ``cond`` and ``uncond`` are ``b n d``: b = 1 is shared by the whole batch, b > 1 holds one prompt per latent.
    ``features`` and ``uncond_features`` are what they were projected from, ``b k ...``; ``neutral_features`` stand for
    no image at all and differ from ``uncond_features`` only where a negative image was given.
    """

    cond: Tensor
    uncond: Tensor
    features: Tensor
    uncond_features: Tensor
    adapter: str
    encoder: str
    token_dim: int
    neutral_features: Tensor | None = None


@torch.no_grad()
def encode_image_prompt(
    adapter: AdapterWeights,
    encoder: ImageEncoder,
    images: Tensor | Sequence[Tensor],
    *,
    masks: Tensor | Sequence[Tensor | None] | None = None,
    crop: Crop = "center",
    combine: Combine = "concat",
    strengths: Sequence[float] | None = None,
    negative: Tensor | None = None,
    unconditional: Unconditional = "auto",
    per_latent: bool = False,
    chunk: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> ImagePrompt:
    """Encode reference images for ``adapter``; everything is checked before the encoder runs.

    Args:
        images: ``i h w c`` in 0..1, or a sequence of ``h w c`` or ``i h w c`` tensors of any sizes.
        masks: what of each image is seen, see preprocess(): ``i h w`` (or one for all images of one size), or a
            sequence with one ``h w`` tensor or None per image.
        crop: which square of each image is kept, see preprocess().
        combine: see combine_features().
        strengths: one number per image: 0 is no image, 1 changes nothing, more exaggerates, negative turns it around.
            The feature moves on the line from no image to the image: neutral + strength · (feature − neutral).
        negative: one image ``1 h w c`` (or ``h w c``) to steer away from, or with per_latent one per image; its
            features replace the unconditional ones.
        unconditional: what the negative branch of guidance sees. ``auto`` does as the adapter was trained; otherwise
            ``zero_pixels`` (a picture of the encoder's mean colour), ``zero_embeds`` (no encoder at all), or ``black``
            (a black picture, as ComfyUI_IPAdapter_plus feeds plus adapters).
        per_latent: image i belongs to latent i, instead of all images to all latents; nothing is combined then.
        chunk: how many images the encoder and the projector see at once.
        progress: called with (images done, images in all) after each chunk; the unconditional picture counts.

    Raises IncompatibleEncoderError for an encoder the adapter was not trained with, InvalidInputError for bad values.
    """
    check_encoder(adapter.spec, encoder)
    _check_option("combine", combine, get_args(Combine))
    _check_option("unconditional", unconditional, get_args(Unconditional))
    if chunk < 1:
        raise InvalidInputError(f"chunk is {chunk}; it must be at least 1")
    singles = _single_images(images)
    count = len(singles)
    strengths = _check_strengths(strengths, count)
    pixels = [
        preprocess(image, encoder, crop=crop, mask=mask)
        for image, mask in zip(singles, _single_masks(masks, singles), strict=True)
    ]

    rule = adapter.spec.unconditional if unconditional == "auto" else unconditional
    negatives = _single_images(negative) if negative is not None else []
    if len(negatives) not in ((0, 1, count) if per_latent else (0, 1)):
        wanted = f"one or {count}" if per_latent else "one"
        raise InvalidInputError(f"got {len(negatives)} negative images; {wanted} can be used here")
    if rule != "zero_embeds":
        pixels.append(_unconditional_pixels(rule, encoder, pixels[0]))
    pixels += [preprocess(image, encoder, crop=crop) for image in negatives]

    encoded = _encode(adapter, encoder, pixels, chunk, progress)[:, None]  # k = 1
    neutral = torch.zeros_like(encoded[:1]) if rule == "zero_embeds" else encoded[count : count + 1]
    features = [
        _at_strength(feature, neutral, strength)
        for feature, strength in zip(encoded[:count].split(1), strengths, strict=True)
    ]
    return _project(
        adapter,
        encoder.name,
        features=torch.cat(features) if per_latent else combine_features(features, combine),
        uncond=encoded[-len(negatives) :] if negatives else neutral,
        neutral=neutral if negatives else None,
        chunk=chunk,
    )


@torch.no_grad()
def combine_prompts(
    adapter: AdapterWeights,
    prompts: Sequence[ImagePrompt],
    *,
    combine: Combine,
    strengths: Sequence[float] | None = None,
) -> ImagePrompt:
    """Combine encoded prompts as if their images had been encoded together, for ``adapter``.

    The prompts may come from another adapter that reads the same feature of the same encoder. ``strengths`` holds one
    number per prompt. Except for concat, which keeps each prompt's own, the unconditional is the first prompt's. A
    prompt of one image per latent combines with shared ones and with prompts of as many latents; all but concat
    combine image by image where a prompt holds several side by side.

    Raises InvalidInputError and IncompatibleEncoderError for prompts that do not fit together or the adapter.
    """
    _check_option("combine", combine, get_args(Combine))
    if not prompts:
        raise InvalidInputError("there are no image prompts to combine; give at least one")
    strengths = _check_strengths(strengths, len(prompts))
    spec, first = adapter.spec, prompts[0]
    rank = {"image_embeds": 3, "penultimate": 4}[spec.feature]
    for prompt in prompts:
        if prompt.encoder != first.encoder:
            raise IncompatibleEncoderError(
                f"image prompts of two encoders cannot be combined: {first.encoder} and {prompt.encoder}; "
                "encode all images with one"
            )
        if prompt.features.ndim != rank or prompt.features.shape[-1] != spec.feature_dim:
            raise IncompatibleEncoderError(
                f"{adapter.name} reads {spec.feature} of width {spec.feature_dim}, but a prompt made with "
                f"{prompt.adapter} and {prompt.encoder} holds features of shape {tuple(prompt.features.shape)}; "
                "encode its images for this adapter"
            )
    latents = {len(prompt.features) for prompt in prompts} - {1}
    if len(latents) > 1:
        raise InvalidInputError(
            f"the prompts hold {', '.join(map(str, sorted(latents)))} latents; they must agree (or be shared: 1)"
        )
    images = {prompt.features.shape[1] for prompt in prompts} - {1}
    if len(images) > 1 and combine != "concat":
        raise InvalidInputError(
            f"the prompts hold {', '.join(map(str, sorted(images)))} images side by side; "
            f"{combine} needs as many in each (or 1), concat takes any"
        )
    b = max(latents, default=1)
    device = first.features.device

    def spread(tensor: Tensor) -> Tensor:
        return tensor.to(device).expand(b, *tensor.shape[1:])

    features: list[Tensor] = []
    unconds: list[Tensor] = []
    neutrals: list[Tensor] = []
    for prompt, strength in zip(prompts, strengths, strict=True):
        neutral = prompt.uncond_features if prompt.neutral_features is None else prompt.neutral_features
        features.append(spread(_at_strength(prompt.features, neutral, strength)))
        unconds.append(spread(prompt.uncond_features))
        neutrals.append(spread(neutral))
    combined = combine_features(features, combine)
    concat = combine == "concat"
    uncond = torch.cat(unconds, 1) if concat else unconds[0]
    has_negative = any(prompt.neutral_features is not None for prompt in prompts)
    neutral = (torch.cat(neutrals, 1) if concat else neutrals[0]) if has_negative else None
    return _project(adapter, first.encoder, features=combined, uncond=uncond, neutral=neutral, chunk=8)


def combine_features(features: Sequence[Tensor], combine: Combine) -> Tensor:
    """Combine features ``b k ...``, one entry per reference, to one ``b k ...``; a single entry is returned as it is.

    ``concat`` puts them side by side along k, so every reference keeps its own tokens. The others mix the encoder's
    features: ``add`` their sum, ``subtract`` the first minus the mean of the others, ``average``, ``max``, ``min``, and
    ``norm average``: the mean of the directions e/‖e‖ (norm over the feature dimension), times the mean norm, so that
    no reference outweighs another by its length. (ComfyUI_IPAdapter_plus takes that norm over the images instead.)
    """
    if len(features) == 1:
        return features[0]
    if combine == "concat":
        return torch.cat([*features], dim=1)
    stack = torch.stack(torch.broadcast_tensors(*features))
    match combine:
        case "add":
            return stack.sum(0)
        case "subtract":
            return stack[0] - stack[1:].mean(0)
        case "average":
            return stack.mean(0)
        case "norm average":
            norm = torch.linalg.vector_norm(stack, dim=-1, keepdim=True)
            return (stack / norm.clamp(min=1e-12)).mean(0) * norm.mean(0)
        case "max":
            return stack.amax(0)
        case "min":
            return stack.amin(0)


def _at_strength(features: Tensor, neutral: Tensor, strength: float) -> Tensor:
    return features if strength == 1 else neutral.to(features.device) * (1 - strength) + features * strength


def _encode(
    adapter: AdapterWeights,
    encoder: ImageEncoder,
    pixels: list[Tensor],
    chunk: int,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """The adapter's feature of each image, ``i ...`` in float32 (sums of fp16 features could overflow)."""
    parts: list[Tensor] = []
    for start in range(0, len(pixels), chunk):
        group = [p.to(pixels[0].device) for p in pixels[start : start + chunk]]
        parts.append(encoder.encode(torch.cat(group)).get(adapter.spec.feature).float())
        if progress is not None:
            progress(min(start + chunk, len(pixels)), len(pixels))
    features = torch.cat(parts)
    if not bool(torch.isfinite(features).all()):
        raise InvalidInputError(f"{encoder.name} returned NaN or infinite features; run it in float32 or bfloat16")
    return features


def _unconditional_pixels(rule: str, encoder: ImageEncoder, like: Tensor) -> Tensor:
    # zero *normalised* pixels, the encoder's mean colour: tencent ip_adapter.py; the black image is what users of the
    # old pack have their pictures from
    if rule == "zero_pixels":
        return torch.zeros_like(like)
    size = encoder.image_size
    return preprocess(torch.zeros(1, size, size, 3, device=like.device), encoder)


def _project(
    adapter: AdapterWeights, encoder: str, *, features: Tensor, uncond: Tensor, neutral: Tensor | None, chunk: int
) -> ImagePrompt:
    """The prompt of ``features`` ``b k ...``; uncond and neutral may have b or k = 1 and are spread."""
    b, k = features.shape[:2]
    cond_tokens = _tokens(adapter, features, chunk)
    uncond_tokens = _tokens(adapter, uncond, chunk)
    return ImagePrompt(
        cond=cond_tokens.flatten(1, 2),
        uncond=uncond_tokens.expand(b, k, *uncond_tokens.shape[2:]).flatten(1, 2).contiguous(),
        features=features,
        uncond_features=uncond.expand(b, k, *uncond.shape[2:]),
        adapter=adapter.name,
        encoder=encoder,
        token_dim=adapter.spec.token_dim,
        neutral_features=None if neutral is None else neutral.expand(b, k, *neutral.shape[2:]),
    )


def _tokens(adapter: AdapterWeights, features: Tensor, chunk: int) -> Tensor:
    """Features ``b k ...`` to tokens ``b k n d``, ``chunk`` images at a time."""
    weight = next(adapter.module.projector.parameters())
    parts = features.flatten(0, 1).to(weight.device, weight.dtype).split(chunk)
    flat = torch.cat([adapter.tokens(part) for part in parts])
    return flat.unflatten(0, features.shape[:2])


def _single_images(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One ``1 h w c`` tensor per image; shapes are judged by preprocess()."""
    singles: list[Tensor] = []
    for image in [images] if isinstance(images, Tensor) else images:
        if image.ndim == 4 and image.shape[0] > 0:
            singles += image.split(1)
        else:
            singles.append(image[None] if image.ndim == 3 else image)
    if not singles:
        raise InvalidInputError("the list of images is empty; give at least one image")
    return singles


def _single_masks(masks: Tensor | Sequence[Tensor | None] | None, images: list[Tensor]) -> list[Tensor | None]:
    """One ``1 h w`` mask or None per image."""
    if masks is None:
        return [None] * len(images)
    if isinstance(masks, Tensor):
        masks = list(masks[None] if masks.ndim == 2 else masks)
        if len(masks) == 1:
            masks = masks * len(images)
    if len(masks) != len(images):
        raise InvalidInputError(f"got {len(masks)} masks for {len(images)} images; give one mask, or one per image")
    return [mask[None] if mask is not None and mask.ndim == 2 else mask for mask in masks]


def _check_strengths(strengths: Sequence[float] | None, count: int) -> list[float]:
    if strengths is None:
        return [1.0] * count
    values = [float(value) for value in strengths]
    if len(values) != count:
        raise InvalidInputError(f"got {len(values)} strengths for {count} references; give one for each")
    if not all(abs(value) < float("inf") for value in values):
        raise InvalidInputError(f"strengths must be finite numbers, got {values}")
    return values


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidInputError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
