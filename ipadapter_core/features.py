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

Encoded = Literal["image_embeds", "penultimate", "pooled", "last", "packed"]
"""What an image encoder gives of a picture.

``image_embeds`` is CLIP's projected embedding ``e``, ``pooled`` the output ``c`` of SigLIP's attention pooling head (transformers'
``pooler_output``). ``penultimate`` are the tokens ``t c`` behind the last layer but one, ``last`` those behind the last layer and
the final norm. ``packed`` are the states of several encoders side by side, see ``Look``.
"""

Embedding = Literal["normed", "raw"]
"""A face model's embedding: its direction alone, or with the length that the model gives it."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a packed feature takes of one encoder, for pictures of ``side`` pixels: its ``last`` states, and the outputs of ``layers``.

    Layers are numbered as transformers numbers ``hidden_states``: 1 is the output of the first, without a final norm. ``skip``
    leading tokens (the class token) are left out.
    """

    encoder: str
    layers: tuple[int, ...]
    side: int
    skip: int = 0


@dataclass(frozen=True, slots=True)
class Feature:
    """What a projector reads of each reference.

    ``name`` is what files of prompts call it and ``kind`` what files of adapters do; ``what`` says it in a sentence. It has
    ``rank`` axes, references first. ``encoded`` is what the image encoder gives of it, ``embedding`` what a face model does;
    None: nothing. Of a packed feature, ``looks`` say what it takes of which encoder.
    """

    name: str
    kind: str
    what: str
    rank: int
    encoded: Encoded | None = None
    embedding: Embedding | None = None
    looks: tuple[Look, ...] = ()

    def of(self, seen: ImageFeatures) -> Tensor:
        """What an image encoder saw of it, ``i e`` or ``i t c``."""
        assert self.encoded is not None
        return seen.get(self.encoded)

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
POOLED = Feature("pooled", "pooled", "the pooled vector of an encoder with an attention pooling head", 2, "pooled")
LAST = Feature("last", "last", "the last hidden states of an encoder", 3, "last")
CHARACTER = Feature(
    "character",
    "character",
    "the hidden states of two encoders at two sizes",
    3,
    "packed",
    looks=(Look("SigLIP so400m/14-384", (7, 13, 26), 384), Look("DINOv2 giant/14", (9, 19, 29), 384, skip=1)),
)
"""``i 5832 2688``: tokens [low last 729 | low layers 3 · 729 | high last 4 · 729], channels [SigLIP 1152 | DINOv2 1536].

Low is the picture at 384 pixels, high at 768 in four parts, row by row. The layers of the high one are no part of it: the authors'
pipeline computes them and its projector never reads them (InstantCharacter, pipeline.py and models/resampler.py).
"""
FEATURES = {
    feature.name: feature
    for feature in (IMAGE_EMBEDS, PENULTIMATE, FACE, RAW_FACE, FACE_TOKENS, POOLED, LAST, CHARACTER)
}


def pack_face(embeddings: Tensor, tokens: Tensor) -> Tensor:
    """Face embeddings ``i e`` and encoder tokens ``i t c`` (c >= e) as one feature ``i (1 + t) c``."""
    row = F.pad(embeddings, (0, tokens.shape[-1] - embeddings.shape[-1]))
    return torch.cat([row[:, None].to(tokens), tokens], 1)


Crop = Literal["center", "top", "bottom", "left", "right", "pad", "stretch"]
"""Which square of a picture is kept, for users to choose; see preprocess()."""

Framing = Crop | Literal["fit", "shapes", "subject"]
"""How a family's training saw pictures: one of the crops, or ``fit`` (all of it, with black borders), ``shapes`` (stretched to the
nearest of PE-Core's shapes), ``subject`` (all of it, or what a mask shows of it, on white, as a square)."""


CLIP_MEAN: Rgb = (0.48145466, 0.4578275, 0.40821073)


CLIP_STD: Rgb = (0.26862954, 0.26130258, 0.27577711)


HALF: Rgb = (0.5, 0.5, 0.5)


IMAGENET_MEAN: Rgb = (0.485, 0.456, 0.406)


