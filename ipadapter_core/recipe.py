"""What a picture was made with: as JSON to make it again, and as the text that readers of web UIs' pictures understand.

Neither holds an absolute path. The text is the one that AUTOMATIC1111's web UI writes into the chunk ``parameters``
(modules/infotext_utils.py and processing.py there), with the hashes by which Civitai knows models and LoRAs.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import InvalidInputError, quoted
from .files.text import parse_json, read_bytes
from .images.files import MAX_FILE, shown
from .narrowing import is_table

CHUNK = "ipadapter"
"""The text chunk of a PNG with the settings as JSON."""
PARAMETERS = "parameters"
"""The text chunk of a PNG that web UIs and Civitai read."""

SAMPLERS = {
    "DDIM": "DDIM", "PNDM": "PLMS", "EulerDiscrete": "Euler", "EulerAncestralDiscrete": "Euler a", "HeunDiscrete": "Heun",
    "LMSDiscrete": "LMS", "DPMSolverMultistep": "DPM++ 2M", "DPMSolverSinglestep": "DPM++ 2S a", "DPMSolverSDE": "DPM++ SDE",
    "KDPM2Discrete": "DPM2", "KDPM2AncestralDiscrete": "DPM2 a", "UniPCMultistep": "UniPC", "LCM": "LCM", "DDPM": "DDPM",
    "FlowMatchEulerDiscrete": "Euler", "FlowMatchHeunDiscrete": "Heun",
}  # fmt: skip
"""What the web UI calls the samplers that diffusers' schedulers are, by their class without ``Scheduler``."""


def portable(path: Path) -> str:
    """A file's name in a picture: from the current folder, from ``~``, or alone, so that no absolute path is told."""
    whole = path.absolute()
    try:
        return whole.relative_to(Path.cwd()).as_posix()
    except ValueError:
        pass
    try:
        return f"~/{whole.relative_to(Path.home()).as_posix()}"
    except (ValueError, RuntimeError):
        return whole.name


def sampler_name(scheduler: Any) -> str:
    """What a web UI calls the sampler of a pipeline's scheduler."""
    kind = type(scheduler).__name__.removesuffix("Scheduler")
    name = SAMPLERS.get(kind, kind)
    config = getattr(scheduler, "config", {})
    if kind == "DPMSolverMultistep" and str(config.get("algorithm_type", "")).startswith("sde"):
        name += " SDE"
    return f"{name} Karras" if config.get("use_karras_sigmas") else name


def sha256(path: Path) -> str:
    """Of a whole file, in hexadecimal digits."""
    return _digest(path, path.stat().st_mtime_ns, 0)


def lora_hash(path: Path) -> str:
    """The hash by which web UIs and Civitai know a LoRA: of a safetensors file without its header, 12 digits."""
    skip = 0
    if path.suffix in (".safetensors", ".sft"):
        with path.open("rb") as file:
            skip = 8 + int.from_bytes(file.read(8), "little")
    return _digest(path, path.stat().st_mtime_ns, skip)[:12]


@lru_cache(64)
def _digest(path: Path, changed: int, skip: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(skip)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parameters_text(prompt: str, negative: str, facts: Mapping[str, object], loras: Mapping[str, str]) -> str:
    """The text for the chunk ``parameters``: prompt, negative prompt, and ``facts`` such as ``Steps: 20, Sampler: Euler``.

    ``loras`` are hashes by name. Facts that are None are left out.
    """
    told = {name: value for name, value in facts.items() if value is not None}
    if loras:
        told["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, digest in loras.items())
    lines = [
        prompt,
        f"Negative prompt: {negative}" if negative else "",
        ", ".join(f"{k}: {_quoted(v)}" for k, v in told.items()),
    ]
    return "\n".join(line for i, line in enumerate(lines) if line or i == 0)


def _quoted(value: object) -> str:
    """As the web UI does: what its reader would cut is written as JSON."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ",\n:") else text


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a picture that the command made. Raises InvalidInputError for any other, CorruptFileError."""
    content = read_bytes(path, MAX_FILE)
    try:
        with Image.open(BytesIO(content), formats=["PNG"]) as picture:
            chunk: object = picture.info.get(CHUNK)
            if chunk is None:
                picture.load()  # behind the pixels, where other programs write them
                chunk = picture.info.get(CHUNK)
    except Exception:  # Pillow raises of many kinds
        chunk = None
    if not isinstance(chunk, str):
        raise InvalidInputError(
            f"{shown(path)} holds no settings: it is no PNG of ipadapter generate, or another program wrote it anew"
        )
    settings = parse_json(chunk, path)
    if not is_table(settings) or settings.get("settings") != VERSION:
        raise InvalidInputError(
            f"{shown(path)} holds settings of another version of ipadapter, which cannot be repeated: "
            f"its form is {quoted(settings.get('settings') if is_table(settings) else None)}, this one reads {VERSION}"
        )
    return dict(settings)


VERSION = 2
"""Of the form of the settings: 1, without a number, had no list of adapters."""


def arguments(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Settings as arguments of the command, which checks them as it checks what people type: ``--name=value`` for each of ``names``.

    Tables and what is none of the plain values are passed over.
    """
    found: list[str] = []
    for name in names:
        value = settings.get(name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, (str, int, float)) and not isinstance(one, bool):
                found.append(f"--{name.replace('_', '-')}={one}")
    return found


def fingerprints(files: Sequence[Path], name: Callable[[Path], str] = portable) -> dict[str, str]:
    """The beginning of each file's SHA-256, by its name in pictures."""
    return {name(file): sha256(file)[:16] for file in files if file.is_file()}
