"""ComfyUI: the blocks of SD3 and SD3.5 (comfy/ldm/modules/diffusionmodules/mmdit.py, the same modules in every version).

The picture's stream of a block has an attention of its own name: ``ln_q`` and ``ln_k`` norm its queries and keys, ``qkv`` makes
them and the values, and ``proj`` reads what the attention of text and picture together gives the picture. SD3.5 Medium's
second attention, ``attn2``, is another module and is not heard.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...attention.call import SiteCall
from ...attention.maths import inside
from ...models.reach import Reach
from ...models.sites import ModelLayout, Site
from .blocks import Add, Heard, Run, sound_norm


@dataclass(frozen=True, slots=True)
class SD3Entry:
    """A joint block; ``attention`` is the path of its picture's."""

    attention: str
    heads: int

    @property
    def heard(self) -> tuple[str, ...]:
        return tuple(f"{self.attention}.{name}" for name in ("qkv", "ln_q", "ln_k"))

    @property
    def projection(self) -> str:
        return f"{self.attention}.proj"

    @property
    def block(self) -> str:
        return self.attention.rpartition(".x_block.")[0]

    def site(self, heard: Sequence[Heard], reach: Reach, run: Run) -> SiteCall:
        (_, _, qkv), of_queries, of_keys = heard
        tokens = slice(0, run.picture(qkv.shape[1]))
        q, query_norm = _normed(of_queries, tokens, undone=reach.query == "raw")
        at = SiteCall(run.call, q, self.heads, query_norm=query_norm)
        if reach.own_keys:
            at.k, at.key_norm = _normed(of_keys, tokens, undone=True)
            at.v = qkv[:, tokens, 2 * (qkv.shape[-1] // 3) :]
        return at

    def projected(self, value: Tensor, reach: Reach, run: Run, add: Add) -> Tensor:
        picture = run.picture(value.shape[1])
        return add(value) if picture == value.shape[1] else inside(value, slice(0, picture), add)

    def behind(self, value: Any, reach: Reach, run: Run, add: Add) -> Any:
        text, picture = value
        return text, self.projected(picture, reach, run, add)


def _normed(heard: Heard, tokens: slice, *, undone: bool) -> tuple[Tensor, Tensor | None]:
    """Queries or keys ``b l c`` behind their norm with its weight, or in front of it without, where that cannot be undone."""
    norm, (before, *_), after = heard
    weight = sound_norm(norm) if undone else None
    plain = undone and weight is None
    return (before if plain else after)[:, tokens].flatten(2), weight


class SD3Blocks:
    """What SD3 and SD3.5 have in common."""

    def entry(self, site: Site) -> SD3Entry:
        return SD3Entry(site.path, site.heads)

    def texts(self, layout: ModelLayout) -> Iterable[tuple[str, Callable[[Any], int]]]:
        return ()

    def refusal(self, layout: ModelLayout, reach: Reach) -> str:
        if reach.query == "projected":
            return "the query of a UNet's cross-attention"
        return "a gate in every block" if reach.gated else ""
