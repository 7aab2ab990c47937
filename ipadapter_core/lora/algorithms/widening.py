"""Updates that give their layer more inputs: control LoRAs, whose model reads a control picture beside the latent.

``reshape_weight`` is ComfyUI's: the shape that the weight is padded to with zeros before the update is added. Only a merge can
do it, as the model asks the weight how many inputs there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import CorruptFileError, quoted
from ..parts import Key, Parts, key
from ..update import Update, Wrapper, shape_text

MOST_WIDER = 16
"""Times the inputs of a layer that a file may ask for: Flux Fill has six times those of Flux."""


@dataclass(frozen=True, slots=True, eq=False)
class Widened(Wrapper):
    """``inner`` on the weight padded with zeros to ``shape``, along the inputs alone."""

    algorithm: ClassVar[str] = "widening"
    wraps: ClassVar[bool] = True
    keys: ClassVar[tuple[Key, ...]] = (key(".reshape_weight", r"\.reshape_weight$", "reshape_weight", sizes=True),)
    shape: tuple[int, ...]

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return self.shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """``shape`` is that of the model's narrower weight."""
        if len(shape) < 2 or len(shape) != len(self.shape):
            return False
        return shape[1] < self.shape[1] <= MOST_WIDER * shape[1] and (shape[0], *shape[2:]) == (
            self.shape[0],
            *self.shape[2:],
        )

    def on(self, shape: tuple[int, ...]) -> Update:
        return replace(self, inner=self.inner.on(self.shape))

    def delta(self, weight: Tensor) -> Tensor:
        return self.inner.delta(padded(weight, self.shape))

    def change(self, weight: Tensor, total: Tensor, strength: float) -> None:
        """``total`` has the wider shape."""
        self.inner.change(padded(weight, self.shape), total, strength)

    def rows(self, start: int, length: int) -> Update:
        return replace(self, inner=self.inner.rows(start, length), shape=(length, *self.shape[1:]))

    @classmethod
    def around(cls, inner: Update, parts: Parts) -> Update:
        sizes = parts.get("reshape_weight")
        if sizes is None:
            return inner
        shape = inner.weight_shape if sizes.is_meta else tuple(int(size) for size in sizes)
        if any(size is None for size in shape) or not inner.fits(tuple(int(size or 0) for size in shape)):
            raise CorruptFileError(
                f"{parts.file}: {quoted(parts.stem)} is for a weight of {shape_text(inner.weight_shape)}, but its reshape_weight "
                f"says {shape_text(shape)}; the file is damaged"
            )
        return cls(inner, tuple(int(size or 0) for size in shape))

    def to_parts(self) -> dict[str, Tensor]:
        return self.inner.to_parts() | {".reshape_weight": torch.tensor(self.shape)}

    def norm(self) -> float | None:
        return self.inner.norm()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Update:
        return replace(self, inner=self.inner.with_tensors(tensors))


def padded(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight with zeros for the inputs that it does not have."""
    added = shape[1] - weight.shape[1]
    return F.pad(weight, (*[0, 0] * (weight.ndim - 2), 0, added)) if added else weight
