"""What serves a need, from ComfyUI's folders: adapter, image encoders, LoRA and face model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...ipadapter_core.backends.comfy.doors import comfy_layout
from ...ipadapter_core.images.faces import FaceAnalyzer
from ...ipadapter_core.wishes import Picked, pick, pick_encoders
from . import adapters, clip_vision, faces, files, lora


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
    pattern = picked.known.lora if picked.known else ""
    found = [name for name in files.names("loras") if re.search(rf"({pattern})\.safetensors$", name, re.IGNORECASE)]
    if not pattern or not found:
        return model, ""
    applied = lora.apply_by_host(model, lora.load_tensors(found[0]), strength)
    return applied, f"LoRA          {found[0]}, strength {strength:g}"
