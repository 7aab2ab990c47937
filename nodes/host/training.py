"""Training from a graph: models by folder name, a run in another process, its progress in the node."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import comfy.model_management
import comfy.sd1_clip
import comfy.utils
import folder_paths
import torch
from PIL import Image
from torch import Tensor

from ...ipadapter_core import InvalidInputError
from ...ipadapter_core.checkpoints import format_named
from ...ipadapter_core.demo.world import FOLDER
from ...ipadapter_core.errors import quoted
from ...ipadapter_core.files.access import plain_name
from ...ipadapter_core.files.text import check_length
from ...ipadapter_core.images.files import read_picture, to_tensor
from ...ipadapter_core.images.preprocess import check_finite
from ...ipadapter_core.training.config import Family, Precision, choices_of, parse_config
from ...ipadapter_core.training.job import run_job
from ...ipadapter_core.training.limits import graph_settings
from ...ipadapter_core.training.model_configs import write_model_configs
from ...ipadapter_core.training.results import publish, set_aside
from . import files
from .access import readable, readable_folders, writable
from .frontend import show_in_node

FAMILIES = {name: format_named(name).summary for name in choices_of(Family)}
PRECISIONS = sorted(get_args(Precision))  # bf16 is what the node begins with
DEMO_WORLD = "demo world (no download)"
INSIDE = "inside the base model's folder"
FOLDERS = {"ipadapter": "ipadapter_training", "loras": "lora_training"}
"""By the folder below output that takes results: the one that keeps the states of trainings, which no loader lists."""

TRAIN_PYTHON = "IPADAPTER_TRAIN_PYTHON"
"""Environment variable: the Python that trains, where ComfyUI's own lacks diffusers and accelerate."""

CAPTIONS = 1_000_000
"""Most characters of a graph's captions."""
IMAGES = 10_000
"""Most pictures that a graph may hand over as images; they are written to the disk."""


def model_folders(marker: str, *kinds: str) -> dict[str, Path]:
    """Folders with a file ``marker`` right below models/<kind>, by name."""
    found: dict[str, Path] = {}
    for kind in kinds:
        for root in folder_paths.get_folder_paths(kind):
            for file in sorted(Path(root).glob(f"*/{marker}")):
                found.setdefault(file.parent.name, file.parent)
    return found


def model_files(kind: str) -> dict[str, Path]:
    """The .safetensors of models/<kind> as loaders name them."""
    names = (name for name in folder_paths.get_filename_list(kind) if name.endswith(".safetensors"))
    return {name: Path(path) for name in names if (path := folder_paths.get_full_path(kind, name))}


def base_models() -> dict[str, Path]:
    found = model_files("checkpoints") | model_folders("model_index.json", "diffusers")
    return found | {DEMO_WORLD: FOLDER}


def image_encoders() -> dict[str, Path]:
    return model_files("clip_vision") | model_folders("config.json", "clip_vision", "diffusers")


