"""Image prompts on a pipeline of diffusers in one call: adapter and encoder found, pictures read, encoded, baked and applied."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .attention.masks import RegionMask
from .attention.patch import AdapterPatch
from .attention.presets import SiteRule, parse_site_factors
from .attention.recording import Recorder
from .attention.schedule import Scaling, WeightSchedule, parse_curve
from .backends.diffusers.doors import AppliedAdapters, apply_to_pipeline
from .backends.diffusers.pipelines import model_of
from .bake import bake, check_adapter
from .checkpoints import AdapterSpec, AdapterWeights, load_adapter
from .errors import AdapterError, InvalidInputError
from .features import ENCODERS, ImageEncoder, width_of
from .hub import HubPlace, file_on_disk, folder_on_disk, place_of
from .images.encoder import TowerEncoder, TransformersImageEncoder, load_image_encoder, vision_config
from .images.faces import FaceAnalyzer, open_face_model
from .images.pictures import Picture
from .known_files import choose_encoder
from .models import layout_of
from .models.sites import ModelLayout
from .prompt.encode import encode_image_prompt
from .prompt.faces import encode_face_prompt
from .prompt.needs import files_of
from .prompt.options import EncodeOptions, changed

Encoder = TransformersImageEncoder | TowerEncoder
"""An image encoder that was read from files."""
Source = str | os.PathLike[str]
"""A path, or a place on the Hub such as ``h94/IP-Adapter:models/ip-adapter_sd15.safetensors``."""


def image_prompt(
    pipeline: Any,
    adapter: Source | AdapterWeights,
    image: Picture | Sequence[Picture],
    *,
    strength: float | None = None,
    preset: str = "linear",
    start: float = 0.0,
    end: float = 1.0,
    curve: str | tuple[tuple[float, float], ...] = "",
    sites: str | tuple[SiteRule, ...] = "",
    scaling: Scaling = "V only",
    mask: RegionMask | Picture | None = None,
    negative: Picture | None = None,
    encoder: Source | ImageEncoder | Sequence[Source | ImageEncoder] | None = None,
    faces: Source | FaceAnalyzer | None = None,
    options: EncodeOptions | None = None,
    record: Recorder | None = None,
    **changes: Any,
) -> AppliedAdapters:
    """Let a picture steer a pipeline from its next call on, until ``remove()`` or the end of a ``with`` block.

    ```python
    from ipadapter_core import image_prompt

    with image_prompt(pipeline, "ip-adapter-plus_sd15.safetensors", "cat.png", strength=0.8) as steered:
        pictures = pipeline("a garden").images
        steered.set_strength(0.4)  # encodes nothing again
    ```

    Several adapters act at once where it is called several times, each with its own pictures.

    Where they acted is recorded on demand:

    ```python
    from ipadapter_core import Recorder, image_prompt
    from ipadapter_core.generate import save_maps

    recorder = Recorder()
    with image_prompt(pipeline, "ip-adapter-plus_sd15.safetensors", "cat.png", record=recorder):
        pictures = pipeline("a garden").images
    save_maps(recorder.maps(), pictures, "maps")
    ```

    Args:
        adapter: a file, a place on the Hub, or what ``load_adapter`` gave.
        image: one picture or several, as a path, an array, a tensor or a picture of Pillow, see ``images.pictures.Picture``.
        strength: 0 is no image, 1 as trained; None: what people begin with, 1 for most adapters.
        preset, sites, scaling: where it acts and how, see ``WeightSchedule``; ``sites`` such as ``"all: 0.2, output: 1"``.
        start, end, curve: when it acts, over a progress of 0 (noise) to 1; ``curve`` such as ``"0: 1, 1: 0.3"``.
        mask: where in the picture it acts; white is inside.
        negative: a picture to steer away from.
        encoder: the image encoder, or several for an adapter that reads them; None: the pipeline's own, one near the adapter's
            file, or one that was fetched before (for an adapter from the Hub it is fetched).
        faces: for FaceID adapters, what finds faces: a folder such as ``models/buffalo_l``, or an analyzer.
        options, changes: how references become a prompt, fields of ``EncodeOptions`` (``crop="pad"``).
        record: hears where in the pictures each reference acts, for ``generate.save_maps``; one may hear several image prompts.

    Raises an AdapterError in one sentence for whatever does not fit; the pipeline is then untouched.
    """
    schedule = WeightSchedule(
        strength=1.0 if strength is None else strength,
        preset=preset,
        start_percent=start,
        end_percent=end,
        scaling=scaling,
        site_factors=parse_site_factors(sites) if isinstance(sites, str) else sites,
        curve=parse_curve(curve) if isinstance(curve, str) else curve,
    )
    patch = prompt_patch(
        pipeline,
        adapter,
        image,
        schedule if strength is not None else usual_strength(schedule),
        mask=mask,
        negative=negative,
        encoder=encoder,
        faces=faces,
        options=changed(options, changes),
    )
    applied = apply_to_pipeline(pipeline, patch)
    applied.record(record)
    return applied


def usual_strength(schedule: WeightSchedule) -> Callable[[AdapterSpec], WeightSchedule]:
    """The schedule at the strength that people begin with, which the adapter's family tells."""
    return lambda spec: replace(schedule, strength=spec.format.strength)


