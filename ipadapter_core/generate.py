"""Headless generation: a pipeline of diffusers, adapters and reference images to pictures."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from .attention.map_pictures import draw_maps, draw_sites
from .attention.masks import RegionMask
from .attention.patch import AdapterPatch
from .attention.recording import AttentionMaps, Recorder
from .attention.schedule import WeightSchedule
from .backends.diffusers.doors import apply_to_pipeline
from .backends.diffusers.pipelines import model_of
from .bake import bake, check_adapter
from .checkpoints import AdapterWeights
from .errors import AdapterError, InvalidInputError, quoted, reason
from .features import ImageEncoder
from .files.text import read_bytes
from .files.whole import written_whole
from .images.encoder import TowerEncoder, TransformersImageEncoder
from .images.encoder import load_image_encoder as load_encoder
from .images.files import MAX_FILE, decode_grey, read_picture, to_tensor
from .models import family_of, layout_of
from .prompt.encode import encode_image_prompt
from .prompt.options import EncodeOptions
from .quiet import quietly
from .recipe import CHUNK, PARAMETERS

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


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """A picture to begin with, ``y x 3`` in 0..1, how much of it is drawn anew (1: all), and in which region (``y x``, white)."""

    picture: Tensor
    denoise: float = 0.75
    inpaint: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.denoise <= 1:
            raise InvalidInputError(
                f"denoise is {self.denoise:g}; it is the share of the steps that are sampled, above 0 and at most 1"
            )
        if self.inpaint is not None and self.inpaint.shape[-2:] != self.picture.shape[:2]:
            raise InvalidInputError(
                f"the inpainting mask is {self.inpaint.shape[-1]}x{self.inpaint.shape[-2]} and the picture "
                f"{self.picture.shape[1]}x{self.picture.shape[0]} (width x height); they must have one size"
            )

    def sampled(self, steps: int) -> int:
        """How many of the steps are sampled. Raises InvalidInputError for none."""
        sampled = min(int(steps * self.denoise), steps)
        if sampled < 1:
            raise InvalidInputError(
                f"denoise {self.denoise:g} of {steps} steps leaves none to sample: raise one of the two"
            )
        return sampled


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
    beginning: Beginning | None = None,
    recorder: Recorder | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """One picture per prompt and seed (same length), ``b y x 3`` in 0..1. The pipeline is as before afterwards.

    Some models are distilled: ``guidance`` is one of their inputs (FLUX.1), and the negative prompt acts only with a
    ``true_guidance`` above 1, which runs every step twice. Elsewhere ``guidance`` is true already. With a ``beginning`` the
    pictures are as large as it, unless sizes are given, and outside of its region they are it, pixel for pixel. A ``recorder`` hears
    where the image prompts act.
    Raises InvalidInputError where one of these would do nothing.
    """
    if len(prompts) != len(seeds) or not seeds:
        raise InvalidInputError(
            f"generate() needs one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds"
        )
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise InvalidInputError(f"the seed {quoted(seed)} is no number from 0 to {2**63 - 1}")
    pipeline = _task(pipeline, beginning)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    sampled, begun, more, kept = steps, dict[str, Tensor](), dict[str, object](), None
    if beginning is not None:
        height, width = size_for(pipeline, beginning.picture, height, width)
        begun, more = _resized(beginning, height, width, len(seeds)), {"strength": beginning.denoise}
        if "mask_image" in begun and "Inpaint" not in type(pipeline).__name__:
            kept = _Kept(pipeline, begun["image"], begun["mask_image"], seeds)
        sampled = beginning.sampled(steps)

    def report(_: object, step: int, timestep: object, values: dict[str, Any]) -> dict[str, Any]:
        if progress is not None:
            progress(step + 1, sampled)
        return values if kept is None else {**values, "latents": kept.around(values["latents"], timestep)}

    given = _guidance(pipeline, len(prompts), negative, guidance, true_guidance)
    pipeline.set_progress_bar_config(disable=True)
    applied = apply_to_pipeline(pipeline, *patches) if patches else None
    if applied is not None:
        applied.record(recorder)
    try:
        out = pipeline(
            prompt=list(prompts),
            num_inference_steps=steps,
            generator=generators,
            output_type="pt",
            callback_on_step_end=report,
            **_taken(pipeline, height=height, width=width, **begun, **more),
            **given,
        )
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise InvalidInputError(f"diffusers' {type(pipeline).__name__} cannot do this ({reason(error)})") from error
    finally:
        if applied is not None:
            applied.remove()
    made = out.images.float().permute(0, 2, 3, 1).clamp(0, 1).cpu()
    if beginning is None or beginning.inpaint is None:
        return made
    before, inside = begun["image"].permute(0, 2, 3, 1), begun["mask_image"].permute(0, 2, 3, 1)
    return torch.where(inside > 0, made * inside + before * (1 - inside), before)


def _task(pipeline: Any, beginning: Beginning | None) -> Any:
    """The pipeline of the same parts that does what is asked."""
    name = type(pipeline).__name__
    if beginning is None:
        if "mask_image" in inspect.signature(type(pipeline).__call__).parameters:
            raise InvalidInputError(
                f"a {name} paints into a picture: give one with --init, and a region with --inpaint-mask"
            )
        return pipeline
    import diffusers

    # diffusers' inpainting pipelines know UNets of 4 and 9 channels; what is to stay is kept here for all but the latter
    inside = beginning.inpaint is not None and (not hasattr(pipeline, "unet") or _reads_masks(pipeline))
    stem = name.removesuffix("Pipeline").removesuffix("Img2Img").removesuffix("Inpaint")
    wanted = f"{stem}{'Inpaint' if inside else 'Img2Img'}Pipeline"
    kind: Any = getattr(diffusers, wanted, None)
    if kind is None:
        raise InvalidInputError(
            f"diffusers {diffusers.__version__} has no {wanted}, so a {name} cannot {'paint into' if inside else 'begin with'} a picture: leave --init out, or "
            "choose a model that can (SD1.5, SDXL, SD3.5, FLUX.1)"
        )
    if beginning.inpaint is None and _reads_masks(pipeline):
        raise InvalidInputError(f"the UNet of this {name} reads a region: give one with --inpaint-mask")
    known = inspect.signature(kind.__init__).parameters
    parts = {part: value for part, value in pipeline.components.items() if part in known}
    if "requires_safety_checker" in known:
        parts["requires_safety_checker"] = False
    with quietly("diffusers"):
        return pipeline if type(pipeline) is kind else kind(**parts)


def _reads_masks(pipeline: Any) -> bool:
    """Whether a UNet was trained for inpainting: it has more channels than the latents."""
    return hasattr(pipeline, "unet") and pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels


class _Kept:
    """What lies outside of the region, which every step finds as the picture with the noise of that step (latent blending)."""

    def __init__(self, pipeline: Any, image: Tensor, inside: Tensor, seeds: Sequence[int]) -> None:
        self._scheduler = pipeline.scheduler
        self._latents = _encoded(pipeline.vae, image[:1] * 2 - 1)
        self._inside = F.interpolate((inside[:1] > 0).float(), self._latents.shape[-2:], mode="nearest")
        draws = [
            torch.randn(self._latents.shape[1:], generator=torch.Generator().manual_seed(seed ^ 1)) for seed in seeds
        ]
        self._noise = torch.stack(draws)

    def around(self, latents: Tensor, timestep: Any) -> Tensor:
        """The latents ``b c y x`` behind the step of a timestep, outside of the region replaced."""
        scheduler, before = self._scheduler, self._latents.to(latents)
        times, at = scheduler.timesteps, getattr(scheduler, "step_index", None)
        if not isinstance(at, int):  # DDIM counts no steps
            at = int((times == timestep).nonzero()[-1]) + 1
        if at < len(times):
            before = scheduler.add_noise(before, self._noise.to(latents), times[at : at + 1])
        return torch.where(self._inside.to(latents.device) > 0, latents, before)


@torch.no_grad()
def _encoded(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels ``1 3 y x`` in -1..1 as scaled latents. SDXL's autoencoder overflows in half precision."""
    overflows = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if overflows:
        vae.to(dtype=torch.float32)
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    if overflows:
        vae.to(dtype=torch.float16)
    mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (mean.float() - shift) * vae.config.scaling_factor


