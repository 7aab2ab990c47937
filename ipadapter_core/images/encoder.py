"""Image encoders read from a folder or a single file and run headless: CLIP's by transformers, others as towers.py has them."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import (
    AdapterError,
    CorruptFileError,
    InvalidInputError,
    one_line,
    quoted,
    reason,
)
from ..features import CLIP_MEAN, CLIP_STD, ENCODERS, Encoded, ImageFeatures, Rgb
from ..files.state_dict import StoredTensors, describe_state_dict, open_state_dict
from ..files.text import read_json
from ..quiet import quietly
from .towers import KINDS, TowerKind, VisionTower, kind_of, read_tower


class TransformersImageEncoder:
    """A transformers ``CLIPVisionModelWithProjection`` as ImageEncoder."""

    def __init__(self, model: nn.Module, *, name: str | None = None, mean: Rgb = CLIP_MEAN, std: Rgb = CLIP_STD):
        config: Any = model.config
        self.model = model.eval().requires_grad_(False)
        self.hidden_size: int = config.hidden_size
        self.projection_dim: int = config.projection_dim
        self.image_size: int = config.image_size
        self.gives: tuple[Encoded, ...] = ("image_embeds", "penultimate", "last")
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
        return ImageFeatures(out.image_embeds, out.hidden_states[-2], last=out.last_hidden_state)


class TowerEncoder:
    """A ``VisionTower`` as ImageEncoder: SigLIP, DINOv2 or PE-Core.

    Its ``pooled`` is SigLIP's pooling head's, where the file has it. Pixels are brought to the weights' device and dtype, except
    where the layers bring their weights to the pixels' (``casts_weights``).
    """

    projection_dim = 0

    def __init__(
        self,
        model: VisionTower,
        *,
        name: str | None = None,
        image_size: int = 0,
        mean: Rgb | None = None,
        std: Rgb | None = None,
        casts_weights: bool = False,
    ):
        self.model = model
        self.casts_weights = casts_weights
        self.hidden_size = model.width
        positions = model.side**2 + model.kind.class_token
        sizes = (model.width, positions, model.kind.mean)
        known = next(
            (s for s in ENCODERS.values() if not s.projection_dim and (s.hidden_size, s.tokens, s.mean) == sizes), None
        )
        side = model.side * model.patch
        self.image_size = image_size or (side if known is None else known.image_size)
        self.mean, self.std = mean or model.kind.mean, std or model.kind.std
        plain = f"{model.kind.name} ({model.width} wide, {self.image_size} px)"
        self.name = name or (plain if known is None else known.name)
        self.gives: tuple[Encoded, ...] = (
            ("penultimate", "last") if model.head is None else ("penultimate", "last", "pooled")
        )

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        """Normalised pixels ``b 3 y x`` to features; InvalidInputError if the tower cannot see so many."""
        last, kept = self.states(pixel_values, (self.model.depth - 1,))
        pooled = None if self.model.head is None else self.model.head(last)
        return ImageFeatures(last[:, 0, :0], kept.get(self.model.depth - 1, last), pooled, last)

    @torch.no_grad()
    def states(self, pixel_values: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, dict[int, Tensor]]:
        """The last hidden state ``b t c``, and the outputs of ``layers`` (1: of the first), without a final norm."""
        check_pixels(self.name, self.model.kind, self.model.patch, self.image_size, pixel_values)
        if not self.casts_weights:
            weight = next(self.model.parameters())
            pixel_values = pixel_values.to(weight.device, weight.dtype)
        return self.model(pixel_values, layers)


def check_pixels(name: str, kind: TowerKind, patch: int, image_size: int, pixel_values: Tensor) -> None:
    """Raise InvalidInputError unless a tower takes the pixels: SigLIP those of its own square, the others of any shape."""
    shape = tuple(pixel_values.shape)
    free = kind.class_token and min(shape[-2:]) >= patch
    if len(shape) != 4 or shape[1] != 3 or not (free or shape[-2:] == (image_size, image_size)):
        raise InvalidInputError(
            f"{name} takes pixel values of shape (b, 3, {image_size}, {image_size}), got {shape}; use preprocess() with this encoder"
        )


def load_image_encoder(
    path: str | PathLike[str],
    *,
    subfolder: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TransformersImageEncoder | TowerEncoder:
    """The image encoder in a folder of transformers (or its ``subfolder``) or in one file; the network is never asked.

    CLIP, SigLIP and SigLIP 2 of a fixed size, DINOv2, PE-Core with a class token; of models that also read text the vision part.
    Sizes come from shapes, and of folders the number of attention heads, mean and std from their configs. Raises
    InvalidInputError for what is none of them, CorruptFileError for one that is damaged.
    """
    root = Path(path)
    place = root / subfolder if subfolder else root
    if os.path.isfile(place):
        return _tower(place, place, KINDS, 0, dtype, device) or TransformersImageEncoder.from_pretrained(
            place, dtype=dtype, device=device
        )
    try:
        said = read_json(place / "config.json")
        kind = next(kind for kind in KINDS if said["model_type"] in kind.model_types)
    except (AdapterError, OSError, LookupError, TypeError, StopIteration):  # CLIP's, or told there
        return TransformersImageEncoder.from_pretrained(root, subfolder=subfolder, dtype=dtype, device=device)
    config = said.get("vision_config", said)
    heads = config.get("num_attention_heads", 0) if isinstance(config, dict) else None
    if type(heads) is not int or not 0 <= heads < 1000:
        raise CorruptFileError(f"the config.json in {quoted(place)} says that num_attention_heads is {quoted(heads)}")
    file = place / "model.safetensors"
    found = _tower(place, file if file.exists() else _read_weights(place), (kind,), heads, dtype, device)
    if found is None:
        raise CorruptFileError(
            f"{quoted(place)} holds a config.json of {kind.name}, but no weights of it: download it again"
        )
    size = config.get("image_size")
    if (
        type(size) is int and size // found.model.patch == found.model.side
    ):  # patches may leave a border out: 384 = 27 · 14 + 6
        found.image_size = size
    return found


def _tower(
    place: Path,
    source: Path | Mapping[str, Tensor],
    kinds: tuple[TowerKind, ...],
    heads: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> TowerEncoder | None:
    """The tower in a file or in tensors; None if they are none of ``kinds``. Only the tensors of the tower are read."""
    stored = StoredTensors(source)
    found = kind_of(stored.described.tensors)
    if found is None or found[0] not in kinds:
        return None
    try:
        needed = [key for key in stored.described.tensors if key.startswith(found[1])]
        tower = read_tower(stored.read_some(needed), heads)
    except CorruptFileError as error:
        raise CorruptFileError(f"{quoted(place)}: {error}") from error
    assert tower is not None
    mean, std = _mean_and_std([place], (found[0].mean, found[0].std)) if place.is_dir() else (None, None)
    return TowerEncoder(tower.to(device, dtype), mean=mean, std=std)


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
            f"{described.name} is not one of CLIP's vision towers with transformers' names, nor a SigLIP, DINOv2 or PE-Core as "
            f"published ({error}; it has {seen}); use {ENCODERS['ViT-H/14'].files[0]}, or a transformers folder"
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


def _mean_and_std(folders: list[Path], default: tuple[Rgb, Rgb] = (CLIP_MEAN, CLIP_STD)) -> tuple[Rgb, Rgb]:
    for file in (folder / "preprocessor_config.json" for folder in folders):
        if os.path.exists(file):
            try:
                config = read_json(file)
                mean, std = (
                    _rgb(config.get(key, fallback))
                    for key, fallback in zip(("image_mean", "image_std"), default, strict=True)
                )
                usable = all(map(math.isfinite, (*mean, *std))) and min(std) > 0
            except (ValueError, TypeError, AttributeError, OverflowError) as error:
                raise CorruptFileError(
                    f"{quoted(file)} gives no image_mean and image_std of three numbers each ({reason(error)})"
                ) from error
            if not usable:
                raise CorruptFileError(f"{quoted(file)} gives an image_mean or image_std that no pixels can have")
            return mean, std
    return default


def _rgb(values: Any) -> Rgb:
    r, g, b = (float(value) for value in values)
    return r, g, b
