"""Whole differences: of a weight, of a bias, of a norm. ``diff``, ``diff_b``, ``w_norm`` and ``b_norm`` are LyCORIS's."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..layer import Layer
from ..parts import Key, Parts, key
from ..update import Change, Update, flat, near


@dataclass(frozen=True, slots=True, eq=False)
class Difference(Update):
    """``ΔW = diff``, of a weight or of a norm's vector."""

    algorithm: ClassVar[str] = "full"
    keys: ClassVar[tuple[Key, ...]] = (
        key(".diff", r"\.diff$", "diff"),
        key(".diff_b", r"\.diff_b$", "diff_b"),
        key(".w_norm", r"\.w_norm$", "w_norm"),
        key(".b_norm", r"\.b_norm$", "b_norm"),
    )
    marks: ClassVar[tuple[str, ...]] = ("diff", "w_norm")
    diff: Tensor

    def fits(self, shape: tuple[int, ...]) -> bool:
        return flat(tuple(self.diff.shape)) == flat(shape)

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return tuple(self.diff.shape)

    def delta(self, weight: Tensor) -> Tensor:
        return near(self.diff, weight).reshape(weight.shape)

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        weight = near(self.diff, like).reshape(layer.shape)
        if layer.kind == "norm":
            return lambda x, y, s: layer.normalised(x) * layer.along(weight, x) * s
        return lambda x, y, s: layer.apply(x, weight) * s

    def rows(self, start: int, length: int) -> Update:
        return replace(self, diff=self.diff[start : start + length])

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        return cls(parts["diff" if "diff" in parts else "w_norm"])

    @classmethod
    def bias_from_parts(cls, parts: Parts) -> Update | None:
        role = next((role for role in ("diff_b", "b_norm") if role in parts), None)
        return None if role is None else cls(parts.matrix(role, 1))

    def to_parts(self) -> dict[str, Tensor]:
        return {(".w_norm" if self.diff.ndim == 1 else ".diff"): self.diff}

    def bias_to_parts(self, weight: Update | None) -> dict[str, Tensor]:
        norm = isinstance(weight, Difference) and weight.diff.ndim == 1
        return {(".b_norm" if norm else ".diff_b"): self.diff}

    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.diff.double()))