def _taken(pipeline: Any, **values: object) -> dict[str, object]:
    """Those of the values that a pipeline's call takes: img2img pipelines of UNets are as large as their picture."""
    known = inspect.signature(type(pipeline).__call__).parameters
    return {name: value for name, value in values.items() if name in known}


def size_for(pipeline: Any, picture: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
    """The size of what is drawn over a picture: as given, else the picture's proportions with at most the model's own pixels.

    Sides are multiples of what the pipeline's latents and patches stand for.
    """
    patch: int = getattr(getattr(pipeline, "transformer", None), "config", {}).get("patch_size", 1) or 1
    vae = getattr(pipeline, "vae_scale_factor", 8)
    step = max(vae * (2 if type(pipeline).__name__.startswith("Flux") else patch), 1)
    h, w = (int(side) for side in picture.shape[:2])
    own = getattr(pipeline, "default_sample_size", None)
    if not isinstance(own, int):
        own = getattr(model_of(pipeline), "config", {}).get("sample_size")
    most = own * vae if isinstance(own, int) else 1024
    scale = min(1.0, math.sqrt(most * most / (h * w)))
    fitted = [max(step, round(side * scale / step) * step) for side in (h, w)]
    return (height or fitted[0]), (width or fitted[1])


def _resized(beginning: Beginning, height: int, width: int, count: int) -> dict[str, Tensor]:
    """Picture and region as the pipelines take them, ``b c y x``: cut to the proportions, then resized."""
    given = {"image": beginning.picture.permute(2, 0, 1)[None, :3]}
    if beginning.inpaint is not None:
        given["mask_image"] = beginning.inpaint[None, None]
    return {name: _cover(pixels.float(), height, width).expand(count, -1, -1, -1) for name, pixels in given.items()}


def _cover(pixels: Tensor, height: int, width: int) -> Tensor:
    """``1 c y x`` at another size, its middle where the proportions differ."""
    h, w = pixels.shape[-2:]
    if (h, w) == (height, width):
        return pixels
    scale = max(height / h, width / w)
    size = max(height, round(h * scale)), max(width, round(w * scale))
    pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def _guidance(pipeline: Any, count: int, negative: str, guidance: float, true_guidance: float) -> dict[str, object]:
    """What a pipeline is called with for its guidance and negative prompts."""
    check_guidance(type(pipeline), negative, true_guidance)
    given: dict[str, object] = {"guidance_scale": guidance}
    if not _distilled(type(pipeline)):
        return given | {"negative_prompt": [negative] * count}
    given |= {"true_cfg_scale": true_guidance, "negative_prompt": [negative] * count if true_guidance > 1.0 else None}
    longest = min(256 if _few_steps(pipeline) else 512, _longest_text(pipeline))
    return given | {"max_sequence_length": longest} if longest < 512 else given


def _longest_text(pipeline: Any) -> int:
    """How many tokens the second text encoder of a FLUX.1 pipeline takes; T5, the published models', takes any number."""
    config: Any = getattr(getattr(pipeline, "text_encoder_2", None), "config", None)
    return getattr(config, "max_position_embeddings", None) or 512


def check_guidance(kind: type, negative: str, true_guidance: float) -> None:
    """Raise InvalidInputError where a negative prompt or true guidance would do nothing in pipelines of a kind."""
    if not _distilled(kind):
        if true_guidance != 1.0:
            raise InvalidInputError(
                f"true guidance is {true_guidance:g}, but a {kind.__name__} has one guidance, which is true already: set guidance, and "
                "leave true guidance at 1"
            )
    elif negative and true_guidance <= 1.0:
        raise InvalidInputError(
            f"the negative prompt does nothing in a {kind.__name__}, whose model is distilled, unless true guidance is above 1: set it "
            "to 2 to 4, or leave the negative prompt out"
        )


def _distilled(kind: type) -> bool:
    """Whether guidance is an input of the model, besides which the pipeline may guide."""
    call: Any = kind.__call__
    return "true_cfg_scale" in inspect.signature(call).parameters


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


def save_picture(
    image: Image.Image, path: Path, facts: Mapping[str, object] | None = None, parameters: str = ""
) -> None:
    """Write a PNG with its facts as JSON in the text chunk ``ipadapter``, and ``parameters`` as web UIs have them.

    The file appears whole or not at all. Raises InvalidInputError where it cannot be written.
    """
    chunk = PngImagePlugin.PngInfo()
    if parameters:
        chunk.add_text(PARAMETERS, parameters)
    if facts is not None:
        chunk.add_text(CHUNK, json.dumps(facts))
    try:
        with written_whole(path) as place:
            image.save(place, format="PNG", pnginfo=chunk)
    except OSError as error:
        raise InvalidInputError(
            f"{quoted(path)} cannot be written ({error.strerror or error}): choose another place, or make room"
        ) from error


def save_maps(
    maps: AttentionMaps, pictures: Sequence[Image.Image], place: str | Path, references: Sequence[Image.Image] = ()
) -> list[Path]:
    """Write where image prompts acted in pictures that were sampled together: heat maps over each, and a bar for every attention.

    ``place`` says where, see ``maps_files``. ``references`` are shown beside their maps. Returns the files. Raises InvalidInputError
    where they cannot be written.
    """
    files = maps_files(place, [f"{number:06d}" for number in range(len(pictures))])
    for number, (picture, both) in enumerate(zip(pictures, files, strict=True)):
        save_map(maps, number, picture, both, references)
    return [file for both in files for file in both]


def save_map(
    maps: AttentionMaps,
    number: int,
    picture: Image.Image,
    files: tuple[Path, Path],
    references: Sequence[Image.Image] = (),
) -> None:
    """The same of one of the pictures that a recording knows by its number."""
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"{quoted(folder)} cannot be the folder for maps ({error.strerror or error}): name another one"
        ) from error
    save_picture(draw_maps(maps, picture, references, number), files[0])
    save_picture(draw_sites(maps, number), files[1])


def maps_files(place: str | Path, names: Sequence[str]) -> list[tuple[Path, Path]]:
    """The files of heat maps and of bars for pictures of these names.

    ``place`` is a folder, or ends in ``.png``: then it is a single picture's heat maps, and of several the beginning of their names.
    """
    place = Path(place)
    if place.suffix.lower() != ".png":
        return [(place / f"{name}-maps.png", place / f"{name}-layers.png") for name in names]
    stems = [place.stem] if len(names) == 1 else [f"{place.stem}-{name}" for name in names]
    return [(place.with_name(f"{stem}.png"), place.with_name(f"{stem}-layers.png")) for stem in stems]


def grid_of(images: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures of one size on a white sheet, row by row."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    w, h = images[0].size
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (w + gap), (i // columns) * (h + gap)))
    return sheet
