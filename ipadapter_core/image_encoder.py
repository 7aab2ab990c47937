"""Image encoders: what each one wants to see, what it gives, and which one an adapter needs.

The table below holds facts; TransformersImageEncoder runs a CLIP vision tower headless. A host's own encoder (ComfyUI's
CLIP_VISION) takes part by offering the few members of ImageEncoder.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import (
    AdapterError,
    CorruptFileError,
    IncompatibleEncoderError,
    InvalidInputError,
    one_line,
    quoted,
    reason,
)
from .quiet import quietly
from .state_dict import describe_state_dict, open_state_dict
from .text_files import read_json

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

FAR = 1e30
"""Values past it overflow when they are resized."""


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

        ``folder`` can also be the tower's ``.safetensors`` alone, as ComfyUI keeps it. The tower's sizes are read from the
        shapes of its weights; what ``config.json`` says must agree with them.
        Mean and std come from ``preprocessor_config.json``, beside the weights or in the ``feature_extractor`` folder
        of a diffusers pipeline, else they are CLIP's. Raises InvalidInputError without a CLIP model in the folder and
        CorruptFileError for one that lacks weights.
        """
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        root = Path(folder)
        path = root / subfolder if subfolder else root
        tower: Any = CLIPVisionModelWithProjection
        if os.path.isfile(path):
            config, state = CLIPVisionConfig(**vision_config(path)), open_state_dict(path).tensors
        else:
            config, state = _read_folder(path)
        try:
            with quietly("transformers"):
                load = partial(tower.from_pretrained, None, config=config, state_dict=state)
                model, info = load(output_loading_info=True)
        except Exception as error:  # transformers and torch each raise their own kinds for weights that do not fit
            raise CorruptFileError(
                f"{quoted(path)} could not be read as a CLIP vision model ({reason(error)}): download it again"
            ) from error
        missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")]
        if missing:
            raise CorruptFileError(
                f"the image encoder in {quoted(path)} lacks {len(missing)} of its weights, the first is {missing[0]}; "
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


def _read_folder(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The config of a transformers folder, and the weights. They are read here, not by transformers, which maps its files: see
    state_dict.py; and it would build whatever a config says before it looks at them."""
    from transformers import CLIPVisionConfig

    try:
        said = read_json(folder / "config.json")
        model_type = said["model_type"]
    except (AdapterError, OSError, LookupError, TypeError) as error:
        raise InvalidInputError(
            f"{quoted(folder)} holds no readable config.json of an image encoder ({reason(error)}); "
            "give the folder of a CLIPVisionModelWithProjection, e.g. models/image_encoder of h94/IP-Adapter"
        ) from error
    if model_type not in ("clip", "clip_vision_model"):
        raise InvalidInputError(
            f"{quoted(folder)} holds a model of type {quoted(model_type)}; a CLIP vision model was expected"
        )
    try:
        state = _read_weights(folder)
    except AdapterError as error:
        raise type(error)(f"{quoted(folder)} could not be read as a CLIP vision model: {error}") from error
    try:
        config: Any = CLIPVisionConfig.from_dict(said.get("vision_config", said) if model_type == "clip" else said)
    except Exception as error:  # transformers checks values in its own ways
        raise CorruptFileError(f"{quoted(folder)} has a config.json that is no tower's ({reason(error)})") from error
    sizes = _sizes(state)
    wrong = [key for key, size in sizes.items() if getattr(config, key, None) != size]
    heads = config.num_attention_heads
    if type(heads) is not int or not 0 < heads <= config.hidden_size or config.hidden_size % heads:
        wrong.append("num_attention_heads")
    if wrong:
        raise CorruptFileError(
            f"the config.json in {quoted(folder)} says that {wrong[0]} is {quoted(getattr(config, wrong[0], None))}, the weights "
            f"beside it have {sizes.get(wrong[0], 'others')}: they are of two encoders, or damaged (weights that are missing count too)"
        )
    return config, state


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a transformers folder, of one file or several."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).exists():
            return open_state_dict(folder / stem).tensors
        index = folder / f"{stem}.index.json"
        if index.exists():
            said = read_json(index)
            places = said.get("weight_map") if isinstance(said, dict) else None
            files = set(places.values()) if isinstance(places, dict) else set[object]()
            if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
                raise CorruptFileError(f"{quoted(index)} does not name files beside it: download the folder again")
            parts = [open_state_dict(folder / str(file)).tensors for file in sorted(map(str, files))]
            return {key: tensor for part in parts for key, tensor in part.items()}
    raise CorruptFileError("it holds neither model.safetensors nor pytorch_model.bin; download it again")


_HEADS = {768: 12, 1024: 16, 1280: 16, 1664: 16}
"""Attention heads of the published towers by width; nothing in a file tells them."""


def vision_config(file: Path) -> dict[str, Any]:
    """What a ``config.json`` would say of a CLIP vision tower in one file with transformers' names.

    Raises InvalidInputError for another model, CorruptFileError for no file of tensors.
    """
    described = describe_state_dict(file)
    try:
        sizes = _sizes(described.tensors)
        heads = _HEADS[sizes["hidden_size"]]
    except (CorruptFileError, KeyError) as error:
        seen = ", ".join(sorted({one_line(key.split(".")[0], 20) for key in described.tensors})[:6])
        raise InvalidInputError(
            f"{described.name} is not one of CLIP's vision towers with transformers' names ({error}; it has {seen}); "
            f"use {ENCODERS['ViT-H/14'].files[0]}, or a transformers folder"
        ) from error
    return {
        "model_type": "clip_vision_model", **sizes, "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if sizes["hidden_size"] in (768, 1024) else "gelu",  # OpenAI's; LAION's have the exact one
    }  # fmt: skip


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of a tower, from the shapes of its weights. Raises CorruptFileError where they tell none."""

    def shape(key: str, rank: int) -> tuple[int, ...]:
        found = tuple(state[key].shape) if key in state else ()
        if len(found) != rank or 0 in found:
            raise CorruptFileError(f"not found: {key} with {rank} axes")
        return found

    hidden, _, patch, _ = shape("vision_model.embeddings.patch_embedding.weight", 4)
    positions, _ = shape("vision_model.embeddings.position_embedding.weight", 2)
    layers = {key.split(".")[3] for key in state if re.match(r"vision_model\.encoder\.layers\.[0-9]{1,3}\.", key)}
    return {
        "hidden_size": hidden, "patch_size": patch, "image_size": patch * math.isqrt(positions - 1),
        "intermediate_size": shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "projection_dim": shape("visual_projection.weight", 2)[0], "num_hidden_layers": len(layers),
    }  # fmt: skip


def _published_name(encoder: TransformersImageEncoder) -> str | None:
    sizes = (encoder.hidden_size, encoder.projection_dim, encoder.image_size)
    return next((s.name for s in ENCODERS.values() if (s.hidden_size, s.projection_dim, s.image_size) == sizes), None)


def _mean_and_std(folders: list[Path]) -> tuple[Rgb, Rgb]:
    for file in (folder / "preprocessor_config.json" for folder in folders):
        if os.path.exists(file):
            try:
                config = read_json(file)
                mean, std = (
                    _rgb(config.get(key, default))
                    for key, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
                )
                usable = all(map(math.isfinite, (*mean, *std))) and min(std) > 0
            except (ValueError, TypeError, AttributeError, OverflowError) as error:
                raise CorruptFileError(
                    f"{quoted(file)} gives no image_mean and image_std of three numbers each ({reason(error)})"
                ) from error
            if not usable:
                raise CorruptFileError(f"{quoted(file)} gives an image_mean or image_std that no pixels can have")
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

    The short side is resized in one bicubic pass, the centre cut out, values clipped to 0..1 (HDR pictures too) and rounded
    to 8 bits. A mask ``b|1 h w`` of any size is cut and resized apart and multiplies the normalised pixels; NaN in it is 0.
    """
    _check_images(images, clipped=True)
    check_aspect(images)
    size = encoder.image_size
    pixels = images.detach().to(torch.float32)[..., :3].movedim(-1, 1).expand(-1, 3, -1, -1)
    pixels = pixels.clamp(-FAR, FAR)
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
    mask = mask.nan_to_num(0, 1, 0)
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


def check_finite(images: Tensor) -> tuple[float, float]:
    """Lowest and highest value. Raises InvalidInputError if there is NaN or infinity among them."""
    if not images.numel():
        return 0.0, 0.0
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise InvalidInputError("the images hold NaN or infinite values; look at the node or file they come from")
    return low, high


MOST_ASPECT = 200
"""Long side to short side of a picture that is resized before it is cut: a line of 16,384 x 1 pixels would take 10 GB."""


def check_aspect(images: Tensor) -> None:
    """Raise InvalidInputError for pictures ``b h w c`` that are lines."""
    h, w = images.shape[1:3]
    if max(h, w) > MOST_ASPECT * min(h, w):
        raise InvalidInputError(
            f"a picture of {w}x{h} is a line: its sides may differ {MOST_ASPECT}-fold at most; cut it before"
        )


def _check_images(images: Tensor, *, clipped: bool = False) -> None:
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
    low, high = check_finite(images)
    if not clipped and (low < -0.5 or high > 2):
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
