"""Algebra on factors: norms, smaller ranks and sums of LoRAs without forming a matrix of the layer's size where it can be.

``up down`` with QR of both sides needs only an SVD of r×r: exact, and thousands of times cheaper than one of the weight.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InvalidInputError, quoted, reason
from .algorithms.low_rank import LowRank
from .forms import in_form
from .weights import LoRAModule, LoRAWeights

MAX_STRENGTH = 1000.0


@dataclass(frozen=True, slots=True)
class Smaller:
    """How small a rank may become: a number, and the share of the squared norm that must stay (1: all)."""

    rank: int | None = None
    energy: float = 1.0

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise InvalidInputError(f"the rank is {self.rank}; it must be at least 1")
        if not 0 < self.energy <= 1:
            raise InvalidInputError(f"the energy to keep is {self.energy}; it must be above 0 and at most 1")

    def of(self, values: Tensor) -> int:
        """Rank for these singular values, largest first."""
        kept = values.square().cumsum(0) / values.square().sum().clamp_min(1e-30)
        needed = int((kept < self.energy - 1e-9).sum()) + 1
        nonzero = int((values > values[0] * 1e-7).sum()) if float(values[0]) > 0 else 1
        return max(1, min(needed, nonzero, self.rank or len(values), len(values)))


def compress(up: Tensor, down: Tensor, smaller: Smaller) -> tuple[Tensor, Tensor, float]:
    """The best factors of the allowed rank, and the relative error ‖difference‖ / ‖ΔW‖ (0 if nothing is lost)."""
    sizes = [float(t.abs().amax()) or 1.0 for t in (up, down)]
    q_up, r_up = torch.linalg.qr(up / sizes[0])  # at sizes whose squares fit float32
    q_down, r_down = torch.linalg.qr(down.T / sizes[1])
    u, values, vh = _svd(r_up @ r_down.T)
    rank = smaller.of(values)
    root = values[:rank].sqrt() * math.sqrt(sizes[0]) * math.sqrt(sizes[1])
    lost = values[rank:].square().sum() / values.square().sum().clamp_min(1e-30)
    return q_up @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ q_down.T, float(lost.sqrt())


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64 where float32 does not converge."""
    try:
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        try:
            u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        except torch.linalg.LinAlgError as error:
            raise InvalidInputError(f"a module's singular values cannot be computed ({reason(error)})") from None
    return u.to(matrix.dtype), values.to(matrix.dtype), vh.to(matrix.dtype)


def decompose(matrix: Tensor, smaller: Smaller) -> tuple[Tensor, Tensor, float]:
    """Factors of a dense change. With a rank far below the size by randomised SVD, else exactly."""
    size = float(matrix.abs().amax()) or 1.0
    matrix = matrix / size
    shortest = min(matrix.shape)
    if smaller.rank is not None and smaller.rank + 16 < shortest // 2:
        u, values, v = torch.svd_lowrank(matrix, q=smaller.rank + 16, niter=4)
    else:
        u, values, vh = _svd(matrix)
        v = vh.T
    rank = smaller.of(values)
    root = values[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * v[:, :rank].T
    norm = torch.linalg.vector_norm(matrix)
    error = torch.linalg.vector_norm(matrix - up @ down) / norm.clamp_min(1e-30)
    return up * math.sqrt(size), down * math.sqrt(size), float(error)


def low_rank_module(module: LoRAModule, up: Tensor, down: Tensor, kernel: tuple[int, ...]) -> LoRAModule:
    """A module with these factors; ``kernel`` is its convolution's."""
    down = down.reshape(down.shape[0], -1, *kernel) if kernel else down
    up = up.reshape(*up.shape, *[1] * len(kernel))
    return replace(module, weight=LowRank(down.contiguous(), up.contiguous(), 1.0))


def resize(weights: LoRAWeights, smaller: Smaller) -> tuple[LoRAWeights, dict[str, float]]:
    """The same LoRA in smaller ranks, and the relative error per module. What is not low-rank stays as it is."""
    modules: list[LoRAModule] = []
    errors: dict[str, float] = {}
    for module in weights.modules:
        factors = None if module.weight is None else module.weight.factors()
        if factors is None or module.weight is None:
            modules.append(module)
            continue
        up, down, errors[module.stem] = compress(*factors, smaller)
        modules.append(low_rank_module(module, up, down, module.weight.kernel))
    return replace(weights, modules=tuple(modules)), errors


def _alike_named(loras: Sequence[LoRAWeights]) -> list[Sequence[LoRAModule]]:
    """Their modules; in diffusers' form if they are not all in one, since there what others fuse is apart."""
    named = [{module.name for module in lora.modules} for lora in loras]
    one = all(a <= b or b <= a for a in named for b in named)
    return [lora.modules if one else in_form(lora.modules, lora.base_model, "diffusers") for lora in loras]


def combine(
    loras: Sequence[LoRAWeights], strengths: Sequence[float], smaller: Smaller | None = None
) -> tuple[LoRAWeights, dict[str, float]]:
    """One LoRA that is the weighted sum; exact (ranks add up) unless ``smaller`` asks for less.

    Raises InvalidInputError for modules that cannot be summed: updates that depend on the weight, or that are no factors
    in one file and in another.
    """
    if not loras or len(loras) != len(strengths):
        raise InvalidInputError(
            f"{len(loras)} LoRAs and {len(strengths)} strengths were given; one strength each is needed"
        )
    for strength in strengths:
        if not abs(strength) <= MAX_STRENGTH:
            raise InvalidInputError(f"a strength is {strength:g}; at most ±{MAX_STRENGTH:g} can be used")
    grouped: dict[tuple[str, str], list[tuple[LoRAModule, float]]] = {}
    for named, strength in zip(_alike_named(loras), strengths, strict=True):
        for module in named:
            grouped.setdefault((module.component, module.name), []).append((module, strength))
    modules: list[LoRAModule] = []
    errors: dict[str, float] = {}
    for found in grouped.values():
        first = found[0][0]
        if any(module.bias is not None for module, _ in found):
            raise InvalidInputError(
                f"{quoted(first.stem)} changes a bias, which cannot be merged into one LoRA file yet"
            )
        ups: list[Tensor] = []
        downs: list[Tensor] = []
        kernel: tuple[int, ...] = ()
        for module, strength in found:
            factors = None if module.weight is None else module.weight.factors()
            if factors is None or module.weight is None:
                title = "nothing" if module.weight is None else module.weight.title
                raise InvalidInputError(
                    f"{quoted(module.stem)} is {title}, not a product of factors, and only those can be summed"
                )
            kernel = kernel or module.weight.kernel
            ups.append(factors[0] * strength)
            downs.append(factors[1])
        if len({(len(up), down.shape[1]) for up, down in zip(ups, downs, strict=True)}) > 1:
            raise InvalidInputError(
                f"{quoted(first.stem)} has different shapes in these files: they are for different base models"
            )
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in (*ups, *downs)) else torch.float32
        up, down = torch.cat([t.to(dtype) for t in ups], 1), torch.cat([t.to(dtype) for t in downs])
        if smaller is not None:
            up, down, errors[first.stem] = compress(up, down, smaller)
        modules.append(low_rank_module(first, up, down, kernel))
    name = " + ".join(f"{s:g}×{lora.name}" for lora, s in zip(loras, strengths, strict=True))
    return LoRAWeights(name, tuple(modules), loras[0].key_format, {}), errors
