"""What image encoders give: the published encoders, and the kinds of features with their ranks and widths.

A host's own encoder (ComfyUI's CLIP_VISION) takes part by offering the few members of ImageEncoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

if TYPE_CHECKING:
    pass


Rgb = tuple[float, float, float]


Feature = Literal["image_embeds", "penultimate", "face", "face_tokens"]


FEATURE_RANKS: dict[Feature, int] = {"image_embeds": 2, "penultimate": 3, "face": 2, "face_tokens": 3}
"""Axes of each feature, images first. ``face`` is a face model's embedding, ``face_tokens`` that one packed before the
penultimate tokens of the aligned face (projectors.pack_face)."""


Crop = Literal["center", "top", "bottom", "left", "right", "pad", "stretch"]


CLIP_MEAN: Rgb = (0.48145466, 0.4578275, 0.40821073)


CLIP_STD: Rgb = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A published image encoder: its widths, what its pixels must look like, and the file names people have."""

    name: str
    hidden_size: int
    projection_dim: int
    tokens: int
    image_size: int
    mean: Rgb
    std: Rgb
    files: tuple[str, ...]

    def width(self, feature: Feature) -> int:
        """Length of one feature vector: of image_embeds, or of each penultimate token."""
        return self.projection_dim if feature == "image_embeds" else self.hidden_size


ENCODERS: dict[str, EncoderSpec] = {
    spec.name: spec
    for spec in (
        EncoderSpec("ViT-H/14", 1280, 1024, 257, 224, CLIP_MEAN, CLIP_STD, (
            "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", "models/image_encoder of h94/IP-Adapter",
            "InvokeAI/ip_adapter_sd_image_encoder",
        )),
        EncoderSpec("ViT-bigG/14", 1664, 1280, 257, 224, CLIP_MEAN, CLIP_STD, (
            "CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors", "sdxl_models/image_encoder of h94/IP-Adapter",
        )),
        EncoderSpec("ViT-L/14", 1024, 768, 257, 224, CLIP_MEAN, CLIP_STD, (
            "openai/clip-vit-large-patch14", "InvokeAI/clip-vit-large-patch14",
        )),
        EncoderSpec("ViT-L/14-336", 1024, 768, 577, 336, CLIP_MEAN, CLIP_STD, (
            "clip-vit-large-patch14-336.bin (Kolors)", "openai/clip-vit-large-patch14-336",
        )),
        EncoderSpec("SigLIP so400m/14-384", 1152, 1152, 729, 384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (
            "sigclip_vision_patch14_384.safetensors", "google/siglip-so400m-patch14-384",
        )),
    )
}  # fmt: skip


def find_encoder(feature: Feature, width: int) -> EncoderSpec | None:
    """The first encoder of the table whose ``feature`` is ``width`` long; None if there is none."""
    return next((spec for spec in ENCODERS.values() if spec.width(feature) == width), None)


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What an encoder sees: ``image_embeds`` ``b e`` and ``penultimate`` ``b t c``.

    ``penultimate`` is the output of the last layer but one (``hidden_states[-2]``), without a final norm.
    """

    image_embeds: Tensor
    penultimate: Tensor

    def get(self, feature: Feature) -> Tensor:
        return self.image_embeds if feature == "image_embeds" else self.penultimate


class ImageEncoder(Protocol):
    """What the core asks of an image encoder, wherever it runs."""

    @property
    def name(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def projection_dim(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def mean(self) -> Rgb: ...
    @property
    def std(self) -> Rgb: ...

    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        """Normalised pixels ``b 3 y x`` of side image_size to features; moves them to its own device and dtype."""
        ...
