"""Reference images to image tokens: encode, weigh, combine, project, and the unconditional counterpart.

Shapes: ``b`` latents (1: shared by all), ``k`` images whose tokens stand side by side, ``n`` image tokens, ``d`` token
dim; features are ``b k e`` (image_embeds) or ``b k t c`` (penultimate tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.batch import fit_batch
from ..checkpoints import AdapterSpec, AdapterWeights
from ..compatibility import CORRECT, Rules
from ..errors import IncompatibleEncoderError, InvalidInputError
from ..features import Crop, Encoded, ImageEncoder
from ..images.preprocess import preprocess, preprocess_as_host
from .needs import check_encoder

Combine = Literal["concat", "add", "subtract", "average", "norm average", "max", "min"]
Unconditional = Literal["auto", "zero_pixels", "zero_embeds", "black"]
MOST_TILES = 16
"""Of one picture; a longer strip would bury all other references, and the text."""


@dataclass(frozen=True, eq=False)  # no slots: baked K/V are kept per prompt by weak reference
class ImagePrompt:
    """Encoded references: image tokens with their unconditional counterpart, and the features they came from.

    ``cond`` and ``uncond`` are ``b n d``: b = 1 is shared by the whole batch, b > 1 holds one prompt per latent.
    They are ``token_dim`` wide once they are ready for an adapter's layers; Kolors FaceID's come wider and pass
    project_by_model() first.
    ``features`` and ``uncond_features`` are what they were projected from, ``b k ...``; ``neutral_features`` stand for
    no image at all and differ from ``uncond_features`` only where a negative image was given.
    ``spec`` is the adapter's that they were projected with, ``face_scale`` as in prompt_from_features().
    """

    cond: Tensor
    uncond: Tensor
    features: Tensor
    uncond_features: Tensor
    adapter: str
    encoder: str
    token_dim: int
    neutral_features: Tensor | None = None
    spec: AdapterSpec | None = None
    face_scale: float = 1.0


@torch.no_grad()
def encode_image_prompt(
    adapter: AdapterWeights,
    encoder: ImageEncoder,
    images: Tensor | Sequence[Tensor],
    *,
    masks: Tensor | Sequence[Tensor | None] | None = None,
    crop: Crop | Literal["tiles"] = "center",
    combine: Combine = "concat",
    strengths: Sequence[float] | None = None,
    negative: Tensor | None = None,
    unconditional: Unconditional = "auto",
    per_latent: bool = False,
    chunk: int = 8,
    progress: Callable[[int, int], None] | None = None,
    rules: Rules = CORRECT,
) -> ImagePrompt:
    """Encode reference images for ``adapter``; everything is checked before the encoder runs.

    Args:
        images: ``i h w c`` in 0..1, or a sequence of ``h w c`` or ``i h w c`` tensors of any sizes.
        masks: what of each image is seen, see preprocess(): ``i h w`` (or one for all images of one size), or a
            sequence with one ``h w`` tensor or None per image.
        crop: which square of each image is kept, see preprocess(). ``tiles`` keeps all of it: squares side by side along
            its long side (see square_tiles), each encoded alone. For concat and per_latent every tile keeps its own
            tokens; otherwise an image's tiles are averaged before images are combined. Tiles that a mask hides wholly
            are left out, except with per_latent.
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
        rules: see compatibility.Rules; those of the old pack know only ``center``.

    Raises IncompatibleEncoderError for an encoder the adapter was not trained with, InvalidInputError for bad values.
    """
    feature = adapter.spec.format.feature
    if feature.encoded is None or feature.embedding is not None:
        raise IncompatibleEncoderError(
            f"{adapter.name} is a {adapter.spec.family} adapter, which reads faces and not whole pictures; use the FaceID "
            "nodes (in Python: encode_face_prompt)"
        )
    check_encoder(adapter.spec, encoder)
    _check_option("combine", combine, get_args(Combine))
    _check_option("unconditional", unconditional, get_args(Unconditional))
    if chunk < 1:
        raise InvalidInputError(f"chunk is {chunk}; it must be at least 1")
    singles = _single_images(images)
    count = len(singles)
    strengths = _check_strengths(strengths, count)
    seen = list(zip(singles, _single_masks(masks, singles), strict=True))
    parts = [_tiles(*one, keep_hidden=per_latent) for one in seen] if crop == "tiles" else [[one] for one in seen]
    square: Crop = "center" if crop == "tiles" else crop
    pixels = [_pixels(image, encoder, square, mask, rules) for part in parts for image, mask in part]
    lengths = [len(part) for part in parts]
    total = sum(lengths)
    if per_latent and len(set(lengths)) > 1:
        raise InvalidInputError(
            f"the images of a latent each become {', '.join(map(str, lengths))} tiles; with per_latent they need as many each: "
            "give images of one shape"
        )

    rule = adapter.spec.unconditional if unconditional == "auto" else unconditional
    if unconditional == "auto" and rule == "zero_pixels" and rules.black_unconditional:
        rule = "black"
    negatives = _single_images(negative) if negative is not None else []
    if len(negatives) not in ((0, 1, count) if per_latent else (0, 1)):
        wanted = f"one or {count}" if per_latent else "one"
        raise InvalidInputError(f"got {len(negatives)} negative images; {wanted} can be used here")
    if rule != "zero_embeds":
        pixels.append(_unconditional_pixels(rule, encoder, pixels[0]))
    pixels += [_pixels(image, encoder, square, None, rules) for image in negatives]

    encoded = _encode(feature.encoded, encoder, pixels, chunk, progress)[:, None]  # k = 1
    neutral = torch.zeros_like(encoded[:1]) if rule == "zero_embeds" else encoded[total : total + 1]
    features = [
        _at_strength(feature, torch.zeros_like(neutral) if rules.features_scaled else neutral, strength)
        for feature, strength in zip(encoded[:total].split(lengths), strengths, strict=True)
    ]
    side_by_side = per_latent or combine == "concat"
    features = [f.transpose(0, 1) if side_by_side or len(f) == 1 else f.mean(0, keepdim=True) for f in features]
    return project_features(
        adapter,
        encoder.name,
        features=torch.cat(features) if per_latent else combine_features(features, combine, rules),
        uncond=encoded[-len(negatives) :] if negatives else neutral,
        neutral=neutral if negatives else None,
        chunk=chunk,
    )


@torch.no_grad()
def encode_features(
    feature: Encoded,
    encoder: ImageEncoder,
    images: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    rules: Rules = CORRECT,
    tiles: int = 1,
    tile_ratio: float = 1.0,
    chunk: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What ``encoder`` sees in each image, ``i ...`` in float32: the first half of encode_image_prompt().

    With ``tiles`` n > 1 every image is also cut into n x n parts that are encoded alone and put together again
    (see merge_tiles): of one image the result is [whole · tile_ratio, tiled], of several each is
    whole · tile_ratio + tiled · (1 - tile_ratio), as ComfyUI_IPAdapter_plus' ClipVision enhancer does.
    """
    singles = _single_images(images)
    masks = _single_masks(mask, singles)
    cut = 1 if tiles == 1 else tiles * tiles
    pixels = [_pixels(image, encoder, "center", m, rules) for image, m in zip(singles, masks, strict=True)]
    if tiles > 1:
        for image in singles:
            pixels += [_pixels(tile, encoder, "center", None, rules) for tile in split_tiles(image, tiles)]
    encoded = _encode(feature, encoder, pixels, chunk, progress)
    whole = encoded[: len(singles)]
    if tiles == 1:
        return whole
    tiled = torch.cat([merge_tiles(part) for part in encoded[len(singles) :].split(cut)])
    if len(singles) == 1:
        return torch.cat([whole * tile_ratio, tiled])
    return whole * tile_ratio + tiled * (1 - tile_ratio)


