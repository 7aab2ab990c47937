"""Image encoders: what each one wants to see, what it gives, and which one an adapter needs.

The table below holds facts; TransformersImageEncoder runs a CLIP vision tower headless. A host's own encoder (ComfyUI's
CLIP_VISION) takes part by offering the few members of ImageEncoder.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CorruptFileError, IncompatibleEncoderError, InvalidInputError
from .quiet import quietly
from .state_dict import describe_state_dict, open_state_dict

if TYPE_CHECKING:
    from .checkpoints.format import AdapterSpec

Rgb = tuple[float, float, float]
Feature = Literal["image_embeds", "penultimate", "face", "face_tokens"]
FEATURE_RANKS: dict[Feature, int] = {"image_embeds": 2, "penultimate": 3, "face": 2, "face_tokens": 3}
"""Axes of each feature, images first. ``face`` is a face model's embedding, ``face_tokens`` that one packed before the
penultimate tokens of the aligned face (projectors.pack_face)."""
Crop = Literal["center", "top", "bottom", "left", "right", "pad", "stretch"]

CLIP_MEAN: Rgb = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Rgb = (0.26862954, 0.26130258, 0.27577711)

LONGEST_STRIP = 8
"""Sides' ratio past which a picture is cut near its crop before it is resized: a 20000 x 10 strip would else become
448,000 pixels long at 224."""


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


class TransformersImageEncoder:
    """A transformers ``CLIPVisionModelWithProjection`` as ImageEncoder."""

    def __init__(self, model: nn.Module, *, name: str | None = None, mean: Rgb = CLIP_MEAN, std: Rgb = CLIP_STD):
        config: Any = model.config
        self.model = model.eval().requires_grad_(False)
        self.hidden_size: int = config.hidden_size
        self.projection_dim: int = config.projection_dim
        self.image_size: int = config.image_size
        self.mean = mean
        self.std = std
        self.name = name or _published_name(self) or "custom image encoder"

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        subfolder: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> TransformersImageEncoder:
        """Load the vision tower in ``folder`` (or its ``subfolder``); the network is never asked.

        ``folder`` can also be the tower's ``.safetensors`` alone, as ComfyUI keeps it: its sizes are read from its shapes.
        Mean and std come from ``preprocessor_config.json``, beside the weights or in the ``feature_extractor`` folder
        of a diffusers pipeline, else they are CLIP's. Raises InvalidInputError without a CLIP model in the folder and
        CorruptFileError for one that lacks weights.
        """
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        root = Path(folder)
        path = root / subfolder if subfolder else root
        tower: Any = CLIPVisionModelWithProjection
        if path.is_file():
            config: Any = CLIPVisionConfig(**vision_config(path))
            load = partial(tower.from_pretrained, None, config=config, state_dict=open_state_dict(path).tensors)
        else:
            _check_model_type(path)
            load = partial(tower.from_pretrained, path, local_files_only=True)
        try:
            with quietly("transformers"):
                model, info = load(output_loading_info=True)
        except Exception as error:  # transformers, safetensors and torch each raise their own kinds for a bad file
            raise CorruptFileError(f"{path} could not be read as a CLIP vision model: {error}") from error
        missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")]
        if missing:
            raise CorruptFileError(
                f"the image encoder in {path} lacks {len(missing)} of its weights, the first is {missing[0]}; "
                "download it again (a text-only CLIP or a tower without projection does not fit either)"
            )
        mean, std = _mean_and_std([path, root / "feature_extractor"])
        return cls(model.to(device=device, dtype=dtype), mean=mean, std=std)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        """Normalised pixels ``b 3 y x`` to features; InvalidInputError if they are not image_size on a side."""
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, self.image_size, self.image_size):
            raise InvalidInputError(
                f"{self.name} takes pixel values of shape (b, 3, {self.image_size}, {self.image_size}), "
                f"got {tuple(pixel_values.shape)}; use preprocess() with this encoder"
            )
        weight = next(self.model.parameters())
        out: Any = self.model(pixel_values.to(weight.device, weight.dtype), output_hidden_states=True)
        return ImageFeatures(out.image_embeds, out.hidden_states[-2])


def _check_model_type(folder: Path) -> None:
    try:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{folder} holds no readable config.json of an image encoder ({error}); "
            "give the folder of a CLIPVisionModelWithProjection, e.g. models/image_encoder of h94/IP-Adapter"
        ) from error
    if model_type not in ("clip", "clip_vision_model"):
        raise InvalidInputError(f"{folder} holds a model of type {model_type!r}; a CLIP vision model was expected")


_HEADS = {768: 12, 1024: 16, 1280: 16, 1664: 16}
"""Attention heads of the published towers by width; nothing in a file tells them."""


def vision_config(file: Path) -> dict[str, Any]:
    """What a ``config.json`` would say of a CLIP vision tower in one file with transformers' names.

    Raises InvalidInputError for another model, CorruptFileError for no file of tensors.
    """
    shapes = {key: tuple(t.shape) for key, t in describe_state_dict(file).tensors.items()}
    try:
        hidden, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
        positions = shapes["vision_model.embeddings.position_embedding.weight"][0]
        inner = shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0]
        projection = shapes["visual_projection.weight"][0]
        heads = _HEADS[hidden]
    except (KeyError, ValueError) as error:
        seen = ", ".join(sorted({key.split(".")[0] for key in shapes})[:6])
        raise InvalidInputError(
            f"{file.name} is not one of CLIP's vision towers with transformers' names (not found: {error}; it has {seen}); "
            f"use {ENCODERS['ViT-H/14'].files[0]}, or a transformers folder"
        ) from error
    layers = {key.split(".")[3] for key in shapes if key.startswith("vision_model.encoder.layers.")}
    return {
        "model_type": "clip_vision_model", "hidden_size": hidden, "patch_size": patch, "intermediate_size": inner,
        "image_size": patch * math.isqrt(positions - 1), "projection_dim": projection, "num_attention_heads": heads,
        "num_hidden_layers": len(layers),
        "hidden_act": "quick_gelu" if hidden in (768, 1024) else "gelu",  # OpenAI's towers; LAION's have the exact one
    }  # fmt: skip


def _published_name(encoder: TransformersImageEncoder) -> str | None:
    sizes = (encoder.hidden_size, encoder.projection_dim, encoder.image_size)
    return next((s.name for s in ENCODERS.values() if (s.hidden_size, s.projection_dim, s.image_size) == sizes), None)


def _mean_and_std(folders: list[Path]) -> tuple[Rgb, Rgb]:
    for file in (folder / "preprocessor_config.json" for folder in folders):
        if file.is_file():
            try:
                config = json.loads(file.read_text())
                mean, std = (
                    _rgb(config.get(key, default))
                    for key, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
                )
            except (ValueError, TypeError, AttributeError) as error:
                raise CorruptFileError(
                    f"{file} gives no image_mean and image_std of three numbers each: {error}"
                ) from error
            return mean, std
    return CLIP_MEAN, CLIP_STD


def _rgb(values: Any) -> Rgb:
    r, g, b = (float(value) for value in values)
    return r, g, b


def check_encoder(spec: AdapterSpec, encoder: ImageEncoder) -> None:
    """Raise IncompatibleEncoderError unless ``encoder`` gives the feature that an adapter's projector reads."""
    if spec.feature == "face":
        return
    got = {
        "image_embeds": encoder.projection_dim,
        "penultimate": encoder.hidden_size,
        "face_tokens": encoder.hidden_size,
    }
    if got[spec.feature] == spec.feature_dim:
        return
    needed = ENCODERS.get(spec.encoder)
    if needed is None:
        wanted = "it was trained with an encoder of its own, use that one"
    else:
        wanted = f"it needs {needed.name}, which people have as {', or '.join(needed.files)}"
    known = [
        other.name
        for other in ENCODERS.values()
        if (other.hidden_size, other.projection_dim) == (encoder.hidden_size, encoder.projection_dim)
    ]
    identity = f", the widths of {' or '.join(known)}" if known and encoder.name not in known else ""
    kind = "image_embeds" if spec.feature == "image_embeds" else "penultimate hidden states"
    raise IncompatibleEncoderError(
        f"this {spec.base_model} {spec.family} adapter reads {kind} of width {spec.feature_dim}: {wanted}; "
        f"got {encoder.name} with image_embeds of width {got['image_embeds']} and hidden states of width "
        f"{got['penultimate']}{identity}"
    )


