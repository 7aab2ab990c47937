"""ComfyUI: the blocks of FLUX.1 and Chroma (comfy/ldm/flux/layers.py, the same modules in every version).

A double block norms the query of the picture's stream in ``img_attn.norm`` and projects its attention in ``img_attn.proj``. A
single block has text and picture in one sequence, text first; ``norm`` is around all queries, and ``linear2`` reads the
attention beside the MLP. Tokens of reference pictures (Kontext) follow the picture's own and stay as they are.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...attention.call import SiteCall
from ...attention.maths import inside
from ...models.reach import Reach
from ...models.sites import ModelLayout, Site
from .blocks import Add, Heard, Run, sound_norm


@dataclass(frozen=True, slots=True)
class FluxEntry:
    """A double or single block; ``name`` is its path."""

    name: str
    heads: int
    channels: int
    single: bool

    @property
    def heard(self) -> tuple[str, ...]:
        return (f"{self.name}.norm" if self.single else f"{self.name}.img_attn.norm",)

    @property
    def projection(self) -> str:
        return f"{self.name}.linear2" if self.single else f"{self.name}.img_attn.proj"

    @property
    def block(self) -> str:
        return self.name

    def site(self, heard: Sequence[Heard], reach: Reach, run: Run) -> SiteCall:
        norm, read, (q, _) = heard[0]
        weight = None
        if reach.query == "raw":
            weight = sound_norm(norm.query_norm)
            q = read[0] if weight is None else q
        part = self._part(q.shape[2], reach, run)
        q = q[:, :, part].transpose(1, 2).flatten(2)
        return SiteCall(run.call, q, self.heads, text=self._text(reach, run), query_norm=weight)

    def projected(self, value: Tensor, reach: Reach, run: Run, add: Add) -> Tensor:
        part = self._part(value.shape[1], reach, run)
        if not self.single:
            return self._inside(value, part, add)
        # The host has just joined attention and MLP in a tensor of its own, several times as wide as what changes.
        attention = value[:, part, : self.channels]
        attention.copy_(add(attention))
        return value

    def behind(self, value: Any, reach: Reach, run: Run, add: Add) -> Any:
        if self.single:
            return self._inside(value, self._part(value.shape[1], reach, run), add)
        picture, text = value
        return self._inside(picture, self._part(picture.shape[1], reach, run), add), text

    def _text(self, reach: Reach, run: Run) -> int:
        """How many tokens of text ask."""
        return run.text if self.single and reach.span == "all" else 0

    def _part(self, length: int, reach: Reach, run: Run) -> slice:
        """Those who ask, of a sequence."""
        text = run.text if self.single else 0
        return slice(text - self._text(reach, run), text + run.picture(length - text))

    @staticmethod
    def _inside(tokens: Tensor, part: slice, add: Add) -> Tensor:
        return add(tokens) if (part.start, part.stop) == (0, tokens.shape[1]) else inside(tokens, part, add)


class FluxBlocks:
    """What FLUX.1 and Chroma have in common."""

    def entry(self, site: Site) -> FluxEntry:
        single = site.group == "single"
        return FluxEntry(f"{site.group}_blocks.{site.number}", site.heads, site.channels, single)

    def texts(self, layout: ModelLayout) -> Iterator[tuple[str, Callable[[Any], int]]]:
        for site in layout.sites:
            if site.group == "double":
                yield self.entry(site).block, _text_behind

    def refusal(self, layout: ModelLayout, reach: Reach) -> str:
        if reach.query == "projected":
            return "the query of a UNet's cross-attention"
        if reach.gated:
            return "a gate in every block"
        return "the picture's own keys beside the image's" if reach.own_keys else ""


def _text_behind(output: tuple[Tensor, Tensor]) -> int:
    """Tokens of text behind a double block, which gives picture and text."""
    return output[1].shape[1]
