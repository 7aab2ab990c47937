"""Headless generation: a diffusers model folder, adapters and reference images to pictures."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from .attention.masks import RegionMask
from .attention.patch import AdapterPatch
from .attention.schedule import WeightSchedule
from .backends.diffusers.doors import apply_to_pipeline
from .bake import bake, check_adapter
from .checkpoints import AdapterWeights
from .errors import CorruptFileError, InvalidInputError, UnsafeFileError, out_of_memory, quoted, reason
from .features import ImageEncoder
from .files.text import read_bytes, read_json, regular_file
from .files.whole import written_whole
from .images.encoder import TowerEncoder, TransformersImageEncoder
from .images.encoder import load_image_encoder as load_encoder
from .images.files import MAX_FILE, decode_grey, read_picture, to_tensor
from .models import layout_of
from .narrowing import is_table
from .prompt.encode import encode_image_prompt
from .prompt.options import EncodeOptions
from .quiet import quietly


def load_pipeline(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The text-to-image pipeline in a diffusers model folder (SD1.5, SD2, SDXL or the demo world).

    Only local files are read. Raises InvalidInputError if the folder holds no such pipeline.
    """
    if not (Path(folder) / "model_index.json").is_file():
        raise InvalidInputError(f"{folder} is not a diffusers model folder: it has no model_index.json")
    check_configs(Path(folder))
    try:
        with quietly("diffusers", "transformers"):
            from diffusers import DiffusionPipeline

            pipeline: Any = DiffusionPipeline.from_pretrained(folder, **{_dtype_name(): dtype}, local_files_only=True)
    except Exception as error:  # diffusers and transformers let every kind through
        if out_of_memory(error):
            raise
        raise CorruptFileError(
            f"{quoted(folder)} cannot be loaded as a diffusers pipeline ({reason(error)}): download it again"
        ) from error
    for part in ("unet", "vae", "text_encoder"):
        if getattr(pipeline, part, None) is None:
            raise InvalidInputError(
                f"{folder} holds a {type(pipeline).__name__} without {part}; image prompts need an SD1.5, SD2 or SDXL pipeline"
            )
    if hasattr(pipeline, "safety_checker"):
        pipeline.safety_checker = None
    return pipeline.to(device)


CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
"""What diffusers and transformers read of a model's parts before any weights."""

LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
"""Where the parts of pipelines come from; the third is where old folders have their safety checker."""

MAX_TIMESTEPS = 100_000
"""Of a scheduler, which makes tables of as many numbers; published models have 1000."""


def check_configs(folder: Path) -> None:
    """Read the configs of a diffusers folder before diffusers does, whose readers hang at pipes and fail in many ways.

    Raises InvalidInputError for what is no plain file, CorruptFileError for what is no table of JSON, UnsafeFileError for a
    folder that brings code, which older versions of diffusers run unasked.
    """
    code = next((path for pattern in ("*.py", "*/*.py") for path in folder.glob(pattern)), None)
    parts: list[list[object]] = [
        part for part in read_table(folder / "model_index.json").values() if isinstance(part, list)
    ]
    if code is not None or any(part[:1] and part[0] not in LIBRARIES for part in parts):
        raise UnsafeFileError(
            f"{quoted(folder)} brings code of its own ({quoted(code.name) if code else 'model_index.json names it'}), which is not run; "
            "choose a folder whose parts are of diffusers and transformers"
        )
    for path in sorted(folder.glob("*/*")):
        if path.exists() and not path.is_dir():
            regular_file(path)
    for path in (folder / "model_index.json", *(path for name in CONFIGS for path in sorted(folder.glob(f"*/{name}")))):
        config = read_table(path)
        steps = config.get("num_train_timesteps", 0)
        if not isinstance(steps, int) or not 0 <= steps <= MAX_TIMESTEPS:
            raise CorruptFileError(f"{quoted(path)}: num_train_timesteps is {quoted(steps)}; 1000 is usual")


def read_table(path: Path) -> dict[str, Any]:
    """The table in a JSON file. Raises as ``text_files.read_json``, and CorruptFileError for any other value."""
    table = read_json(path)
    if not is_table(table):
        raise CorruptFileError(f"{quoted(path)} holds no table of settings; download it again")
    return table


def hold_in_memory(module: nn.Module) -> None:
    """Copy weights on the CPU, which may be mapped from their files: a file that is replaced then kills no process."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()


def _dtype_name() -> str:
    import diffusers
    from packaging.version import Version

    return "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"  # deprecated since


def load_image_encoder(
    model: str | Path, encoder: str | Path | None, adapter: AdapterWeights
) -> TransformersImageEncoder | TowerEncoder:
    """The encoder in ``encoder``, or the one that lies in the model folder; checked against the adapter's needs later."""
    if encoder is not None:
        return load_encoder(encoder)
    if not (Path(model) / "image_encoder" / "config.json").is_file():
        raise InvalidInputError(
            f"{model} has no image_encoder folder; pass --image-encoder with the one {adapter.name!r} was trained with "
            f"({adapter.spec.encoder}, {adapter.spec.feature_dim} wide {adapter.spec.feature})"
        )
    return load_encoder(model, subfolder="image_encoder")


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
    encoder: ImageEncoder,
    images: Sequence[Tensor],
    options: EncodeOptions | None = None,
    schedule: WeightSchedule | None = None,
    mask: RegionMask | None = None,
) -> AdapterPatch:
    """Encode references and bake them for the pipeline's UNet; every check comes before any computing."""
    layout, schedule = layout_of(pipeline.unet), schedule or WeightSchedule()
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
    seeds: Sequence[int],
    height: int | None = None,
    width: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """One picture per prompt and seed (same length), ``b y x 3`` in 0..1. The pipeline is as before afterwards."""
    if len(prompts) != len(seeds) or not seeds:
        raise InvalidInputError(
            f"generate() needs one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds"
        )
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def report(_: object, step: int, __: object, values: dict[str, object]) -> dict[str, object]:
        if progress is not None:
            progress(step + 1, steps)
        return values

    pipeline.set_progress_bar_config(disable=True)
    applied = apply_to_pipeline(pipeline, *patches) if patches else None
    try:
        out = pipeline(
            prompt=list(prompts),
            negative_prompt=[negative] * len(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            height=height,
            width=width,
            output_type="pt",
            callback_on_step_end=report,
        )
    finally:
        if applied is not None:
            applied.remove()
    return out.images.float().permute(0, 2, 3, 1).clamp(0, 1).cpu()


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