def make_model_section(name: str, folder: Path) -> dict[str, str]:
    """Settings for a base model of base_models(); the configs of a checkpoint are written into ``folder``.

    Raises InvalidInputError for another name.
    """
    path = _chosen(base_models(), name, "base_model")
    if path.is_dir():
        return {"base": str(path)}
    configs = write_model_configs(path, Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer", folder)
    return {"base": str(path), "config": str(configs)}


def _chosen(models: dict[str, Path], name: str, what: str) -> Path:
    """A model by a name of its list, which a link may not have given. Raises InvalidInputError."""
    if name == files.none_yet("checkpoints"):
        files.path("checkpoints", name)
    if name not in models:
        raise InvalidInputError(f"{what} is {quoted(name)}, which is none of the models that the list offers")
    return models[name]


def image_encoder_setting(name: str, base: str) -> str:
    """Setting for an image encoder of image_encoders(), or for the one inside the base model's folder.

    Raises InvalidInputError for the latter if the base model is a checkpoint.
    """
    if name != INSIDE:
        return str(_chosen(image_encoders(), name, "image_encoder"))
    if _chosen(base_models(), base, "base_model").is_file():
        raise InvalidInputError(
            f"the checkpoint {quoted(base)} has no image encoder inside; choose one in image_encoder, such as "
            "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors from models/clip_vision"
        )
    return ""


def open_folder(name: str, kind: str, *, start_over: bool) -> Path:
    """Where a training of that name and kind of FOLDERS keeps its states.

    ``start_over`` sets aside what an earlier run of that name has learned.
    """
    folder = Path(writable(FOLDERS[kind], plain_name(name)))
    if start_over:
        set_aside(folder)
    return folder


def make_data_section(pictures: str, images: Tensor | None, captions: str, folder: Path) -> dict[str, str]:
    """The source of a training's pictures: what a graph names, or images of the graph, which are written into ``folder``.

    Raises InvalidInputError for places that a graph may not read, and captions that fit no images.
    """
    check_length(captions, "captions", CAPTIONS)
    if pictures.strip():
        return {"path": readable(pictures.strip(), "pictures")}
    if images is None:
        raise InvalidInputError("give a folder in pictures, or connect images")
    lines = [line.strip() for line in captions.splitlines() if line.strip()] or [""]
    if len(lines) not in (1, len(images)):
        raise InvalidInputError(
            f"captions has {len(lines)} lines for {len(images)} images; one for all or one for each"
        )
    if len(images) > IMAGES:
        raise InvalidInputError(f"images are {len(images):,}; give more than {IMAGES:,} as a folder in pictures")
    return {"path": save_pictures(images, lines, folder), "kind": "folder"}


def save_pictures(images: Tensor, captions: list[str], folder: Path) -> str:
    """Images ``b y x c`` from the graph, grey or in colours, as a folder that a training reads. Raises InvalidInputError for NaN."""
    check_finite(images)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        pixels = (image[..., :3].expand(-1, -1, 3).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")
        (folder / f"{i:06d}.txt").write_text(captions[i if len(captions) > 1 else 0], encoding="utf-8")
    return str(folder)


def run(
    values: dict[str, dict[str, Any]], settings: str, name: str, kind: str, base: str, node_id: str
) -> tuple[str, Path]:
    """Run a training on the base model ``base`` in another process, with this node's progress bar and previews.

    ``settings`` has an override per line, ``kind`` is the folder below output that takes the result: ``ipadapter``, whose files
    are loaded by name, or ``loras``. Returns the name and the path of the result.
    """
    report = _training_progress(node_id)
    with tempfile.TemporaryDirectory(prefix="ipadapter-model-") as configs:
        model = make_model_section(base, Path(configs)) | values["model"]
        data = values["data"] | {"roots": readable_folders()}
        config = graph_settings(settings, parse_config({**values, "model": model, "data": data}, "this node"))
        target = Path(writable(kind, f"{name}.safetensors"))
        _make_room()
        result = run_job(
            config,
            python=os.environ.get(TRAIN_PYTHON) or sys.executable,
            on_event=report,
            check=comfy.model_management.throw_exception_if_processing_interrupted,
        )
    place = publish(result, target, Path(config.output.folder))
    if place != target:
        text = f"{target.name} is not of this training and stays as it is; the result is {place.name}"
        report({"event": "note", "text": text})
    return place.name, place


def _make_room() -> None:
    """Take every model off the device; the training needs it."""
    if comfy.model_management.current_loaded_models:
        # models that only cycles keep would die while ComfyUI goes through its list, and change it under way
        gc.collect()
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def _training_progress(node_id: str) -> Callable[[dict[str, Any]], None]:
    """Progress bar and previews, and in the node a line of text: what happened last, or how the losses stand."""
    texts: dict[str, str] = {}
    bar = comfy.utils.ProgressBar(1)
    preview: list[Any] = [None]

    def report(event: dict[str, Any]) -> None:
        shown = event.get("file") if event["event"] in ("sheet", "plot") else None
        if shown and os.path.isfile(shown):
            preview[0] = ("PNG", read_picture(shown).convert("RGB"), 1024)
        text = _in_words(event)
        if text:
            texts[event["event"]] = text
            # the newest first: the node shows two lines without scrolling
            show_in_node("\n".join(texts[kind] for kind in ("step", "validation", "note") if kind in texts), node_id)
        if "steps" in event:
            bar.update_absolute(event["step"], event["steps"], preview[0])
            preview[0] = None

    return report


def _in_words(event: dict[str, Any]) -> str:
    match event["event"]:
        case "note":
            return event["text"]
        case "step":
            left = (event["steps"] - event["step"]) * event["seconds_per_step"] / 60
            return f"step {event['step']} of {event['steps']}, loss {event['loss']:.4f}, {left:.0f} minutes left"
        case "validation":
            gains = (f"{key.replace('_', ' ')} {event[key]:+.4f}" for key in event if key.endswith("_gain"))
            return f"validation {event['validation']:.4f}, {', '.join(gains)}"
        case _:
            return ""


def result_pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """Loss plot and last sample sheet of a training."""
    return _as_image(folder / "loss.png"), _as_image(folder / "sheet.png")


def _as_image(path: Path) -> Tensor:
    """A picture as IMAGE ``1 y x 3``; one grey pixel if there is none."""
    if not path.is_file():
        return torch.full((1, 1, 1, 3), 0.5)
    return to_tensor(read_picture(path).convert("RGB"))[None]
