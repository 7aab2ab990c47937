"""Some output rows of a layer that the file's model keeps apart and this one fuses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .update import Layer

Rows = tuple[int, int]
"""The first row and their number."""


class RowsOf(Layer):
    """Some output rows of a fused layer, as a layer."""

    def __init__(self, module: nn.Module, start: int, length: int) -> None:
        super().__init__(module)
        self._start, self._length = start, length

    @property
    def shape(self) -> tuple[int, ...]:
        return self._length, *super().shape[1:]

    def weight(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        # quantisers pack whole weights: expanded first, then cut
        return Layer(self.module).weight(device, dtype)[self._start : self._start + self._length]

    def bias_vector(self, like: Tensor) -> Tensor:
        return Layer(self.module).bias_vector(like)[self._start : self._start + self._length]

    def again(self, x: Tensor) -> Tensor:
        whole: Tensor = self.module.forward(x)
        return self.without_bias(rows_of(whole, (self._start, self._length), self))


def rows_of(y: Tensor, rows: Rows, layer: Layer) -> Tensor:
    """The output of some rows of a fused layer."""
    return y.narrow(1 if layer.kind == "conv" else -1, *rows)


def add_rows(y: Tensor, added: Tensor, rows: Rows, layer: Layer) -> Tensor:
    """A copy of ``y`` with something added to some rows."""
    y = y.clone()
    rows_of(y, rows, layer).add_(added)
    return y
