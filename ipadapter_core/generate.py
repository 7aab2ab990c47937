"""Headless generation: a pipeline of diffusers, adapters and reference images to pictures."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from .attention.masks import RegionMask
from .attention.patch import AdapterPatch
from .attention.schedule import WeightSchedule
from .backends.diffusers.doors import apply_to_pipeline
from .backends.diffusers.pipelines import model_of
from .bake import bake, check_adapter
from .checkpoints import AdapterWeights
from .errors import InvalidInputError
from .features import ImageEncoder
from .files.text import read_bytes
from .files.whole import written_whole
from .images.encoder import TowerEncoder, TransformersImageEncoder
from .images.encoder import load_image_encoder as load_encoder
from .images.files import MAX_FILE, decode_grey, read_picture, to_tensor
from .models import family_of, layout_of
from .prompt.encode import encode_image_prompt
from .prompt.options import EncodeOptions

Encoder = TransformersImageEncoder | TowerEncoder
"""An image encoder that was read from files."""


def load_image_encoders(
    model: str | Path, encoders: Sequence[str | Path], adapter: AdapterWeights
) -> tuple[Encoder, ...]:
    """The encoders in these folders or files, or those that lie in the model folder; checked against the adapter's needs later."""
    if encoders:
        return tuple(map(load_encoder, encoders))
    inside = [name for name in ("image_encoder", "image_encoder_2") if (Path(model) / name / "config.json").is_file()]
    if not inside:
        raise InvalidInputError(
            f"{model} has no image_encoder folder; pass --image-encoder with the one {adapter.name!r} was trained with "
            f"({adapter.spec.encoder}, {adapter.spec.feature_dim} wide {adapter.spec.feature})"
        )
    return tuple(load_encoder(model, subfolder=name) for name in inside)


def load_image_encoder(model: str | Path, encoder: str | Path | None, adapter: AdapterWeights) -> Encoder:
    """Like ``load_image_encoders``, for an adapter that reads one."""
    return load_image_encoders(model, () if encoder is None else (encoder,), adapter)[0]


def read_image(path: str | Path) -> Tensor:
    """A picture file as ``1 y x 3|4`` in 0..1, upright (EXIF); alpha is kept.

    Raises FileNotFoundError, InvalidInputError or CorruptFileError.
    """
    return to_tensor(read_picture(path))[None]


def read_mask(path: str | Path) -> RegionMask:
    """A picture file as region mask; white is where the image acts. Raises as ``read_image``."""
    return RegionMask.from_tensor(decode_grey(read_bytes(path, MAX_FILE), str(path)))


def prepare_patch(
    pipeline: Any,
    adapter: AdapterWeights,
    encoder: ImageEncoder | Sequence[ImageEncoder],
    images: Sequence[Tensor],
    options: EncodeOptions | None = None,
    schedule: WeightSchedule | None = None,
    mask: RegionMask | None = None,
) -> AdapterPatch:
    """Encode references and bake them for the pipeline's UNet or transformer; every check comes before any computing."""
    layout, schedule = layout_of(model_of(pipeline)), schedule or WeightSchedule()
    check_adapter(adapter, layout)
    schedule.site_weights(layout)
    return bake(adapter, encode_image_prompt(adapter, encoder, images, options), layout, schedule, mask)


def generate(
    pipeline: Any,
    patches: Sequence[AdapterPatch],
    prompts: Sequence[str],
    *,
    negative: str = "",
    steps: int = 30,
    guidance: float = 7.5,
    true_guidance: float = 1.0,
    seeds: Sequence[int],
    height: int | None = None,
    width: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """One picture per prompt and seed (same length), ``b y x 3`` in 0..1. The pipeline is as before afterwards.

    Some models are distilled: ``guidance`` is one of their inputs (FLUX.1), and the negative prompt acts only with a
    ``true_guidance`` above 1, which runs every step twice. Elsewhere ``guidance`` is true already.
    Raises InvalidInputError where one of these would do nothing.
    """
    if len(prompts) != len(seeds) or not seeds:
        raise InvalidInputError(
            f"generate() needs one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds"
        )
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def report(_: object, step: int, __: object, values: dict[str, object]) -> dict[str, object]:
        if progress is not None:
            progress(step + 1, steps)
        return values

    given = _guidance(pipeline, len(prompts), negative, guidance, true_guidance)
    pipeline.set_progress_bar_config(disable=True)
    applied = apply_to_pipeline(pipeline, *patches) if patches else None
    try:
        out = pipeline(
            prompt=list(prompts),
            num_inference_steps=steps,
            generator=generators,
            height=height,
            width=width,
            output_type="pt",
            callback_on_step_end=report,
            **given,
        )
    finally:
        if applied is not None:
            applied.remove()
    return out.images.float().permute(0, 2, 3, 1).clamp(0, 1).cpu()


def _guidance(pipeline: Any, count: int, negative: str, guidance: float, true_guidance: float) -> dict[str, object]:
    """What a pipeline is called with for its guidance and negative prompts."""
    given: dict[str, object] = {"guidance_scale": guidance}
    if "true_cfg_scale" not in inspect.signature(type(pipeline).__call__).parameters:
        if true_guidance != 1.0:
            raise InvalidInputError(
                f"true guidance is {true_guidance:g}, but a {type(pipeline).__name__} has one guidance, which is true already: set "
                "guidance, and leave true guidance at 1"
            )
        return given | {"negative_prompt": [negative] * count}
    if negative and true_guidance <= 1.0:
        raise InvalidInputError(
            f"the negative prompt does nothing in a {type(pipeline).__name__}, whose model is distilled, unless true guidance is above "
            "1: set it to 2 to 4, or leave the negative prompt out"
        )
    given |= {"true_cfg_scale": true_guidance, "negative_prompt": [negative] * count if true_guidance > 1.0 else None}
    return given | {"max_sequence_length": 256} if _few_steps(pipeline) else given


def usual_sampling(pipeline: Any) -> tuple[int, float]:
    """Steps and guidance that people use with a pipeline's model."""
    family = family_of(model_of(pipeline))
    return (4, 0.0) if _few_steps(pipeline) else (family.steps, family.guidance)


def _few_steps(pipeline: Any) -> bool:
    """Whether a model was distilled to a few steps without guidance, and short prompts (FLUX.1 schnell)."""
    config: Any = model_of(pipeline).config
    return config.get("guidance_embeds") is False


def to_pillow(image: Tensor) -> Image.Image:
    """``y x 3`` in 0..1 as an 8-bit picture."""
    return Image.fromarray((image * 255).round().to(torch.uint8).numpy())


def save_picture(image: Image.Image, path: Path, facts: Mapping[str, object]) -> None:
    """Write a PNG with its facts as JSON in the text chunk ``ipadapter``; the file appears whole or not at all."""
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("ipadapter", json.dumps(facts))
    with written_whole(path) as place:
        image.save(place, format="PNG", pnginfo=chunk)


def grid_of(images: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures of one size on a white sheet, row by row."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    w, h = images[0].size
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (w + gap), (i // columns) * (h + gap)))
    return sheet
