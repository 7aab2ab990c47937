"""ComfyUI: the blocks of Anima (comfy/ldm/cosmos/predict2.py of 0.33; 0.3.64 has no Anima).

A block attends to itself, then in ``cross_attn`` to the text, where ``q_norm`` norms the queries, which stay unrotated, and
``output_proj`` reads the attention. Its tokens are ``b t y x c``. ``adaln_modulation_cross_attn`` reads the conditioning of
which adapters make their gates.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...attention.call import SiteCall
from ...models.reach import Reach
from ...models.sites import ModelLayout, Site
from .blocks import Add, Heard, Run, sound_norm


@dataclass(frozen=True, slots=True)
class AnimaEntry:
    """A block; ``name`` is its path."""

    name: str
    heads: int

    @property
    def heard(self) -> tuple[str, ...]:
        return f"{self.name}.adaln_modulation_cross_attn", f"{self.name}.cross_attn.q_norm"

    @property
    def projection(self) -> str:
        return f"{self.name}.cross_attn.output_proj"

    @property
    def block(self) -> str:
        return self.name

    def site(self, heard: Sequence[Heard], reach: Reach, run: Run) -> SiteCall:
        (_, (emb, *_), _), (norm, (raw, *_), q) = heard
        weight = sound_norm(norm) if reach.query == "raw" else None
        q = raw if reach.query == "raw" and weight is None else q
        return SiteCall(run.call, q.flatten(2), self.heads, query_norm=weight, emb=emb)

    def projected(self, value: Tensor, reach: Reach, run: Run, add: Add) -> Tensor:
        return add(value)

    def behind(self, value: Any, reach: Reach, run: Run, add: Add) -> Any:
        return add(value.flatten(1, 3)).view_as(value)


class AnimaBlocks:
    """Anima in ComfyUI."""

    def entry(self, site: Site) -> AnimaEntry:
        return AnimaEntry(f"blocks.{site.number}", site.heads)

    def texts(self, layout: ModelLayout) -> Iterable[tuple[str, Callable[[Any], int]]]:
        return ()

    def refusal(self, layout: ModelLayout, reach: Reach) -> str:
        if reach.query == "projected":
            return "the query of a UNet's cross-attention"
        return "the picture's own keys beside the image's" if reach.own_keys else ""
