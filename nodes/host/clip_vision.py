"""Image encoders in ComfyUI: its CLIP_VISION, and those that it cannot load or loads without what adapters read."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import comfy.clip_vision
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...ipadapter_core import AdapterError, ImageEncoder, ImageFeatures, InvalidInputError, TowerEncoder
from ...ipadapter_core.features import Encoded
from ...ipadapter_core.files.state_dict import StoredTensors, describe_state_dict
from ...ipadapter_core.images.towers import SIGLIP, kind_of, read_head, read_tower, resized_positions
from . import files


def widths(file: str) -> tuple[int, int] | None:
    """Hidden size and projection width (0: it has none) of an image encoder's file; None if it is none."""
    try:
        shapes = describe_state_dict(files.path("clip_vision", file)).tensors
    except (AdapterError, OSError):
        return None
    found = kind_of(shapes)
    if found is not None:
        kind, prefix = found
        patches = next(
            (t for k, t in shapes.items() if kind.module_key(k.removeprefix(prefix)) == "patches.weight"), None
        )
        return None if patches is None else (int(patches.shape[0]), 0)
    hidden = next((t.shape[0] for k, t in shapes.items() if k.endswith("class_embedding")), None)
    width = next((t.shape for k, t in shapes.items() if k.endswith(("visual_projection.weight", "visual.proj"))), None)
    if hidden is None or width is None:
        return None
    return int(hidden), int(width[0] if width[1] == hidden else width[1])


class LoadedTower:
    """A SigLIP, DINOv2 or PE-Core of the core on a CLIP_VISION socket, under ComfyUI's memory manager.

    Nodes of others that take CLIP_VISION get from ``encode_image`` what ComfyUI's own SigLIP and DINOv2 give them.
    """

    def __init__(self, tower: nn.Module, encoder: TowerEncoder) -> None:
        self.load_device = comfy.model_management.text_encoder_device()
        offload = comfy.model_management.text_encoder_offload_device()
        self.patcher = ModelPatcher(tower, load_device=self.load_device, offload_device=offload)
        self.encoder = encoder

    @property
    def model(self) -> nn.Module:
        return self.patcher.model

    def encode_image(self, image: Tensor, crop: bool = True) -> Any:
        """What ComfyUI's encoders give of pictures ``b y x c``, for other nodes."""
        seen_by = TowerVision(self)
        pixels = comfy.clip_vision.clip_preprocess(
            image.to(self.load_device), size=seen_by.image_size, mean=[*seen_by.mean], std=[*seen_by.std], crop=crop
        )
        seen = seen_by.encode(pixels)
        output: Any = comfy.clip_vision.Output()
        output.last_hidden_state, output.penultimate_hidden_states = seen.last, seen.penultimate
        output.image_embeds, output.mm_projected = seen.last, None
        return output


_CLIP_VISION: WeakValueDictionary[files.Version, Any] = WeakValueDictionary()


def load(file: str) -> Any:
    """The CLIP_VISION of a file, one copy however many nodes load it: ComfyUI's of CLIP, the core's of the others."""
    key = path, *_ = files.version("clip_vision", file)
    model = _CLIP_VISION.get(key)
    if model is None:
        model = _tower(path) or comfy.clip_vision.load(path)
        if model is None:
            raise InvalidInputError(
                f"{file} in models/clip_vision is no image encoder that ComfyUI or this pack knows: CLIP, SigLIP, SigLIP 2 of a "
                "fixed size, DINOv2 and PE-Core were expected"
            )
        _CLIP_VISION[key] = model
    return model


def _tower(path: str) -> LoadedTower | None:
    stored = StoredTensors(path)
    found = kind_of(stored.described.tensors)
    if found is None:
        return None
    needed = [key for key in stored.described.tensors if key.startswith(found[1])]
    tower = read_tower(stored.read_some(needed), operations=comfy.ops.manual_cast)
    assert tower is not None
    dtype = comfy.model_management.text_encoder_dtype(comfy.model_management.text_encoder_device())
    return LoadedTower(tower.to(dtype), TowerEncoder(tower, casts_weights=True))


