"""The tensors of one module of a file by role, as an algorithm is built from them; and how files name them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CorruptFileError, quoted
from .peft_config import PeftConfig, path_of

ADAPTER = r"(?:\.(?!bias$)[^.]+)?"
"""In a key's pattern: the adapter's name, which PEFT keeps in the keys of a model's state dict and drops in files."""

LARGEST = 1e6
"""A LoRA's numbers are below 10³. Above this they are of a failed training, and products of them overflow."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Key:
    """How files name one of an algorithm's tensors.

    ``pattern`` is what follows the module's name, ``part`` a text that every such key has, ``role`` the tensor's name (with
    ``\\1`` for the pattern's group). All algorithms share one namespace of roles, as a module's algorithm is told by its roles
    alone; two that name the same one are refused (``grouping.check_algorithms``), so begin it with the algorithm's name.
    ``number``: it is a single number, of any type. ``sizes``: it is a shape, in whole numbers. ``beside``: it is taken only where the module has a tensor of this role
    too. ``peft``: PEFT alone writes it.
    """

    part: str
    pattern: re.Pattern[str]
    role: str
    number: bool = False
    beside: str = ""
    peft: bool = False
    sizes: bool = False


def key(
    part: str,
    pattern: str,
    role: str,
    *,
    number: bool = False,
    beside: str = "",
    peft: bool = False,
    sizes: bool = False,
) -> Key:
    """A ``Key`` from the pattern's text."""
    return Key(part, re.compile(pattern), role, number, beside, peft, sizes)


class Parts:
    """The tensors of one module by role, what was taken of them, and the alpha that decided the scale."""

    def __init__(self, stem: str, tensors: Mapping[str, Tensor], file: str, config: PeftConfig | None) -> None:
        self.stem, self.tensors, self.file, self.config = stem, tensors, file, config
        self.used: set[str] = set()
        self.alpha: float | None = None
        self.alpha_from = ""

    def __contains__(self, role: str) -> bool:
        return role in self.tensors

    def __getitem__(self, role: str) -> Tensor:
        tensor = self.get(role)
        if tensor is None:
            raise CorruptFileError(
                f"{self.file}: module {quoted(self.stem)} has {', '.join(sorted(self.tensors))}, but no '{role}' that belongs "
                "to it; the file is incomplete"
            )
        return tensor

    @property
    def path(self) -> str:
        """The module's path in the model, as PEFT's config knows it."""
        return path_of(self.stem)

    def get(self, role: str) -> Tensor | None:
        """The tensor of a role, None if there is none."""
        self.used.add(role)
        return self.tensors.get(role)

    def matrix(self, role: str, axes: int = 2) -> Tensor:
        """A tensor of at least so many axes."""
        tensor = self[role]
        if tensor.ndim < axes:
            raise CorruptFileError(
                f"{self.file}: the {role} of {quoted(self.stem)} has the shape {list(tensor.shape)}; at least {axes} axes were "
                "expected, so the file was not saved whole"
            )
        return tensor

    def scale(self, rank: int) -> float:
        """alpha / rank: alpha from the module's tensor, else from PEFT's config, else the rank; an alpha of 0 is the rank (kohya)."""
        alpha = self.number("alpha")
        if alpha is not None:
            self.alpha, self.alpha_from = alpha, "tensor"
            factor = 1.0 if alpha == 0 else alpha / rank
        else:
            found = None if self.config is None else self.config.scale_of(self.path, rank)
            if found is None or found.alpha == 0:
                self.alpha, self.alpha_from = float(rank), "default"
                return 1.0
            assert self.config is not None
            self.alpha, self.alpha_from, factor = found.alpha, self.config.origin, found.factor
        if not abs(factor) <= LARGEST:
            raise CorruptFileError(
                f"{self.file}: {quoted(self.stem)} has the scale {factor:g}; use another version of the file"
            )
        return factor

    def number(self, role: str) -> float | None:
        """A single number, None if it is not there."""
        tensor = self.get(role)
        if tensor is None:
            return None
        if tensor.numel() != 1:
            raise CorruptFileError(
                f"{self.file}: {quoted(self.stem)} has an {role} of shape {list(tensor.shape)}; one number was expected"
            )
        return 1.0 if tensor.is_meta else float(tensor.double().reshape(()))

    def mismatch(self) -> CorruptFileError:
        """The error for factors that do not multiply."""
        shapes = ", ".join(f"{role} {list(t.shape)}" for role, t in self.tensors.items())
        return CorruptFileError(f"{self.file}: the factors of {quoted(self.stem)} do not multiply: {shapes}")


MOST_AXES = 5
"""Of a weight: rows, columns and a kernel of three sizes."""


def checked(file: str, stem: str, role: str, tensor: Tensor, *, number: bool, sizes: bool = False) -> Tensor:
    """The tensor, if it holds real, finite numbers that a LoRA can have; float8 as bfloat16, which holds it exactly."""
    if tensor.numel() == 0:
        raise CorruptFileError(f"{file}: the {role} of {quoted(stem)} is empty (shape {list(tensor.shape)})")
    if sizes:
        whole = (
            tensor.ndim == 1 and len(tensor) <= MOST_AXES and not (tensor.is_floating_point() or tensor.is_complex())
        )
        if not whole or (not tensor.is_meta and int(tensor.min()) < 1):
            raise CorruptFileError(
                f"{file}: the {role} of {quoted(stem)} is no shape of a weight, which is at most {MOST_AXES} whole numbers from 1"
            )
        return tensor
    if number and not tensor.is_complex() and tensor.numel() == 1:
        if not tensor.is_meta and not math.isfinite(float(tensor.double().reshape(()))):
            raise CorruptFileError(
                f"{file}: {quoted(stem)} has NaN or infinite numbers in its {role}; use another version"
            )
        return tensor
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        tensor = tensor.to(torch.bfloat16)
    if tensor.dtype not in _FLOATS:
        raise CorruptFileError(
            f"{file}: the {role} of {quoted(stem)} is stored as {str(tensor.dtype).removeprefix('torch.')}; a LoRA's numbers are "
            "float16, bfloat16, float32 or float64. Convert the file"
        )
    if tensor.is_meta:
        return tensor
    ends = torch.aminmax(tensor)  # both are NaN if any number is
    low, high = float(ends.min), float(ends.max)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CorruptFileError(
            f"{file}: {quoted(stem)} has NaN or infinite numbers in its {role}; it was saved from a failed training. "
            "Use another version of the file"
        )
    if max(-low, high) > LARGEST:
        raise CorruptFileError(
            f"{file}: {quoted(stem)} has numbers up to {max(-low, high):.1g} in its {role}, a million times what a LoRA has; it "
            "was saved from a failed training. Use another version of the file"
        )
    return tensor