def preprocess(images: Tensor, encoder: ImageEncoder, *, crop: Crop = "center", mask: Tensor | None = None) -> Tensor:
    """Turn images into an encoder's pixel values ``b 3 y x`` (float32, image_size on a side, mean 0 and std 1).

    Args:
        images: ``b h w c`` in 0..1 with 1 (grey), 3 or 4 channels; what alpha hides becomes the encoder's mean
            colour, that is 0 after normalisation: nothing to see.
        crop: which square is kept. ``center``: as CLIP's own processor; ``top``/``bottom`` move the square along the
            long side of a tall image, ``left``/``right`` along that of a wide one (centred otherwise). ``pad`` keeps
            all of the image and fills up with the mean colour, ``stretch`` keeps all and ignores the aspect ratio.
        mask: ``b h w`` or ``1 h w`` in 0..1 of the images' size; outside it the image becomes the mean colour.

    Resizing is bicubic with antialiasing, within 2/255 of transformers' CLIPImageProcessor for ``center``.
    Images whose sides differ by more than LONGEST_STRIP are first cut near the square that is kept.
    Raises InvalidInputError for images or masks of another kind.
    """
    if crop not in get_args(Crop):
        raise InvalidInputError(f"crop is {crop!r}; it must be one of {', '.join(get_args(Crop))}")
    _check_images(images)
    pixels = images.detach().to(torch.float32).permute(0, 3, 1, 2).clamp(0, 1)
    seen = None if mask is None else _check_mask(mask, images)[:, None].to(pixels)
    if pixels.shape[1] == 4:
        seen = pixels[:, 3:] if seen is None else pixels[:, 3:] * seen
        pixels = pixels[:, :3]
    pixels = pixels.expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (encoder.mean, encoder.std))
    if seen is not None:
        pixels = pixels * seen + mean * (1 - seen)

    size = encoder.image_size
    if crop == "stretch":
        return (_resize(pixels, size, size) - mean) / std
    if crop == "pad":
        h, w = pixels.shape[-2:]
        inner = [max(1, round(size * side / max(h, w))) for side in (h, w)]
        pixels = (_resize(pixels, inner[0], inner[1]) - mean) / std
        top, left = ((size - side) // 2 for side in inner)
        return F.pad(pixels, (left, size - inner[1] - left, top, size - inner[0] - top))
    return (_crop(pixels, size, crop) - mean) / std


def preprocess_as_host(images: Tensor, encoder: ImageEncoder, *, mask: Tensor | None = None) -> Tensor:
    """Pixel values ``b 3 y x`` as ComfyUI's ``clip_preprocess`` makes them, see Rules.host_pixels.

    The short side is resized in one bicubic pass, the centre cut out, values rounded to 8 bits. A mask ``b|1 h w`` of
    any size is cut and resized apart and multiplies the normalised pixels.
    """
    _check_images(images)
    size = encoder.image_size
    pixels = images.detach().to(torch.float32)[..., :3].movedim(-1, 1).expand(-1, 3, -1, -1)
    h, w = pixels.shape[-2:]
    if (h, w) != (size, size):
        scale = size / min(h, w)
        pixels = F.interpolate(pixels, (round(scale * h), round(scale * w)), mode="bicubic", antialias=True)
        top, left = ((side - size) // 2 for side in pixels.shape[-2:])
        pixels = pixels[..., top : top + size, left : left + size]
    pixels = (255.0 * pixels).clamp(0, 255).round() / 255.0
    mean, std = (torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (encoder.mean, encoder.std))
    pixels = (pixels - mean) / std
    if mask is None:
        return pixels
    if tuple(mask.shape[-2:]) != (size, size):
        mask = F.interpolate(center_square(mask[:, None]), (size, size), mode="bicubic", antialias=True)[:, 0]
    return pixels * mask[:, None].to(pixels)


def center_square(pixels: Tensor) -> Tensor:
    """The largest square in the middle of ``b c h w``."""
    h, w = pixels.shape[-2:]
    side = min(h, w)
    top, left = round((h - side) / 2), round((w - side) / 2)
    return pixels[..., top : top + side, left : left + side]


def _crop(pixels: Tensor, size: int, crop: Crop) -> Tensor:
    """Resize the short side to ``size``, then cut a square out of the long side."""
    h, w = pixels.shape[-2:]
    tall = h > w
    position = {"top": 0.0, "bottom": 1.0} if tall else {"left": 0.0, "right": 1.0}
    at = position.get(crop, 0.5)
    dim = -2 if tall else -1
    short, long = min(h, w), max(h, w)
    if long > LONGEST_STRIP * short:
        pixels = pixels.narrow(dim, round((long - 2 * short) * at), 2 * short)
        long = 2 * short
    long = size * long // short
    pixels = _resize(pixels, long, size) if tall else _resize(pixels, size, long)
    return pixels.narrow(dim, int((long - size) * at), size)


def _resize(pixels: Tensor, h: int, w: int) -> Tensor:
    # one axis after the other, each clamped, as Pillow does it: overshoot at hard edges must not pass from x to y
    for shape in ((pixels.shape[-2], w), (h, w)):
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(0, 1)
    return pixels


def _check_images(images: Tensor) -> None:
    shape = tuple(images.shape)
    if images.ndim != 4:
        hint = "; add the batch dimension with image[None]" if images.ndim == 3 else ""
        raise InvalidInputError(f"images must have shape (b, h, w, c), got {shape}{hint}")
    if shape[3] not in (1, 3, 4):
        hint = "; channels come last: images.permute(0, 2, 3, 1)" if shape[1] in (1, 3, 4) else ""
        raise InvalidInputError(f"images must have 1, 3 or 4 channels, got shape {shape}{hint}")
    if shape[0] == 0:
        raise InvalidInputError(f"the batch of images is empty (shape {shape}); give at least one image")
    if 0 in shape:
        raise InvalidInputError(f"the images have no pixels (shape {shape})")
    if not images.dtype.is_floating_point:
        raise InvalidInputError(
            f"images must be floating point in 0..1, got {images.dtype}; divide 8-bit images by 255"
        )
    low, high = (value.item() for value in torch.aminmax(images.detach()))
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise InvalidInputError("the images hold NaN or infinite values; look at the node or file they come from")
    if low < -0.5 or high > 2:
        raise InvalidInputError(
            f"images must lie in 0..1, got values from {low:.3g} to {high:.3g}; rescale or clamp them"
        )


def _check_mask(mask: Tensor, images: Tensor) -> Tensor:
    b, h, w = images.shape[:3]
    shape = tuple(mask.shape)
    if mask.ndim != 3 or shape[0] not in (1, b):
        raise InvalidInputError(f"the mask must have shape (1, h, w) or ({b}, h, w), got {shape}")
    if shape[1:] != (h, w):
        raise InvalidInputError(
            f"the mask is {shape[2]}x{shape[1]} and its image {w}x{h} (width x height); they must have the same size"
        )
    mask = mask.detach().to(torch.float32)
    low, high = (value.item() for value in torch.aminmax(mask))
    if not (low >= 0 and high <= 1):
        raise InvalidInputError(f"the mask must lie in 0..1, got values from {low:.3g} to {high:.3g}")
    return mask