def unconditional_features(
    adapter: AdapterWeights, encoder: ImageEncoder | None, like: Tensor, rules: Rules = CORRECT
) -> Tensor:
    """What stands for no image beside features ``like`` (``i ...``): one entry ``1 ...``.

    Raises InvalidInputError where that takes an encoder and there is none.
    """
    if encoder is None and adapter.spec.unconditional != "zero_embeds":
        raise InvalidInputError(
            f"{adapter.name} needs the encoded picture of no image beside these embeds: connect the negative embeds of "
            "the encoder node, or a CLIP vision model"
        )
    if encoder is None or adapter.spec.unconditional == "zero_embeds":
        return torch.zeros_like(like[:1])
    check_encoder(adapter.spec, encoder)
    return adapter.spec.format.feature.without_face(no_image_features("penultimate", encoder, like, rules))


def no_image_features(feature: Encoded, encoder: ImageEncoder, like: Tensor, rules: Rules = CORRECT) -> Tensor:
    """What stands for no image beside features ``like`` (``i ...``) where no adapter tells: one entry ``1 ...``.

    Zeros for image_embeds; for penultimate tokens those of an encoded empty picture, as rules say which.
    """
    if feature == "image_embeds":
        return torch.zeros_like(like[:1])
    zeros = torch.zeros(1, 3, encoder.image_size, encoder.image_size)
    pixels = _unconditional_pixels("black" if rules.black_unconditional else "zero_pixels", encoder, zeros)
    return _encode("penultimate", encoder, [pixels], 1, None)