def prompt_patch(
    pipeline: Any,
    adapter: Source | AdapterWeights,
    image: Picture | Sequence[Picture],
    schedule: WeightSchedule | Callable[[AdapterSpec], WeightSchedule],
    *,
    mask: RegionMask | Picture | None = None,
    negative: Picture | None = None,
    encoder: Source | ImageEncoder | Sequence[Source | ImageEncoder] | None = None,
    faces: Source | FaceAnalyzer | None = None,
    options: EncodeOptions | None = None,
    home: Path | None = None,
    device: torch.device | None = None,
) -> AdapterPatch:
    """What ``image_prompt`` applies. Everything is checked before an encoder runs; weights that were read go with the call.

    ``home`` is a model folder whose ``image_encoder`` may serve, beside the places where ``image_prompt`` looks. Encoders and
    adapters run on ``device``; None: where the pipeline does.
    """
    model = model_of(pipeline)
    layout, (where, dtype) = layout_of(model), _works_in(pipeline, model)
    device = device or where
    if isinstance(adapter, AdapterWeights):
        weights, source = adapter, None
    else:
        source = adapter
        path = file_on_disk(adapter)
        weights = load_adapter(path, name=path.name, dtype=dtype)
    plan = schedule(weights.spec) if callable(schedule) else schedule
    region = RegionMask.of(mask)
    check_fit(weights, layout, plan, faces)
    feature = weights.spec.format.feature
    if feature.encoded is None:
        seen: tuple[ImageEncoder, ...] = ()
    elif encoder is None:
        seen = find_encoders(weights, pipeline=pipeline, source=source, home=home)
    else:
        listed = encoder if isinstance(encoder, (list, tuple)) else [cast("Source | ImageEncoder", encoder)]
        seen = tuple(
            load_image_encoder(folder_on_disk(one)) if isinstance(one, (str, os.PathLike)) else one for one in listed
        )
    if source is not None:
        weights.module.to(device)
    for one in seen:
        if isinstance(one, (TransformersImageEncoder, TowerEncoder)) and one.model is not getattr(
            pipeline, "image_encoder", None
        ):
            one.model.to(device)
    if feature.embedding is None:
        prompt = encode_image_prompt(weights, seen, image, options, negative=negative)
    else:
        assert faces is not None, "check_fit asks for them"
        prompt = encode_face_prompt(
            weights, face_analyzer(faces), seen[0] if seen else None, _one(image), options, negative=negative
        )[0]
    return bake(weights, prompt, layout, plan, region)


def check_fit(
    adapter: AdapterWeights, layout: ModelLayout, schedule: WeightSchedule, faces: Source | FaceAnalyzer | None
) -> None:
    """Raise what ``prompt_patch`` raises for an adapter, which may be without its numbers, before anything is computed."""
    check_adapter(adapter, layout)
    schedule.site_weights(layout)
    if adapter.spec.format.feature.embedding is not None and faces is None:
        raise InvalidInputError(
            f"{adapter.name} reads faces: say with faces (--face-models) where the face models are, a folder such as "
            "insightface/models/buffalo_l"
        )


def _one(image: Picture | Sequence[Picture]) -> Picture:
    if isinstance(image, (list, tuple)):
        if len(image) != 1:
            raise InvalidInputError(
                f"got {len(image)} pictures for a FaceID adapter; give one, or tensors of one size in one batch"
            )
        return image[0]
    return image  # pyright: ignore[reportReturnType]


def face_analyzer(faces: Source | FaceAnalyzer) -> FaceAnalyzer:
    """What finds faces: an analyzer itself, or that of a folder. Raises InvalidInputError for a folder without its models."""
    if not isinstance(faces, (str, os.PathLike)):
        return faces
    folder = Path(os.path.abspath(faces))
    return open_face_model(folder.parent.parent, folder.name)


