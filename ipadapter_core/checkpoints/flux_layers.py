"""What all adapters for FLUX.1 have in common, whatever their projector and their formula."""

from __future__ import annotations

from .format import Format

TOKEN_DIM, CHANNELS = 4096, 3072
"""Width of the text's tokens (T5) and of the model."""

HEAD_DIM = 128
"""Channels of a head, of FLUX.1 and Chroma in any size; those of a width that it does not divide are one head."""


def heads_of(channels: int) -> int:
    """The number of heads that keys of so many channels have."""
    return channels // HEAD_DIM if channels % HEAD_DIM == 0 else 1


class FluxFormat(Format):
    """A family of adapters for FLUX.1. They fit Chroma too, for which nobody has trained any."""

    trained_on = frozenset({"Flux"})

    def base_model(self, token_dim: int, channels: tuple[int, ...]) -> str:
        return "FLUX" if (token_dim, {*channels}) == (TOKEN_DIM, {CHANNELS}) else f"custom {token_dim}"
