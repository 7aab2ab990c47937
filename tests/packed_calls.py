"""A batch of packed latents, 3 by 5 tokens, and the call of a Flux or Chroma transformer of diffusers as pipelines make it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ipadapter_core.backends.calls import uncompiled
from tiny_flux import TEXT_DIM
from tiny_models import noise

ROWS, COLUMNS, TEXT, BATCH = 3, 5, 7, 4


def places(rows: int, columns: int, which: float = 0.0) -> Tensor:
    ids = torch.full((rows, columns, 3), which)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return ids.flatten(0, 1)


X, PROMPT = noise(BATCH, ROWS * COLUMNS, 16, seed=3), noise(BATCH, TEXT, TEXT_DIM, seed=4)


def call(model: Any, x: Tensor = X, text: Tensor = PROMPT, t: float = 0.5, ids: Tensor | None = None, **more: Any) -> Tensor:  # fmt: skip
    """One call as pipelines make it; ``t`` is sigma."""
    if isinstance(uncompiled(model), FluxTransformer2DModel):
        more |= {
            "pooled_projections": noise(1, 24, seed=5).expand(len(x), -1).to(x.dtype),
            "guidance": torch.full((len(x),), 3.5),
        }
    with torch.set_grad_enabled(x.requires_grad):
        return model(
            hidden_states=x,
            encoder_hidden_states=text,
            timestep=torch.full((len(x),), t).to(x.dtype),
            img_ids=places(ROWS, COLUMNS) if ids is None else ids,
            txt_ids=torch.zeros(text.shape[1], 3),
            **more,
        ).sample
