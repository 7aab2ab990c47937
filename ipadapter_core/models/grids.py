"""How a base model lays a latent out as tokens: rows, columns, and which latents each token covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

Size = tuple[int, int]
"""Height and width."""


class TokenGrid(NamedTuple):
    """The image tokens of one site in the picture's order; each covers ``cell`` by ``cell`` latents, the last ones what is left."""

    rows: int
    columns: int
    cell: int


class TokenRule(Protocol):
    """What a base model says of its tokens."""

    def grid(self, latent: Size, tokens: int, shape: Size | None = None) -> TokenGrid | None:
        """The grid of a site that sees a latent and has this many tokens; None if it can have no such number.

        ``shape`` are rows and columns where the host tells them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Pyramid:
    """A UNet: stride-2 convolutions halve the latent and round up, so level n has ceil(size / 2**n) rows and columns."""

    def grid(self, latent: Size, tokens: int, shape: Size | None = None) -> TokenGrid | None:
        """The level with this many tokens; with a shape that is no level (deep shrink), cells of the last level above it."""
        (height, width), cell = latent, 1
        if shape is not None and shape[0] * shape[1] != tokens:
            return None
        while (height, width) != shape if shape is not None else height * width != tokens:
            half = -(-height // 2), -(-width // 2)
            if half == (height, width) or (shape is not None and (half[0] < shape[0] or half[1] < shape[1])):
                break
            (height, width), cell = half, 2 * cell
        if shape is not None:
            return TokenGrid(*shape, cell)
        return TokenGrid(height, width, cell) if height * width == tokens else None


@dataclass(frozen=True, slots=True)
class Patches:
    """A transformer: one token for ``size`` by ``size`` latents. More tokens than that are reference pictures behind them."""

    size: int = 2

    def grid(self, latent: Size, tokens: int, shape: Size | None = None) -> TokenGrid | None:
        """The one grid of a latent, whatever the host tells; None if the site has fewer tokens."""
        rows, columns = (-(-side // self.size) for side in latent)
        return TokenGrid(rows, columns, self.size) if rows * columns <= tokens else None
