"""GLoRA: ``ΔW = scale · (W A + B)`` with low-rank A and B. arXiv 2306.07967; as in LyCORIS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import CorruptFileError, quoted
from ..layer import Layer
from ..parts import Key, Parts, key
from ..update import Change, Update, flat, near


@dataclass(frozen=True, slots=True, eq=False)
class Generalized(Update):
    """``W A`` is ``W · a_first · a_second`` over input channels, ``B`` is ``b_up · b_down``: ``i r``, ``r i``, ``o r``, ``r i``.

    Files have two axis orders. ``other`` is the second reading where both are possible; the layer's shape tells.
    """

    algorithm: ClassVar[str] = "GLoRA"
    reads_weight: ClassVar[bool] = True
    keys: ClassVar[tuple[Key, ...]] = (key(".weight", r"\.(a1|a2|b1|b2|bm)\.weight$", r"glora_\1"),)
    marks: ClassVar[tuple[str, ...]] = ("glora_a1",)
    a_first: Tensor
    a_second: Tensor
    b_up: Tensor
    b_down: Tensor
    scale: float = 1.0
    b_mid: Tensor | None = None
    other: Generalized | None = None

    @property
    def rank(self) -> int:
        return int(self.a_second.shape[0])

    def _columns(self) -> int:
        return self.b_down.flatten(1).shape[1] * (1 if self.b_mid is None else self.b_mid[0, 0].numel())

    def fits(self, shape: tuple[int, ...]) -> bool:
        own = (
            len(shape) > 1
            and flat(shape) == (self.b_up.shape[0], self._columns())
            and self.a_first.shape[0] == shape[1]
            and (self.b_mid is None or tuple(self.b_mid.shape[2:]) == shape[2:])
        )
        return own or (self.other is not None and self.other.fits(shape))

    def on(self, shape: tuple[int, ...]) -> Update:
        mine = replace(self, other=None)
        return self.other if self.other is not None and not mine.fits(shape) and self.other.fits(shape) else mine

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return int(self.b_up.shape[0]), self._columns()

    def _b(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        up, down = near(self.b_up, like).flatten(1), near(self.b_down, like)
        if self.b_mid is not None:
            return torch.einsum("or,rs...,si->oi...", up, near(self.b_mid, like), down.flatten(1)).reshape(shape)
        return (up @ down.flatten(1)).reshape(shape)

    def delta(self, weight: Tensor) -> Tensor:
        first, second = near(self.a_first, weight).flatten(1), near(self.a_second, weight).flatten(1)
        mixed = torch.einsum("oi...,ir,rj->oj...", weight, first, second)
        return (mixed + self._b(weight, tuple(weight.shape))) * self.scale

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        # (W A) x = W (A x): the layer itself runs once more, on a mixed input
        first, second = near(self.a_first, like).flatten(1), near(self.a_second, like).flatten(1)
        up = near(self.b_up, like).flatten(1)
        down = near(self.b_down, like)
        if self.b_mid is not None:
            down = torch.einsum("rs...,si->ri...", near(self.b_mid, like), down.flatten(1))
        down = down.reshape(-1, *layer.shape[1:])

        def change(x: Tensor, y: Tensor, s: float) -> Tensor:
            mixed = layer.pointwise(layer.pointwise(x, second), first)
            return (layer.again(mixed) + layer.pointwise(layer.apply(x, down), up)) * (s * self.scale)

        return change

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        a1, a2, b1, b2 = (parts.matrix(f"glora_{name}") for name in ("a1", "a2", "b1", "b2"))
        core = parts.get("glora_bm")
        readings: list[Generalized] = []
        for a_first, a_second, b_up, b_down in ((a1, a2, b1, b2), (a2, a1, b2, b1)):  # LyCORIS today, and until 2.3
            first, second, up = a_first.flatten(1), a_second.flatten(1), b_up.flatten(1)
            a_fits = first.shape[1] == a_second.shape[0] and first.shape[0] == second.shape[1]
            if core is None:
                b_fits = up.shape[1] == b_down.shape[0]
            else:
                b_fits = core.ndim > 2 and tuple(core.shape[:2]) == (up.shape[1], b_down.shape[0])
                b_fits = b_fits and b_down.flatten(1).shape[1] == b_down.shape[1]
            if a_fits and b_fits and a_first.shape[0] == b_down.shape[1]:
                readings.append(cls(a_first, a_second, b_up, b_down, parts.scale(int(a_second.shape[0])), core))
        if not readings:
            raise CorruptFileError(
                f"{parts.file}: the four matrices of {quoted(parts.stem)} have no common inner width: a1 {list(a1.shape)}, "
                f"a2 {list(a2.shape)}, b1 {list(b1.shape)}, b2 {list(b2.shape)}"
            )
        first, *rest = sorted(readings, key=lambda reading: reading.rank)  # without a layer: an inner width is small
        return replace(first, other=rest[0]) if rest else first

    def to_parts(self) -> dict[str, Tensor]:
        matrices = {"a1": self.a_first, "a2": self.a_second, "b1": self.b_up, "b2": self.b_down, "bm": self.b_mid}
        parts = {f".{name}.weight": t for name, t in matrices.items() if t is not None}
        return parts | {".alpha": torch.tensor(self.scale * self.rank)}