def encoder_of(clip_vision: Any) -> ImageEncoder:
    """What a CLIP_VISION input carries as the core's ImageEncoder. Raises InvalidInputError for what is no image encoder."""
    if clip_vision is None:
        raise InvalidInputError("no image encoder is connected: connect Load CLIP Vision to clip_vision")
    if isinstance(clip_vision, LoadedTower):
        return TowerVision(clip_vision)
    model = clip_vision.model
    if hasattr(getattr(model, "embeddings", None), "position_embeddings") and hasattr(model, "encoder"):
        return DinoVision(clip_vision)
    return ClipVisionEncoder(clip_vision)


class TowerVision:
    """A LoadedTower as the core's ImageEncoder."""

    projection_dim = 0

    def __init__(self, loaded: LoadedTower) -> None:
        self._loaded, encoder = loaded, loaded.encoder
        self.name, self.hidden_size, self.image_size = encoder.name, encoder.hidden_size, encoder.image_size
        self.mean, self.std, self.gives = encoder.mean, encoder.std, encoder.gives

    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        seen = self._loaded.encoder.encode(self._ready(pixel_values))
        device = comfy.model_management.intermediate_device()
        pooled, last = (None if t is None else t.to(device) for t in (seen.pooled, seen.last))
        return ImageFeatures(seen.image_embeds.to(device), seen.penultimate.to(device), pooled, last)

    def states(self, pixel_values: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, dict[int, Tensor]]:
        return _kept(*self._loaded.encoder.states(self._ready(pixel_values), layers))

    def _ready(self, pixels: Tensor) -> Tensor:
        comfy.model_management.load_models_gpu([self._loaded.patcher])
        return pixels.to(self._loaded.load_device, torch.float32)


class ClipVisionEncoder:
    """ComfyUI's CLIP_VISION of CLIP or SigLIP as the core's ImageEncoder.

    Of SigLIP ComfyUI drops the pooling head; it is read from the same weights' file in models/clip_vision.
    """

    def __init__(self, clip_vision: Any) -> None:
        self._clip_vision = clip_vision
        model = clip_vision.model
        embeddings = getattr(getattr(model, "vision_model", None), "embeddings", None)
        if embeddings is None:
            raise InvalidInputError(
                f"the CLIP vision input is a {type(model).__name__}; image prompts need a CLIP, SigLIP or DINOv2 vision model, such as "
                "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors in models/clip_vision"
            )
        self._siglip = getattr(embeddings, "class_embedding", None) is None
        self.hidden_size = int(embeddings.patch_embedding.weight.shape[0])
        projection = getattr(model.visual_projection, "weight", None)
        plain = 0 if self._siglip else self.hidden_size
        self.projection_dim = plain if projection is None else int(projection.shape[0])
        self.image_size = int(clip_vision.image_size)
        self.mean = tuple(clip_vision.image_mean)
        self.std = tuple(clip_vision.image_std)
        kind = "SigLIP" if self._siglip else "CLIP"
        self.name = f"{kind} vision model ({self.hidden_size} wide, {self.image_size} px)"

    @property
    def gives(self) -> tuple[Encoded, ...]:
        return ("penultimate", "last", "pooled") if self._head() is not None else ("penultimate", "last")

    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        last, penultimate, embeds, *_ = self._run(pixel_values, -2)
        head, pooled = self._head(), None
        if head is not None:
            comfy.model_management.load_models_gpu([head])
            pooled = head.model(last.to(head.load_device, torch.float32))
        device = comfy.model_management.intermediate_device()
        last, penultimate = last.to(device), penultimate.to(device)
        embeds = embeds.to(device) if self.projection_dim else last[:, 0, :0]
        return ImageFeatures(embeds, penultimate, None if pooled is None else pooled.to(device), last)

    def states(self, pixel_values: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, dict[int, Tensor]]:
        """The last hidden state ``b t c``, and the outputs of ``layers`` (1: of the first), without a final norm."""
        last, every, *_ = self._run(pixel_values, "all" if layers else None)
        return _kept(last, {number: every[:, number - 1] for number in layers})

    def _run(self, pixel_values: Tensor, layers: int | str | None) -> tuple[Any, ...]:
        comfy.model_management.load_models_gpu([self._clip_vision.patcher])
        pixels = pixel_values.to(self._clip_vision.load_device, torch.float32)
        return self._clip_vision.model(pixel_values=pixels, intermediate_output=layers)

    def _head(self) -> ModelPatcher | None:
        if not self._siglip:
            return None
        model = self._clip_vision.model
        if model not in _HEADS:
            _HEADS[model] = _find_head(model.vision_model)
        return _HEADS[model]


