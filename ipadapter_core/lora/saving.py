"""Writing LoRA files."""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import InvalidInputError, quoted, reason
from ..files.whole import written_whole
from .convert import to_tensors
from .weights import LoRAWeights

DTYPES = ("keep", "float32", "float16", "bfloat16")


def save_lora(
    weights: LoRAWeights,
    path: Path,
    *,
    key_format: str = "kohya",
    dtype: str = "keep",
    overwrite: bool = False,
    spelling: str = "",
) -> dict[str, object]:
    """Write a LoRA file whole or not at all; returns what was written. Raises InvalidInputError if it exists.

    ``spelling`` is the older name of ``key_format``.
    """
    key_format = spelling or key_format
    check_target(path, overwrite)
    wanted = None if dtype == "keep" else getattr(torch, dtype)
    tensors, metadata = to_tensors(weights, key_format, wanted)  # pyright: ignore[reportArgumentType]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as place:
            save_file({key: t.clone() for key, t in tensors.items()}, place, {"format": "pt", **metadata})
    except (OSError, SafetensorError, ValueError) as error:  # a full disk, a forbidden folder, names that are no text
        raise InvalidInputError(f"{quoted(path, 300)} cannot be written ({reason(error)})") from None
    written = {"file": str(path), "modules": len(weights.modules), "bytes": path.stat().st_size}
    return {**written, "key_format": key_format, "spelling": key_format}  # the latter is its older name


def check_target(path: Path, overwrite: bool) -> None:
    """Raise InvalidInputError where no LoRA may be written, before one is computed."""
    if path.suffix != ".safetensors":
        raise InvalidInputError(
            f"{quoted(path, 300)} does not end in .safetensors, the only kind of file that is written"
        )
    if _exists(path) and not (overwrite and path.is_file()):
        what = "exists already; choose another name or overwrite it" if path.is_file() else "is no plain file"
        raise InvalidInputError(f"{quoted(path, 300)} {what}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{quoted(path)} is no name of a file ({reason(error)})") from None
