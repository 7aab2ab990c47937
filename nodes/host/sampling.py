"""ComfyUI's own Euler sampler, by sigmas of an old node's."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import latent_preview
import torch
from torch import Tensor


def sample_guided_from(
    model: Any,
    positive: Any,
    negative: Any,
    latent: Tensor,
    seed: int,
    sigmas: list[float],
    first: int,
    guidance: float,
) -> Tensor:
    """A latent ``b c h w`` after these sigmas: without guidance up to the step ``first``, then with ``guidance``.

    Where the last sigma is not 0 the noise that it stands for stays in the latent.
    """
    x = comfy.sample.fix_empty_latent_channels(model, latent)
    if len(sigmas) < 2:
        return x
    noise, sampler = comfy.sample.prepare_noise(x, seed), comfy.samplers.sampler_object("euler")
    steps = torch.tensor(sigmas)
    for part, cfg in ((steps[: first + 1], 1.0), (steps[first:], guidance)):
        if len(part) > 1:
            shown = latent_preview.prepare_callback(model, len(part) - 1)
            x = comfy.sample.sample_custom(
                model, noise, cfg, sampler, part, positive, negative, x, callback=shown, seed=seed
            )
            noise = torch.zeros_like(noise)  # what the part before left is in the latent
    if sigmas[-1] > 0:
        x = model.model.process_latent_out(model.model.process_latent_in(x) * (1 - sigmas[-1]))
    return x
