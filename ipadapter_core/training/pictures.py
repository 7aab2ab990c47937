"""One picture on its way to the models: cut for its aspect bucket, seen by the image encoder."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from ..features import PixelSpec
from ..images.files import to_tensor
from ..images.preprocess import preprocess
from .config import DataConfig

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a target was cut: SDXL's time ids."""

    original: Size
    top_left: Size
    target: Size

    def time_ids(self) -> list[int]:
        return [*self.original, *self.top_left, *self.target]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def bucket_sizes(config: DataConfig) -> list[Size]:
    """The sizes targets are cut to: one square, or all steps of about the same area between 1:2 and 2:1."""
    side, step = config.resolution, config.bucket_step
    if not config.buckets:
        return [(side, side)]
    sizes: set[Size] = set()
    width = step
    while width <= 2 * side:
        height = int(side * side / width) // step * step
        if height >= step and 0.5 <= width / height <= 2:
            sizes |= {(height, width), (width, height)}
        width += step
    return sorted(sizes) or [(side, side)]


def bucket_for(size: Size, sizes: list[Size]) -> Size:
    """The bucket whose aspect ratio is nearest."""
    aspect = math.log(size[1] / size[0])
    return min(sizes, key=lambda s: (abs(math.log(s[1] / s[0]) - aspect), -s[0] * s[1]))


def cut_target(image: Image.Image, size: Size) -> tuple[Tensor, Cut]:
    """Resize to cover the bucket, cut its centre: pixels ``3 y x`` in -1..1 on white where the picture is transparent."""
    height, width = size
    original = (image.height, image.width)
    factor = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    resized = image.convert("RGB").resize(covering, Image.Resampling.BILINEAR)
    top, left = (covering[1] - height) // 2, (covering[0] - width) // 2
    pixels = to_tensor(resized.crop((left, top, left + width, top + height)))
    return pixels.permute(2, 0, 1) * 2 - 1, Cut(original, (top, left), size)


def reference_pixels(image: Image.Image, spec: PixelSpec, augment: float, seed: str) -> Tensor:
    """The encoder's pixel values ``3 y x`` of a reference, as inference makes them; augmented if asked."""
    if augment > 0:
        image = augmented(image, augment, random.Random(seed))
    return preprocess(to_tensor(image)[None], spec)[0]


def augmented(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """Another view of the same thing: part of it, mirrored, lighter or duller; ``strength`` 0..1 says how far."""
    share = 1 - 0.4 * strength * rng.random()
    width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height))
    if rng.random() < 0.5 * strength:
        image = ImageOps.mirror(image)
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    changed = image.convert("RGB")
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        changed = enhance(changed).enhance(1 + 0.3 * strength * rng.uniform(-1, 1))
    if alpha is not None:
        changed.putalpha(alpha)
    return changed
