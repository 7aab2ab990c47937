"""Where image attention is added: the cross-attentions of a base model, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Block = Literal["input", "middle", "output"]


@dataclass(frozen=True, slots=True)
class CrossAttentionSite:
    """One cross-attention of a UNet, numbered as ComfyUI numbers its blocks.

    ``number`` is the index in ``input_blocks``/``output_blocks`` (0 for the middle), ``depth`` the transformer block
    inside its spatial transformer, ``transformer`` the spatial transformer in execution order (the ``t_idx`` of weight
    presets), ``checkpoint_index`` the position among the ``to_k_ip`` of a checkpoint (down, up, then middle).
    ``level`` counts the halvings of the latent's size. ``path`` is the attention's module path in its model.
    """

    block: Block
    number: int
    depth: int
    transformer: int
    checkpoint_index: int
    channels: int
    heads: int
    level: int
    single: bool
    path: str

    @property
    def label(self) -> str:
        """Short name for tables, such as ``input 4.1``."""
        return f"{self.block} {self.number}" if self.single else f"{self.block} {self.number}.{self.depth}"


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """A base model as its cross-attention sites in execution order; ``token_dim`` is the width of its text tokens."""

    name: str
    token_dim: int
    sites: tuple[CrossAttentionSite, ...]

    @property
    def transformers(self) -> int:
        """Number of spatial transformers: 16 for SD1.5, 11 for SDXL."""
        return len({site.transformer for site in self.sites})
