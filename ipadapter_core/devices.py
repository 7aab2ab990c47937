"""Devices by the names that people type."""

from __future__ import annotations

import torch

from .errors import InvalidInputError, quoted, reason

ACCELERATORS = ("cuda", "xpu", "mps")


def best_device() -> str:
    """The accelerator of this machine, else ``cpu``."""
    found = (name for name in ACCELERATORS if _is_there(name))
    return next(found, "cpu")


def usable_device(name: str) -> str:
    """A device on which tensors can be made; ``auto`` is ``best_device``. Raises InvalidInputError that says why it is none."""
    if name == "auto":
        return best_device()
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.zeros(1, device=name).add_(1).item()
    except Exception as error:  # torch raises RuntimeError, AssertionError, NotImplementedError and ImportError here
        raise InvalidInputError(
            f"the device {quoted(name)} cannot be used ({reason(error)}); this machine has {best_device()}"
        ) from error
    return name


def _is_there(name: str) -> bool:
    module = getattr(torch, name, None) if name != "mps" else torch.backends.mps
    return module is not None and bool(module.is_available())
