"""ComfyUI's CLIP_VISION."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import comfy.clip_vision
import comfy.model_management
import torch
from torch import Tensor

from ...ipadapter_core import AdapterError, ImageFeatures, InvalidInputError
from ...ipadapter_core.files.state_dict import describe_state_dict
from . import files


def widths(file: str) -> tuple[int, int] | None:
    """Hidden size and projection width of an image encoder's file; None if it is none."""
    try:
        shapes = describe_state_dict(files.path("clip_vision", file)).tensors
    except (AdapterError, OSError):
        return None
    hidden = next((t.shape[0] for k, t in shapes.items() if k.endswith("class_embedding")), None)
    width = next((t.shape for k, t in shapes.items() if k.endswith(("visual_projection.weight", "visual.proj"))), None)
    if hidden is None or width is None:
        return None
    return int(hidden), int(width[0] if width[1] == hidden else width[1])


_CLIP_VISION: WeakValueDictionary[files.Version, Any] = WeakValueDictionary()


def load(file: str) -> Any:
    """ComfyUI's CLIP_VISION of a file, one copy however many nodes load it."""
    key = path, *_ = files.version("clip_vision", file)
    model = _CLIP_VISION.get(key)
    if model is None:
        model = comfy.clip_vision.load(path)
        if model is None:
            raise InvalidInputError(f"{file} in models/clip_vision is no image encoder that ComfyUI knows")
        _CLIP_VISION[key] = model
    return model


class ClipVisionEncoder:
    """ComfyUI's CLIP_VISION as the core's ImageEncoder."""

    def __init__(self, clip_vision: Any) -> None:
        if clip_vision is None:
            raise InvalidInputError("no image encoder is connected: connect Load CLIP Vision to clip_vision")
        self._clip_vision = clip_vision
        model = clip_vision.model
        embeddings = getattr(getattr(model, "vision_model", None), "embeddings", None)
        if embeddings is None:
            raise InvalidInputError(
                f"the CLIP vision input is a {type(model).__name__}; image prompts need a CLIP or SigLIP vision model, such as "
                "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors in models/clip_vision"
            )
        self.hidden_size = int(embeddings.patch_embedding.weight.shape[0])
        projection = getattr(model.visual_projection, "weight", None)
        self.projection_dim = self.hidden_size if projection is None else int(projection.shape[0])
        self.image_size = int(clip_vision.image_size)
        self.mean = tuple(clip_vision.image_mean)
        self.std = tuple(clip_vision.image_std)
        self.name = f"CLIP vision model ({self.hidden_size} wide, {self.image_size} px)"

    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        comfy.model_management.load_models_gpu([self._clip_vision.patcher])
        pixels = pixel_values.to(self._clip_vision.load_device, torch.float32)
        _, penultimate, embeds, *_ = self._clip_vision.model(pixel_values=pixels, intermediate_output=-2)
        device = comfy.model_management.intermediate_device()
        return ImageFeatures(image_embeds=embeds.to(device), penultimate=penultimate.to(device))
