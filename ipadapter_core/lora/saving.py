"""Writing LoRA files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import InvalidInputError
from .convert import to_tensors
from .weights import LoRAWeights

DTYPES = ("keep", "float32", "float16", "bfloat16")


def save_lora(
    weights: LoRAWeights, path: Path, *, spelling: str = "kohya", dtype: str = "keep", overwrite: bool = False
) -> dict[str, object]:
    """Write a LoRA file whole or not at all; returns what was written. Raises InvalidInputError if it exists."""
    if path.suffix != ".safetensors":
        raise InvalidInputError(f"{path} does not end in .safetensors, the only kind of file that is written")
    if path.exists() and not overwrite:
        raise InvalidInputError(f"{path} exists already; choose another name or overwrite it")
    wanted = None if dtype == "keep" else getattr(torch, dtype)
    tensors, metadata = to_tensors(weights, spelling, wanted)  # pyright: ignore[reportArgumentType]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        save_file({key: t.clone() for key, t in tensors.items()}, unfinished, {"format": "pt", **metadata})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return {"file": str(path), "modules": len(weights.modules), "bytes": path.stat().st_size, "spelling": spelling}
