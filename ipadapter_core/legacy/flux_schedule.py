"""The noise of every step as XLabs' sampler for FLUX.1 spaces it."""

from __future__ import annotations

import math

FEW, MANY = 256, 4096
"""Tokens of the picture at which the shift is known."""
SHIFTS = 0.5, 1.15


def flux_sigmas(steps: int, tokens: int) -> list[float]:
    """``steps + 1`` sigmas from 1 to 0, shifted for a picture of so many tokens (one for 16 x 16 pixels)."""
    low, high = SHIFTS
    shift = math.exp(low + (tokens - FEW) * (high - low) / (MANY - FEW))
    return [shift / (shift + steps / (steps - i) - 1) for i in range(steps)] + [0.0]


def sampled_sigmas(steps: int, tokens: int, denoise: float, image_strength: float | None) -> list[float]:
    """The sigmas that XlabsSampler runs through: ``denoise`` below 1 leaves the last ones out, and the noise in the picture.

    With a picture to start from, ``image_strength`` says how much of it stays: 0 all, 1 nothing.
    """
    sigmas = flux_sigmas(steps, tokens)
    if denoise <= 0.99:
        sigmas = sigmas[: int(len(sigmas) * denoise)]
    if image_strength is None or not sigmas:
        return sigmas
    kept = min(max(image_strength, 0.0), 1.0)
    return sigmas[min(int((1 - kept) * len(sigmas)), len(sigmas) - 1) :]
