"""Which tokens the layers of a base model see: the picture's, the text's, both in one sequence, or none.

A base model's file says it by the paths of its layers, in both hosts' forms of the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from .grids import TokenRule

Sees = Literal["picture", "text, picture", "picture last", "text", "texts", "prompt"]
"""What of a call passes through a layer.

``picture``: the picture's tokens (or pixels), row by row, and behind them perhaps others: reference pictures, padding, text.
``text, picture``: those of the text in front, then as ``picture``.
``picture last``: any others in front, the picture's at the end, filled up to a multiple.
``text``: nothing of the picture: tokens of text, embeddings, modulations.
``texts``: the same, and the texts of all latents of the batch in one row.
``prompt``: the text as a cross-attention's keys and values, which can be other ones in every region.
"""


@dataclass(frozen=True, slots=True)
class Streams:
    """What every layer of a model sees. ``layers`` are patterns of paths, the first that fits counts; ``tokens`` lays out the picture.

    ``text`` is the path of a module whose output ``b l c`` has the text's tokens as sequences with ``text, picture`` have them.
    ``multiple`` is what sequences with the ``picture last`` are filled up to. ``again``: modulations of all latents may come a
    second time behind the first, for reference pictures.
    """

    tokens: TokenRule
    layers: tuple[tuple[str, Sees], ...]
    text: str = ""
    multiple: int = 1
    again: bool = False

    def of(self, path: str) -> Stream | None:
        """What the layer at a path sees; None if that is not known."""
        return next((Stream(sees, self) for pattern, sees in self.layers if _compiled(pattern).match(path)), None)


class Stream(NamedTuple):
    """What one layer sees, and what its model's streams are."""

    sees: Sees
    of: Streams


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
