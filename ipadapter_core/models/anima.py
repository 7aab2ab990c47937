"""Anima: the blocks of Cosmos-Predict2 behind a text encoder's adapter of its own, as its authors and ComfyUI (0.33) build it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .sites import BaseModel, ModelLayout, Site


def walk_anima(model: nn.Module) -> ModelLayout | None:
    """The layout of an Anima transformer; None for another model, also for Cosmos-Predict2, which has no ``llm_adapter``.

    Image prompts act beside the attention to the text of every block.
    """
    blocks: Any = getattr(model, "blocks", None)
    if not hasattr(model, "llm_adapter") or not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return None
    attentions: list[Any] = [getattr(block, "cross_attn", None) for block in blocks]
    if not all(hasattr(attention, "n_heads") and hasattr(attention, "output_proj") for attention in attentions):
        return None
    sites = (
        Site(f"blocks.{i}.cross_attn", "block", i, 0, i, int(attention.q_proj.out_features), int(attention.n_heads))
        for i, attention in enumerate(attentions)
    )
    return ModelLayout(ANIMA, int(attentions[0].k_proj.in_features), tuple(sites))


ANIMA = BaseModel(name="Anima", walk=walk_anima, reference_width=2048)
