"""What image encoders give: the published encoders, and the kinds of features with their ranks and widths.

A host's own encoder (ComfyUI's CLIP_VISION) takes part by offering the few members of ImageEncoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Rgb = tuple[float, float, float]

Encoded = Literal["image_embeds", "penultimate"]
"""What an image encoder gives of a picture: one pooled embedding ``e``, or the tokens ``t c`` of its last layer but one."""

Embedding = Literal["normed", "raw"]
"""A face model's embedding: its direction alone, or with the length that the model gives it."""


@dataclass(frozen=True, slots=True)
class Feature:
    """What a projector reads of each reference.

    ``name`` is what files of prompts call it and ``kind`` what files of adapters do; ``what`` says it in a sentence. It has
    ``rank`` axes, references first. ``encoded`` is what the image encoder gives of it, ``embedding`` what a face model does;
    None: nothing.
    """

    name: str
    kind: str
    what: str
    rank: int
    encoded: Encoded | None = None
    embedding: Embedding | None = None

    def of(self, seen: ImageFeatures) -> Tensor:
        """What an image encoder saw of it, ``i e`` or ``i t c``."""
        return seen.image_embeds if self.encoded == "image_embeds" else seen.penultimate

    def join(self, embeddings: Tensor | None, tokens: Tensor | None) -> Tensor:
        """The feature of face embeddings ``i e`` and encoder tokens ``i t c``, either of which may be no part of it."""
        if tokens is None:
            assert embeddings is not None
            return embeddings
        return tokens if embeddings is None else pack_face(embeddings, tokens)

    def without_face(self, encoded: Tensor) -> Tensor:
        """The feature of what an encoder gave ``i ...`` where there is no face in it."""
        if self.embedding is None:
            return encoded
        return self.join(torch.zeros(len(encoded), encoded.shape[-1]), encoded)

    def shape(self, width: int, references: str = "images") -> tuple[str | int, ...]:
        """The axes of features ``width`` wide, for messages."""
        return (references, width) if self.rank == 2 else (references, "tokens", width)


IMAGE_EMBEDS = Feature("image_embeds", "image_embeds", "the image embeds of an encoder", 2, "image_embeds")
PENULTIMATE = Feature("penultimate", "penultimate", "the hidden states of an encoder", 3, "penultimate")
FACE = Feature("face", "face", "directions of face embeddings", 2, None, "normed")
RAW_FACE = Feature("raw face", "face", "face embeddings of full length", 2, None, "raw")
FACE_TOKENS = Feature(
    "face_tokens", "face_tokens", "face embeddings with the hidden states of an encoder", 3, "penultimate", "normed"
)
FEATURES = {feature.name: feature for feature in (IMAGE_EMBEDS, PENULTIMATE, FACE, RAW_FACE, FACE_TOKENS)}


def pack_face(embeddings: Tensor, tokens: Tensor) -> Tensor:
    """Face embeddings ``i e`` and encoder tokens ``i t c`` (c >= e) as one feature ``i (1 + t) c``."""
    row = F.pad(embeddings, (0, tokens.shape[-1] - embeddings.shape[-1]))
    return torch.cat([row[:, None].to(tokens), tokens], 1)


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

    def width(self, encoded: Encoded) -> int:
        """Length of one feature vector: of image_embeds, or of each penultimate token."""
        return width_of(self, encoded)


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


def find_encoder(encoded: Encoded, width: int) -> EncoderSpec | None:
    """The first encoder of the table that gives features ``width`` long; None if there is none."""
    return next((spec for spec in ENCODERS.values() if spec.width(encoded) == width), None)


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What an encoder sees: ``image_embeds`` ``b e`` and ``penultimate`` ``b t c``.

    ``penultimate`` is the output of the last layer but one (``hidden_states[-2]``), without a final norm.
    """

    image_embeds: Tensor
    penultimate: Tensor

    def get(self, encoded: Encoded) -> Tensor:
        return self.image_embeds if encoded == "image_embeds" else self.penultimate


class TakesPixels(Protocol):
    """What pictures are prepared for: an encoder, or a ``PixelSpec``."""

    @property
    def image_size(self) -> int: ...
    @property
    def mean(self) -> Rgb: ...
    @property
    def std(self) -> Rgb: ...


@dataclass(frozen=True, slots=True)
class PixelSpec:
    """What an encoder's pixels look like, apart from it: pictures are prepared where its weights are not."""

    image_size: int
    mean: Rgb
    std: Rgb


class ImageEncoder(TakesPixels, Protocol):
    """What the core asks of an image encoder, wherever it runs."""

    @property
    def name(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def projection_dim(self) -> int: ...

    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        """Normalised pixels ``b 3 y x`` of side image_size to features; moves them to its own device and dtype."""
        ...


def width_of(encoder: ImageEncoder | EncoderSpec, encoded: Encoded) -> int:
    """Length of one feature vector that an encoder gives."""
    return encoder.projection_dim if encoded == "image_embeds" else encoder.hidden_size