IMAGENET_STD: Rgb = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A published image encoder: its widths, what its pixels must look like, and the file names people have.

    ``projection_dim`` is 0 where it gives no image_embeds, ``tokens`` count a class token. ``serves`` is what adapters read of it:
    a width is looked up among those alone; ``gives`` is all that one can ask it for. ``public`` is the file to download, in the names of DOWNLOADS.
    """

    name: str
    hidden_size: int
    projection_dim: int
    tokens: int
    image_size: int
    mean: Rgb
    std: Rgb
    files: tuple[str, ...]
    serves: tuple[Encoded, ...] = ("image_embeds", "penultimate")
    gives: tuple[Encoded, ...] = ("image_embeds", "penultimate", "pooled", "last")
    public: str = ""

    def width(self, encoded: Encoded) -> int:
        """Length of one feature vector: of image_embeds, or of each token; 0: it gives none."""
        return width_of(self, encoded)


ENCODERS: dict[str, EncoderSpec] = {
    spec.name: spec
    for spec in (
        EncoderSpec("ViT-H/14", 1280, 1024, 257, 224, CLIP_MEAN, CLIP_STD, (
            "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", "models/image_encoder of h94/IP-Adapter",
            "InvokeAI/ip_adapter_sd_image_encoder",
        ), public="CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"),
        EncoderSpec("ViT-bigG/14", 1664, 1280, 257, 224, CLIP_MEAN, CLIP_STD, (
            "CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors", "sdxl_models/image_encoder of h94/IP-Adapter",
        ), public="CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors"),
        EncoderSpec("ViT-L/14", 1024, 768, 257, 224, CLIP_MEAN, CLIP_STD, (
            "openai/clip-vit-large-patch14", "InvokeAI/clip-vit-large-patch14",
        ), public="clip-vit-large-patch14.safetensors"),
        EncoderSpec("ViT-L/14-336", 1024, 768, 577, 336, CLIP_MEAN, CLIP_STD, (
            "clip-vit-large-patch14-336.bin (Kolors)", "openai/clip-vit-large-patch14-336",
        ), public="clip-vit-large-patch14-336.bin"),
        EncoderSpec("SigLIP so400m/14-384", 1152, 0, 729, 384, HALF, HALF, (
            "sigclip_vision_patch14_384.safetensors", "google/siglip-so400m-patch14-384",
        ), ("penultimate", "pooled"), public="siglip-so400m-patch14-384.safetensors"),
        EncoderSpec("SigLIP2 base/16-512", 768, 0, 1024, 512, HALF, HALF, ("model.safetensors of google/siglip2-base-patch16-512",), ("last",), public="siglip2-base-patch16-512.safetensors"),
        EncoderSpec("DINOv2 giant/14", 1536, 0, 1370, 518, IMAGENET_MEAN, IMAGENET_STD, ("model.safetensors of facebook/dinov2-giant",), (),
            ("penultimate", "last")),
        EncoderSpec("PE-Core L/14-336", 1024, 0, 577, 336, HALF, HALF, ("PE-Core-L14-336.pt of facebook/PE-Core-L14-336",), (
            "last",
        ), ("last",)),
    )
}  # fmt: skip
"""The published image encoders, by name."""


def find_encoder(encoded: Encoded, width: int) -> EncoderSpec | None:
    """The first encoder of the table that serves features ``width`` long; None if there is none."""
    fitting = (spec for spec in ENCODERS.values() if encoded in spec.serves and spec.width(encoded) == width)
    return next(fitting, None)


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What an encoder sees: ``image_embeds`` ``b e`` and ``penultimate`` ``b t c``, and of some encoders more, see ``Encoded``.

    ``penultimate`` is the output of the last layer but one (``hidden_states[-2]``), without a final norm. An encoder without a
    projection gives image_embeds of width 0.
    """

    image_embeds: Tensor
    penultimate: Tensor
    pooled: Tensor | None = None
    last: Tensor | None = None
    packed: Tensor | None = None

    def get(self, encoded: Encoded) -> Tensor:
        """One of them. Raises LookupError for one that the encoder does not give; check_encoder() tells before."""
        found: Tensor | None = getattr(self, encoded)
        if found is None:
            raise LookupError(f"the image encoder does not give {encoded} features")
        return found


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
    """What the core asks of an image encoder, wherever it runs.

    One that gives more than image_embeds and penultimate tokens names it all in ``gives: tuple[Encoded, ...]``.
    """

    @property
    def name(self) -> str:
        """Of the model or its file, for messages."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of its inner tokens."""
        ...

    @property
    def projection_dim(self) -> int:
        """Width of image_embeds; 0 for an encoder that gives none."""
        ...

    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        """Normalised pixels ``b 3 y x`` of side image_size to features; moves them to its own device and dtype."""
        ...


def width_of(encoder: ImageEncoder | EncoderSpec, encoded: Encoded) -> int:
    """Length of one feature vector that an encoder gives; 0: it gives none."""
    if encoded == "image_embeds":
        return encoder.projection_dim
    given: tuple[Encoded, ...] = getattr(encoder, "gives", ("penultimate",))
    return encoder.hidden_size if encoded in given else 0
