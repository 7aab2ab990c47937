"""An image prompt: features ``b k ...`` of references, and the tokens ``b n d`` that an adapter projects them to.

Shapes: ``b`` latents (1: shared by all), ``k`` images whose tokens stand side by side, ``n`` image tokens, ``d`` token
dim; features are ``b k e`` (image_embeds) or ``b k t c`` (penultimate tokens).
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checkpoints import AdapterSpec, AdapterWeights

NegativeBranch = Literal["tokens", "same", "off"]
"""What the negative branch of guidance gets: tokens of its own, the same as the positive one, or nothing at all."""


@dataclass(frozen=True, eq=False)  # no slots: baked K/V are kept per prompt by weak reference
class ImagePrompt:
    """Encoded references: image tokens with their unconditional counterpart, and the features they came from.

    ``cond`` and ``uncond`` are ``b n d``: b = 1 is shared by the whole batch, b > 1 holds one prompt per latent.
    They are ``token_dim`` wide once they are ready for an adapter's layers; Kolors FaceID's come wider and pass
    project_by_model() first.
    ``features`` and ``uncond_features`` are what they were projected from, ``b k ...``; ``neutral_features`` stand for
    no image at all and differ from ``uncond_features`` only where a negative image was given.
    ``spec`` is the adapter's that they were projected with, ``face_scale`` as in EncodeOptions. Where ``negative_branch`` is
    "same", uncond is cond; where it is "off", uncond is zeros, and the image's values of that branch must be too.
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
    negative_branch: NegativeBranch = "tokens"


def project_features(
    adapter: AdapterWeights,
    encoder: str,
    *,
    features: Tensor,
    uncond: Tensor,
    neutral: Tensor | None,
    chunk: int = 8,
    face_scale: float = 1.0,
    negative_branch: NegativeBranch = "tokens",
) -> ImagePrompt:
    """The prompt of ``features`` ``b k ...``; uncond and neutral may have b or k = 1 and are spread.

    Where the negative branch gets no tokens of its own, ``uncond`` is the feature that stands for no image.
    """
    b, k = features.shape[:2]
    cond_tokens = _tokens(adapter, features, chunk, face_scale)
    if negative_branch == "same":
        neutral, uncond, uncond_tokens = uncond if neutral is None else neutral, features, cond_tokens
    elif negative_branch == "off":
        uncond_tokens = torch.zeros_like(cond_tokens)
    else:
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
        negative_branch=negative_branch,
    )


def _tokens(adapter: AdapterWeights, features: Tensor, chunk: int, face_scale: float) -> Tensor:
    """Features ``b k ...`` to tokens ``b k n d``, ``chunk`` images at a time."""
    parts = features.flatten(0, 1).to(adapter.device, adapter.dtype).split(chunk)
    flat = torch.cat([adapter.tokens(part, face_scale) for part in parts])
    return flat.unflatten(0, features.shape[:2])
