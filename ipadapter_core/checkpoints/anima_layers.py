"""What all adapters for Anima have in common."""

from __future__ import annotations

from .format import Format

LAYERS, CHANNELS = 28, 2048


class AnimaFormat(Format):
    """A family of adapters for Anima (Cosmos-Predict2 2B)."""

    def base_model(self, token_dim: int, channels: tuple[int, ...]) -> str:
        return "Anima" if channels == (CHANNELS,) * LAYERS else f"custom {token_dim}"
