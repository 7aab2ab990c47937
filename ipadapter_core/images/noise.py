"""Pictures that stand for no image: noise in several kinds, and disturbed references."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidInputError
from .preprocess import center_square
from .tiles import SIDE, check_pictures

Noise = Literal["fade", "dissolve", "gaussian", "shuffle"]


def noise_picture(kind: Noise, strength: float, blur: int = 0, images: Tensor | None = None) -> Tensor:
    """Noise, or ``images`` disturbed by it, ``b 224 224 c``: something to steer away from.

    The seed comes from the picture, so the same picture always gives the same noise.
    """
    if kind not in get_args(Noise):
        raise InvalidInputError(f"the noise is {kind!r}; choose one of: {', '.join(get_args(Noise))}")
    if images is None:
        picture = torch.zeros(1, SIDE, SIDE, 3)
    else:
        check_pictures(images)
        picture = _resize_square(images).movedim(1, -1)
    # in float32, summed as it lies in memory: the seed is part of the picture
    generator = torch.Generator().manual_seed(int(torch.sum(picture).item()) % 1000000007)

    def uniform() -> Tensor:
        return torch.empty_like(picture).uniform_(generator=generator)

    match kind:
        case "fade":
            result = picture * (1 - strength) + uniform() * strength
        case "dissolve":
            chosen = (uniform() < strength).float()
            result = picture * (1 - chosen) + uniform() * chosen
        case "gaussian":
            result = picture + torch.empty_like(picture).normal_(generator=generator) * strength
        case "shuffle":
            shuffled = _shuffled(picture.movedim(-1, 1), 3.5 * (1 - strength), generator).movedim(1, -1)
            noise = torch.empty_like(shuffled).normal_(generator=generator) * (strength * 0.75)
            result = shuffled * (1 - noise) + noise
    result = result.clamp(0, 1)
    if blur > 0:
        size = blur + (blur % 2 == 0)
        result = _gaussian_blur(result.movedim(-1, 1), size, size * 0.15 + 0.35).movedim(1, -1)
    return result


def negative_picture(images: Tensor, noise: float) -> Tensor:
    """A shuffled, noisy version of the references to steer away from (the ``noise`` input of the first nodes)."""
    check_pictures(images)
    generator = torch.Generator().manual_seed(0)
    shuffled = _shuffled(_resize_square(images), 3.5 * noise, generator).movedim(1, -1)
    noisy = shuffled + (0.25 * (1 - noise) + 0.05) * torch.empty_like(shuffled).normal_(generator=generator)
    return noisy.clamp(0, 1)  # as ComfyUI clips what an encoder is given


def _resize_square(images: Tensor) -> Tensor:
    square = center_square(images.detach().to("cpu", torch.float32).movedim(-1, 1))
    resized = F.interpolate(square, (SIDE, SIDE), mode="bicubic", antialias=True)
    # torchvision gives one single wide picture another memory layout, and with it the order of the random numbers
    apart = len(images) == 1 and images.shape[2] > images.shape[1] != SIDE
    return resized.contiguous() if apart else resized


def _shuffled(pixels: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Pixels displaced at random by up to 75, smoothly for a large sigma, then turned by 180 degrees."""
    h, w = pixels.shape[-2:]
    steps: list[Tensor] = []
    for extent in (w, h):
        step = torch.rand(1, 1, h, w, generator=generator) * 2 - 1
        if sigma > 0:
            step = _gaussian_blur(step, int(8 * sigma + 1) // 2 * 2 + 1, sigma)
        steps.append(step * 75.0 / extent)
    torch.rand(2, generator=generator)  # two coins, both of which always decide for a flip
    x, y = (torch.linspace((1 - n) / n, (n - 1) / n, n) for n in (w, h))
    identity = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1)
    grid = (identity + torch.cat(steps, 1).movedim(1, -1)).expand(len(pixels), -1, -1, -1)
    seen = F.grid_sample(torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1), grid, align_corners=False)
    return (seen[:, :-1] * seen[:, -1:]).flip(-2).flip(-1)


def _gaussian_blur(pixels: Tensor, size: int, sigma: float) -> Tensor:
    reach = (size - 1) / (2 * math.sqrt(2))
    kernel = torch.softmax(-((torch.linspace(-reach, reach, size) / sigma) ** 2), 0)
    channels = pixels.shape[1]
    weight = (kernel[:, None] * kernel).expand(channels, 1, size, size)
    half = size // 2
    return F.conv2d(F.pad(pixels, (half, half, half, half), mode="reflect"), weight, groups=channels)
