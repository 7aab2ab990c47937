"""Several references to one: features at their strengths, combined; and prompts that were encoded apart."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..checkpoints import AdapterWeights
from ..compatibility import CORRECT, Rules
from ..errors import IncompatibleEncoderError, InvalidInputError
from .image_prompt import ImagePrompt, project_features

Combine = Literal["concat", "add", "subtract", "average", "norm average", "max", "min"]


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
    number per prompt. Except for concat, which keeps each prompt's own, the unconditional is the first prompt's; where some
    prompts of a concat have a negative image and others' negative branch sees the same image or nothing, theirs is the image's
    feature or that of no image. A
    prompt of one image per latent combines with shared ones and with prompts of as many latents; all but concat
    combine image by image where a prompt holds several side by side.

    Raises InvalidInputError and IncompatibleEncoderError for prompts that do not fit together or the adapter.
    """
    check_choice("combine", combine, get_args(Combine))
    if not prompts:
        raise InvalidInputError("there are no image prompts to combine; give at least one")
    strengths = check_strengths(strengths, len(prompts))
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
    tokens = {prompt.features.shape[2:-1] for prompt in prompts}
    if len(tokens) > 1:
        raise InvalidInputError(
            f"the prompts hold pictures of {' and '.join(str(*shape) for shape in sorted(tokens))} tokens, as {first.encoder} sees pictures "
            "of different shapes: encode them together, in one node"
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
        features.append(spread(at_strength(prompt.features, neutral, strength)))
        unconds.append(spread(prompt.uncond_features))
        neutrals.append(spread(neutral))
    combined = combine_features(features, combine)
    concat = combine == "concat"
    uncond = torch.cat(unconds, 1) if concat else unconds[0]
    has_negative = any(prompt.neutral_features is not None for prompt in prompts)
    neutral = (torch.cat(neutrals, 1) if concat else neutrals[0]) if has_negative else None
    agreed = not concat or all(prompt.negative_branch == first.negative_branch for prompt in prompts)
    return project_features(
        adapter,
        first.encoder,
        features=combined,
        uncond=uncond,
        neutral=neutral,
        face_scale=first.face_scale,
        negative_branch=first.negative_branch if agreed else "tokens",
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


def at_strength(features: Tensor, neutral: Tensor, strength: float, rules: Rules = CORRECT) -> Tensor:
    """Features moved on the line from no image to the image: neutral + strength · (features − neutral).

    0 is no image, 1 changes no bit, more exaggerates, below 0 turns it around. Under Rules.features_scaled the line starts at 0.
    """
    if strength == 1:
        return features
    if rules.features_scaled:
        return features * strength
    return neutral.to(features.device) * (1 - strength) + features * strength


def check_strengths(strengths: Sequence[float] | None, count: int) -> list[float]:
    if strengths is None:
        return [1.0] * count
    values = [float(value) for value in strengths]
    if len(values) != count:
        raise InvalidInputError(f"got {len(values)} strengths for {count} references; give one for each")
    if not all(abs(value) < float("inf") for value in values):
        raise InvalidInputError(f"strengths must be finite numbers, got {values}")
    return values


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise InvalidInputError for a value that is not allowed."""
    if value not in allowed:
        raise InvalidInputError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
