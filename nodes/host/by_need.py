"""What serves a need, from ComfyUI's folders: adapter, image encoders, LoRA and face model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...ipadapter_core.backends.comfy.doors import comfy_layout
from ...ipadapter_core.errors import InvalidInputError, quoted
from ...ipadapter_core.images.faces import FaceAnalyzer
from ...ipadapter_core.known_files import lora_file
from ...ipadapter_core.legacy.migrate.bases import base_of_name
from ...ipadapter_core.models import BASE_MODELS
from ...ipadapter_core.models.unet import SD15, SDXL
from ...ipadapter_core.wishes import Needed, Picked, needed, pick, pick_encoders
from . import adapters, clip_vision, faces, files, lora, sites


@dataclass(frozen=True, slots=True)
class Loaded:
    """All that a need asks for; ``report`` says which files they are."""

    model: Any
    adapter: adapters.ManagedAdapter
    encoders: Sequence[Any]
    face_model: FaceAnalyzer | None
    report: str


def load(model: Any, need: str, lora_strength: float, provider: str) -> Loaded:
    """Pick and load. Raises InvalidInputError that says what is missing, where it belongs and where it is."""
    layout = comfy_layout(model)
    picked = pick(need, layout, files.names("ipadapter"), adapters.describe, files.folder_of("ipadapter"))
    spec, folder = picked.spec, files.folder_of("clip_vision")
    encoders = pick_encoders(spec, picked.file, files.names("clip_vision"), clip_vision.widths, folder)
    lines = [f"adapter       {picked.file} ({spec.format.label})", *(f"image encoder {file}" for file in encoders)]
    adapter = adapters.load(picked.file)
    if lora_strength:
        model, line = _with_lora(model, adapter, picked, lora_strength)
        lines += [line] if line else []
    face_model = None
    if spec.format.feature.embedding is not None:
        face_model = faces.load(spec.face_model, provider)
        lines.append(f"face model    {spec.face_model}")
    report = "\n".join(lines)
    return Loaded(model, adapter, [clip_vision.load(file) for file in encoders], face_model, report)


def _with_lora(model: Any, adapter: adapters.ManagedAdapter, picked: Picked, strength: float) -> tuple[Any, str]:
    """The model with the adapter's LoRA, from its own file or the one beside it, and a line on it; nothing where there is none."""
    if adapter.weights.lora:
        return lora.apply_inside(model, adapter, strength)[
            0
        ], f"LoRA          inside {picked.file}, strength {strength:g}"
    file = lora_file(picked.known, files.names("loras"))
    if file is None:
        return model, ""
    applied = lora.apply_by_host(model, lora.load_tensors(file), strength)
    return applied, f"LoRA          {file}, strength {strength:g}"


def files_for(need: str, kind: Literal["checkpoints", "diffusion_models"], file: str) -> list[Needed]:
    """What a need takes on the model in a file, which itself may be missing: then its name tells the base model.

    Raises InvalidInputError where that is not known either.
    """
    layout = sites.layout_of_file(files.version(kind, file), file) if file in files.names(kind) else None
    base_model = layout.name if layout else base_model_of_name(file)
    if not base_model:
        raise InvalidInputError(
            f"{quoted(file)} is not there, and its name does not tell which base model it is: choose one that is there"
        )
    there = {
        "ipadapter": files.names("ipadapter"),
        "clip_vision": files.names("clip_vision"),
        "loras": files.names("loras"),
        "insightface/models": faces.there(),
    }
    return needed(need, base_model, layout, there, adapters.describe, clip_vision.widths)


def base_model_of_name(file: str) -> str:
    """The base model that a file's name tells, as ``SDXL``; nothing where it does not."""
    told = {"sd15": SD15.name, "sdxl": SDXL.name}.get(base_of_name(file) or "", "")
    plain = file.lower().replace("-", "").replace("_", "")
    others = sorted((model.name for model in BASE_MODELS if model.walk), key=len, reverse=True)
    return told or next((name for name in others if name.lower() in plain), "")
