"""DoRA: the direction comes from an additive update, the length of every row or column is learned. arXiv 2402.09353.

``W' = m · (W + ΔW) / ‖W + ΔW‖`` and strength s gives ``W + s (W' - W)``, as A1111 has it: 0 is exactly off. (PEFT
scales only ΔW, so its 0 leaves ``m W / ‖W‖``; LyCORIS norms ``W + s ΔW``.)
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...errors import CorruptFileError, quoted
from ..fresh import Settings, TrainedAs
from ..layer import Layer
from ..parts import ADAPTER, Key, Parts, key
from ..update import Change, Update, Wrapper, near
from .low_rank import LowRank

Axis = Literal["in", "out"]


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed(Wrapper):
    """``magnitude`` has one number per output row or input column of the weight (``axis``)."""

    algorithm: ClassVar[str] = "DoRA"
    reads_weight: ClassVar[bool] = True
    wraps: ClassVar[bool] = True
    keys: ClassVar[tuple[Key, ...]] = (
        key(".lora_magnitude_vector", rf"\.lora_magnitude_vector{ADAPTER}(?:\.weight)?$", "magnitude"),  # PEFT
        key(".dora_scale", r"\.dora_scale$", "dora_scale"),  # LyCORIS, kohya, OneTrainer
    )
    trainings: ClassVar[tuple[TrainedAs, ...]] = (
        TrainedAs("dora", "lora with learned magnitudes", no_dropout="whose magnitudes need the whole input"),
    )
    magnitude: Tensor
    axis: Axis

    @property
    def title(self) -> str:
        return "DoRA" if self.inner.algorithm == "LoRA" else f"DoRA on {self.inner.title}"

    @property
    def scale(self) -> float | None:
        """Of the inner update, None if it has none."""
        return getattr(self.inner, "scale", None)

    def fits(self, shape: tuple[int, ...]) -> bool:
        axis = 0 if self.axis == "out" else 1
        return self.inner.fits(shape) and len(shape) > 1 and self.magnitude.shape[0] == shape[axis]

    def on(self, shape: tuple[int, ...]) -> Update:
        return replace(self, inner=self.inner.on(shape))

    def factor(self, weight: Tensor) -> Tensor:
        """``m / ‖W + ΔW‖`` per row or column, shaped to multiply the weight."""
        changed = weight + self.inner.delta(weight)
        axis = 0 if self.axis == "out" else 1
        others = [i for i in range(weight.ndim) if i != axis]
        norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        return near(self.magnitude, weight).reshape(norm.shape) / norm.clamp_min(torch.finfo(weight.dtype).tiny)

    def delta(self, weight: Tensor) -> Tensor:
        return (weight + self.inner.delta(weight)) * self.factor(weight) - weight

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        wide = torch.promote_types(like.dtype, torch.float32)
        factor = layer.channels(near(self.factor(layer.weight(like.device, wide)).flatten(), like))
        inner = self.inner.unfused(layer, like)

        def rows(x: Tensor, y: Tensor, s: float) -> Tensor:
            base = layer.without_bias(y)
            return ((base + inner(x, y, 1.0)) * factor - base) * s

        def columns(x: Tensor, y: Tensor, s: float) -> Tensor:
            scaled = x * factor
            return (layer.again(scaled) + inner(scaled, y, 1.0) - layer.without_bias(y)) * s

        return rows if self.axis == "out" else columns

    def rows(self, start: int, length: int) -> Update:
        if self.axis == "in":
            return Update.rows(self, start, length)  # its norm needs all rows; refused when it meets the layer
        part = slice(start, start + length)
        return replace(self, inner=self.inner.rows(start, length), magnitude=self.magnitude[part])

    @classmethod
    def around(cls, inner: Update, parts: Parts) -> Update:
        magnitude = parts.get("dora_scale")
        vector = parts.get("magnitude") if magnitude is None else None
        if magnitude is None and vector is None:
            return inner
        if inner.reads_weight:
            raise CorruptFileError(
                f"{parts.file}: {quoted(parts.stem)} has a dora_scale on {inner.title}, which has no such form"
            )
        if vector is not None:
            return cls(inner, vector.flatten(), "out")
        assert magnitude is not None
        axis: Axis = "in" if magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] > 1 else "out"
        if magnitude.ndim == 1 and magnitude.shape[0] != inner.weight_shape[0]:
            axis = "in"
        return cls(inner, magnitude.flatten(), axis)

    def to_parts(self) -> dict[str, Tensor]:
        rows = self.magnitude.reshape((-1, 1) if self.axis == "out" else (1, -1))
        return self.inner.to_parts() | {".dora_scale": rows.reshape(*rows.shape, *[1] * len(self.inner.kernel))}

    def to_peft(self) -> dict[str, Tensor] | None:
        parts = self.inner.to_peft() if self.axis == "out" else None
        return None if parts is None else parts | {".lora_magnitude_vector.weight": self.magnitude}

    @classmethod
    def fresh(cls, weight: Tensor, settings: Settings) -> Update:
        others = [axis for axis in range(weight.ndim) if axis != (0 if settings.dora_axis == "out" else 1)]
        magnitude = torch.linalg.vector_norm(weight, dim=others)
        return cls(LowRank.fresh(weight, settings), magnitude, settings.dora_axis)
