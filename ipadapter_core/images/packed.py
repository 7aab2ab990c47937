"""Several image encoders that look at one picture at two sizes, as one: the features of InstantCharacter."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..features import Encoded, Feature, Framing, ImageEncoder, ImageFeatures, PixelSpec
from .preprocess import preprocess

PARTS = 2
"""On each side, into which the larger picture is cut."""


class StateEncoder(ImageEncoder, Protocol):
    """An image encoder that also gives what its inner layers see."""

    def states(self, pixel_values: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, dict[int, Tensor]]:
        """The last hidden state ``b t c``, and the outputs of ``layers`` (1: of the first), without a final norm."""
        ...


class PackedEncoder:
    """The encoders that a packed feature looks through, in the order of its ``looks``, as ImageEncoder.

    Its pixel values are ``b 5 3 y x``, normalised as the first encoder's: the picture, and the four quarters of it at twice the
    size. What it gives is ``b t c``: tokens [last of the picture | layers of the picture, one after the other | last of the
    quarters], channels those of the encoders side by side.
    """

    projection_dim = 0
    gives: tuple[Encoded, ...] = ("packed",)

    def __init__(self, feature: Feature, encoders: Sequence[StateEncoder]):
        self.looks, self.encoders = feature.looks, tuple(encoders)
        self.image_size = feature.looks[0].side
        self.mean, self.std = encoders[0].mean, encoders[0].std
        self.hidden_size = sum(encoder.hidden_size for encoder in encoders)
        self.name = " + ".join(encoder.name for encoder in encoders)

    def pixels(self, image: Tensor, framing: Framing, mask: Tensor | None) -> Tensor:
        """The pixel values ``b 5 3 y x`` of pictures ``b h w c``."""
        low, high = (
            preprocess(image, PixelSpec(self.image_size * n, self.mean, self.std), crop=framing, mask=mask)
            for n in (1, PARTS)
        )
        rows = high.unflatten(-1, (PARTS, -1)).unflatten(-3, (PARTS, -1))  # b 3 rows y columns x
        return torch.cat([low[:, None], rows.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)], 1)

    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        """Pixel values ``b 5 3 y x`` to ``packed``."""
        packed = torch.cat([self._packed(picture) for picture in pixel_values])
        return ImageFeatures(packed[:, 0, :0], packed, packed=packed)

    def _packed(self, parts: Tensor) -> Tensor:
        """One picture's ``5 3 y x`` to ``1 t c``."""
        seen: list[Tensor] = []
        for look, encoder in zip(self.looks, self.encoders, strict=True):
            pixels = self._normalised(parts, encoder)
            low, layers = encoder.states(pixels[:1], look.layers)
            high, _ = encoder.states(pixels[1:], ())
            tokens = [low, *(layers[number] for number in look.layers), *high.split(1)]
            seen.append(torch.cat([t[:, look.skip :].float() for t in tokens], 1))
        return torch.cat(seen, -1)

    def _normalised(self, pixels: Tensor, encoder: ImageEncoder) -> Tensor:
        if (encoder.mean, encoder.std) == (self.mean, self.std):
            return pixels
        mean, std, own_mean, own_std = (
            torch.tensor(value, device=pixels.device).view(3, 1, 1)
            for value in (self.mean, self.std, encoder.mean, encoder.std)
        )
        return (pixels * std + mean - own_mean) / own_std