def _works_in(pipeline: Any, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device that a pipeline samples on, also where its parts wait elsewhere, and the dtype of its numbers."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    dtype = next((parameter.dtype for parameter in parameters if parameter.itemsize > 1), torch.bfloat16)
    device = getattr(pipeline, "_execution_device", None)
    if not isinstance(device, torch.device) or device.type == "meta":
        device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    return device, dtype


# --- encoders ---------------------------------------------------------------------------------------------------------


def find_encoders(
    adapter: AdapterWeights, *, pipeline: Any = None, source: Source | None = None, home: Path | None = None
) -> tuple[ImageEncoder, ...]:
    """The image encoders that an adapter reads, where people have them.

    Asked in this order: the pipeline's own; the model folder ``home``; what lies beside the adapter's file ``source`` (as in
    h94's repository), or in ComfyUI's folder ``clip_vision`` next to its; the Hub's cache. The Hub itself is asked for an
    adapter that comes from there. Raises InvalidInputError that says which encoder is needed.
    """
    spec = adapter.spec
    own = _of_pipeline(pipeline)
    if own is not None and _fits(spec, own):
        return (own,)
    if home is not None and (inside := _in_folder(spec, home)):
        return inside
    if source is not None and place_of(source) is None:
        near = _near(spec, Path(source))
        if near is not None:
            return (near,)
    found = [_published(name, place_of(source) if source is not None else None) for name in spec.encoders]
    known = tuple(encoder for encoder in found if encoder is not None)
    if len(known) == len(spec.encoders):
        return known
    wanted = (
        " and ".join(filter(None, map(files_of, spec.encoders)))
        or f"the one that it was trained with ({spec.feature_dim} wide {spec.feature})"
    )
    raise InvalidInputError(
        f"{adapter.name} needs its image encoder, which is neither in the model folder nor near the adapter's file: give "
        f"{wanted}, in Python with encoder=, to the command with --image-encoder"
    )


def _fits(spec: AdapterSpec, encoder: ImageEncoder) -> bool:
    encoded = spec.format.feature.encoded
    return (
        encoded is not None
        and len(spec.encoders) == 1
        and not spec.format.feature.looks
        and width_of(encoder, encoded) == spec.feature_dim
    )


def _of_pipeline(pipeline: Any) -> Encoder | None:
    """A pipeline's own image encoder, with the mean and deviation of its pixels, if it is a CLIP."""
    model = getattr(pipeline, "image_encoder", None)
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "projection_dim"):
        return None
    extractor = getattr(pipeline, "feature_extractor", None)
    told = {
        name: tuple(values)
        for name, values in (
            ("mean", getattr(extractor, "image_mean", None)),
            ("std", getattr(extractor, "image_std", None)),
        )
        if isinstance(values, (list, tuple)) and len(values) == 3
    }
    return TransformersImageEncoder(model, **told)  # pyright: ignore[reportArgumentType]


def _in_folder(spec: AdapterSpec, folder: Path) -> tuple[Encoder, ...]:
    """The encoders in a folder, if they are what an adapter reads; they are checked again with the pictures."""
    names = [name for name in ("image_encoder", "image_encoder_2") if (folder / name / "config.json").is_file()]
    return tuple(load_image_encoder(folder, subfolder=name) for name in names)


def _near(spec: AdapterSpec, file: Path) -> Encoder | None:
    """The encoder beside an adapter's file, or in the folder ``clip_vision`` beside the adapter's own."""
    for folder in (file.parent / "image_encoder", file.parent.parent / "image_encoder"):
        if (folder / "config.json").is_file():
            encoder = load_image_encoder(folder)
            if _fits(spec, encoder):
                return encoder
    for folder in (file.parent, file.parent.parent / "clip_vision"):
        files = {path.name: path for path in sorted(folder.glob("*.safetensors"))} if folder.is_dir() else {}
        chosen = choose_encoder(spec, list(files), lambda name: _widths(files[name]))  # noqa: B023
        if chosen is not None:
            return load_image_encoder(files[chosen])
    return None


def _widths(file: Path) -> tuple[int, int] | None:
    """Hidden size and projection width of a CLIP vision tower in one file, from its header."""
    try:
        config = vision_config(file)
    except (AdapterError, OSError):
        return None
    return config["hidden_size"], config["projection_dim"]


def _published(name: str, adapter: HubPlace | None) -> Encoder | None:
    """A published encoder from the Hub's cache, or for an adapter of the Hub from there."""
    for place in _places(name):
        try:
            return load_image_encoder(folder_on_disk(str(place), fetch=adapter is not None))
        except FileNotFoundError:
            continue
    return None


def _places(name: str) -> Iterator[HubPlace]:
    """Where on the Hub an encoder of ``ENCODERS`` is: of its files those with a repository."""
    known = ENCODERS.get(name)
    for file in () if known is None else known.files:
        path, of, repository = file.rpartition(" of ")
        place = HubPlace.read(f"{repository}:{path}" if of else file)
        if place is not None and "(" not in file:
            yield place