_HEADS: WeakKeyDictionary[nn.Module, ModelPatcher | None] = WeakKeyDictionary()
"""The pooling heads of SigLIPs that ComfyUI loaded; None where no file of its weights has one."""


def _find_head(vision: Any) -> ModelPatcher | None:
    """The pooling head in the file that a SigLIP came from: the one in models/clip_vision that has the same weights."""
    norm = vision.post_layernorm.weight.detach().float().cpu()
    for file in files.names("clip_vision"):
        try:
            stored = StoredTensors(files.path("clip_vision", file))
            found = kind_of(stored.described.tensors)
            if found is None or found[0] is not SIGLIP or f"{found[1]}head.probe" not in stored.described.tensors:
                continue
            key = f"{found[1]}post_layernorm.weight"
            if stored.described.tensors[key].shape != norm.shape:
                continue
            theirs = stored.read(key).to(vision.post_layernorm.weight.dtype).float()
            if not torch.equal(theirs, norm):
                continue
            needed = [name for name in stored.described.tensors if name.startswith(f"{found[1]}head.")]
            head = read_head(
                {name.removeprefix(found[1]): t for name, t in stored.read_some(needed).items()}, comfy.ops.manual_cast
            )
        except (AdapterError, OSError, KeyError):  # damaged, or gone: as if it were not there
            continue
        device = comfy.model_management.text_encoder_device()
        return ModelPatcher(
            head, load_device=device, offload_device=comfy.model_management.text_encoder_offload_device()
        )
    return None


class DinoVision:
    """ComfyUI's CLIP_VISION of a DINOv2 as the core's ImageEncoder: its inner layers, at any size.

    The layers are run one by one, as ComfyUI 0.3.64 gives none of them and knows no other size than 518.
    """

    projection_dim = 0
    gives: tuple[Encoded, ...] = ("penultimate", "last")

    def __init__(self, clip_vision: Any) -> None:
        self._clip_vision = clip_vision
        embeddings = clip_vision.model.embeddings
        self.hidden_size = int(embeddings.position_embeddings.shape[-1])
        self.image_size = int(clip_vision.image_size)
        self.mean, self.std = tuple(clip_vision.image_mean), tuple(clip_vision.image_std)
        self.name = f"DINOv2 vision model ({self.hidden_size} wide, {self.image_size} px)"

    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        depth = len(self._clip_vision.model.encoder.layer)
        last, kept = self.states(pixel_values, (depth - 1,))
        return ImageFeatures(last[:, 0, :0], kept.get(depth - 1, last), last=last)

    @torch.no_grad()
    def states(self, pixel_values: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, dict[int, Tensor]]:
        """The last hidden state ``b t c``, and the outputs of ``layers`` (1: of the first), without a final norm."""
        comfy.model_management.load_models_gpu([self._clip_vision.patcher])
        model, pixels = self._clip_vision.model, pixel_values.to(self._clip_vision.load_device, torch.float32)
        embeddings = model.embeddings
        patch = embeddings.patch_embeddings.projection.weight.shape[-1]
        rows, columns = (side // patch for side in pixels.shape[-2:])
        x = embeddings.patch_embeddings(pixels)
        x = torch.cat([embeddings.cls_token.to(x).expand(len(x), -1, -1), x], 1)
        x = x + resized_positions(embeddings.position_embeddings[0].to(x), rows, columns)
        attend = comfy.ldm.modules.attention.optimized_attention_for_device(x.device, False, small_input=True)
        kept: dict[int, Tensor] = {}
        for number, layer in enumerate(model.encoder.layer, 1):
            x = layer(x, attend)
            if number in layers:
                kept[number] = x
        return _kept(model.layernorm(x), kept)


def _kept(last: Tensor, layers: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    device = comfy.model_management.intermediate_device()
    return last.to(device), {number: t.to(device) for number, t in layers.items()}