@torch.no_grad()
def prompt_from_features(
    adapter: AdapterWeights,
    features: Tensor,
    uncond: Tensor,
    *,
    neutral: Tensor | None = None,
    combine: Combine = "concat",
    per_latent: bool = False,
    chunk: int = 8,
    encoder: str = "saved embeds",
    rules: Rules = CORRECT,
    face_scale: float = 1.0,
) -> ImagePrompt:
    """The second half of encode_image_prompt(): features ``i ...`` and those of no image ``1|i ...`` to a prompt.

    ``neutral`` ``1 ...`` stands for no image where ``uncond`` is a negative one. ``face_scale`` is how much FaceID Plus v2
    reads in the picture beside the face embedding.

    Raises IncompatibleEncoderError for features of another encoder.
    """
    _check_option("combine", combine, get_args(Combine))
    feature = adapter.spec.format.feature
    for name, tensor in (("embeds", features), ("negative embeds", uncond)):
        if tensor.ndim != feature.rank or tensor.shape[-1] != adapter.spec.feature_dim or len(tensor) == 0:
            shape = feature.shape(adapter.spec.feature_dim)
            raise IncompatibleEncoderError(
                f"the {name} have shape {tuple(tensor.shape)}, but {adapter.name} reads {adapter.spec.feature} of shape "
                f"({', '.join(map(str, shape))}); make them with this adapter and the encoder {adapter.spec.encoder}"
            )
    uncond = fit_batch(uncond, len(features)).to(features)
    if per_latent:
        both = features[:, None], uncond[:, None]
    elif combine == "concat" or len(features) == 1:
        both = features[None], uncond[None]
    else:
        both = combine_features([f[None] for f in features.split(1)], combine, rules), uncond[None, :1]
    none = None if neutral is None else neutral[None, :1].to(features)
    return project_features(
        adapter, encoder, features=both[0], uncond=both[1], neutral=none, chunk=chunk, face_scale=face_scale
    )


def square_tiles(image: Tensor) -> list[tuple[slice, slice]]:
    """Rows and columns of squares that together cover ``1 h w c``, evenly spread along its long side; they overlap.

    A tenth of a square more than fits is cut off instead. Raises InvalidInputError for more than MOST_TILES.
    """
    h, w = image.shape[1:3]
    side, long = min(h, w), max(h, w)
    count = max(1, math.ceil(long / max(side, 1) - 0.1))
    if count > MOST_TILES:
        raise InvalidInputError(
            f"a reference of {w}x{h} would become {count} tiles, at most {MOST_TILES} are made; cut it before"
        )
    spare = long - side
    starts = [round(spare * i / (count - 1)) for i in range(count)] if count > 1 else [spare // 2]
    short = slice(0, side)
    spans = [slice(start, start + side) for start in starts]
    return [(span, short) if h > w else (short, span) for span in spans]


def _tiles(image: Tensor, mask: Tensor | None, *, keep_hidden: bool) -> list[tuple[Tensor, Tensor | None]]:
    """A picture ``1 h w c`` and its mask cut into square_tiles(); those that the mask hides only where asked for."""
    if image.ndim != 4 or 0 in image.shape or (mask is not None and mask.shape[-2:] != image.shape[1:3]):
        return [(image, mask)]  # preprocess() says what is wrong with it
    cut = [
        (image[:, rows, columns], None if mask is None else mask[..., rows, columns])
        for rows, columns in square_tiles(image)
    ]
    seen = [part for part in cut if part[1] is None or bool(part[1].any())]
    return cut if keep_hidden or not seen else seen


def split_tiles(image: Tensor, count: int) -> list[Tensor]:
    """``1 h w c`` in count x count parts, row by row; what division leaves over at the right and bottom is dropped."""
    h, w = (max(1, side // count) for side in image.shape[1:3])
    return [image[:, y * h : (y + 1) * h, x * w : (x + 1) * w] for y in range(count) for x in range(count)]


def merge_tiles(features: Tensor) -> Tensor:
    """Features of n x n parts of one image to one feature of the size that the whole image has, ``1 ...``.

    Tokens are laid out as the picture they are, stitched and averaged down again; the class token is the parts' mean.
    A pooled embedding ``e`` is treated as a square picture of numbers where e is a square, and averaged where it is not
    (ComfyUI_IPAdapter_plus stops there with an error).
    """
    grid = round(len(features) ** 0.5)
    if features.ndim == 2:
        side = round(features.shape[1] ** 0.5)
        if side * side != features.shape[1]:
            return features.mean(0, keepdim=True)
        return _stitch(features[..., None], grid, side)[..., 0]
    side = round((features.shape[1] - 1) ** 0.5)
    if side * side != features.shape[1] - 1:
        raise IncompatibleEncoderError(
            f"the encoder gives {features.shape[1]} tokens, which are no square picture and a class token; tiles need that"
        )
    return torch.cat([features[:, :1].mean(0, keepdim=True), _stitch(features[:, 1:], grid, side)], 1)


def _stitch(tokens: Tensor, grid: int, side: int) -> Tensor:
    """Tokens ``(grid grid) (side side) c`` of a picture's parts, averaged to ``1 (side side) c`` of the whole."""
    parts = tokens.unflatten(0, (grid, grid)).unflatten(2, (side, side))
    whole = parts.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # c (grid side) (grid side)
    return F.adaptive_avg_pool2d(whole, (side, side)).flatten(1).T[None]


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
    rank = spec.format.feature.rank + 1
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
    if any(prompt.face_scale != first.face_scale for prompt in prompts):
        scales = ", ".join(f"{prompt.face_scale:g}" for prompt in prompts)
        raise InvalidInputError(
            f"the prompts read in the pictures of their faces with strengths {scales}; one prompt has one picture_strength, "
            "encode them with the same"
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
    return project_features(
        adapter, first.encoder, features=combined, uncond=uncond, neutral=neutral, face_scale=first.face_scale
    )


def combine_features(features: Sequence[Tensor], combine: Combine, rules: Rules = CORRECT) -> Tensor:
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
        case "norm average" if rules.norm_average_over_images:
            return (stack / torch.linalg.vector_norm(stack, dim=0, keepdim=True)).mean(0)
        case "norm average":
            norm = torch.linalg.vector_norm(stack, dim=-1, keepdim=True)
            return (stack / norm.clamp(min=1e-12)).mean(0) * norm.mean(0)
        case "max":
            return stack.amax(0)
        case "min":
            return stack.amin(0)


def _at_strength(features: Tensor, neutral: Tensor, strength: float) -> Tensor:
    return features if strength == 1 else neutral.to(features.device) * (1 - strength) + features * strength


def _pixels(image: Tensor, encoder: ImageEncoder, crop: Crop, mask: Tensor | None, rules: Rules) -> Tensor:
    if rules.host_pixels:
        return preprocess_as_host(image, encoder, mask=mask)
    return preprocess(image, encoder, crop=crop, mask=mask)


def _encode(
    feature: Encoded,
    encoder: ImageEncoder,
    pixels: list[Tensor],
    chunk: int,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """The adapter's feature of each image, ``i ...`` in float32 (sums of fp16 features could overflow)."""
    parts: list[Tensor] = []
    for start in range(0, len(pixels), chunk):
        group = [p.to(pixels[0].device) for p in pixels[start : start + chunk]]
        parts.append(encoder.encode(torch.cat(group)).get(feature).float())
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


def project_features(
    adapter: AdapterWeights,
    encoder: str,
    *,
    features: Tensor,
    uncond: Tensor,
    neutral: Tensor | None,
    chunk: int = 8,
    face_scale: float = 1.0,
) -> ImagePrompt:
    """The prompt of ``features`` ``b k ...``; uncond and neutral may have b or k = 1 and are spread."""
    b, k = features.shape[:2]
    cond_tokens = _tokens(adapter, features, chunk, face_scale)
    uncond_tokens = _tokens(adapter, uncond, chunk, face_scale)
    return ImagePrompt(
        cond=cond_tokens.flatten(1, 2),
        uncond=uncond_tokens.expand(b, k, *uncond_tokens.shape[2:]).flatten(1, 2).contiguous(),
        features=features,
        uncond_features=uncond.expand(b, k, *uncond.shape[2:]),
        adapter=adapter.name,
        encoder=encoder,
        token_dim=adapter.spec.token_dim,
        neutral_features=None if neutral is None else neutral.expand(b, k, *neutral.shape[2:]),
        spec=adapter.spec,
        face_scale=face_scale,
    )


def _tokens(adapter: AdapterWeights, features: Tensor, chunk: int, face_scale: float) -> Tensor:
    """Features ``b k ...`` to tokens ``b k n d``, ``chunk`` images at a time."""
    weight = next(adapter.module.projector.parameters())
    parts = features.flatten(0, 1).to(weight.device, weight.dtype).split(chunk)
    flat = torch.cat([adapter.tokens(part, face_scale) for part in parts])
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
