"""LoRA and LoCon: ``ΔW = scale · up · down``, with an optional core between them for convolutions (tucker).

LoRA: arXiv 2106.09685. LoCon and the core tensor ``lora_mid``: LyCORIS, arXiv 2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import CorruptFileError, UnknownFormatError, quoted
from ..fresh import Settings, TrainedAs, scale_for, uniform
from ..layer import Layer
from ..parts import ADAPTER, Key, Parts, key
from ..update import Change, Update, alike, flat, near, wide
from .difference import Difference


@dataclass(frozen=True, slots=True, eq=False)
class LowRank(Update):
    """``down`` is ``r i`` or ``r i y x``, ``up`` is ``o r`` (trailing ones allowed), ``mid`` is ``r r y x``."""

    algorithm: ClassVar[str] = "LoRA"
    joins: ClassVar[bool] = True
    keys: ClassVar[tuple[Key, ...]] = (
        key(".lora_B", r"\.lora_B(?:\.(?!bias)[^.]+)?\.bias$", "lora_bias", peft=True),  # with lora_bias; BFL control
        key(".lora_A", rf"\.lora_A(?:_\d+)?{ADAPTER}(?:\.weight)?$", "down", peft=True),
        key(".lora_B", rf"\.lora_B(?:_\d+)?{ADAPTER}(?:\.weight)?$", "up", peft=True),
        key(".lora_E", rf"\.lora_E{ADAPTER}$", "singular"),  # AdaLoRA
        key(".lora_embedding_A", rf"\.lora_embedding_A{ADAPTER}$", "embedding_down", peft=True),
        key(".lora_embedding_B", rf"\.lora_embedding_B{ADAPTER}$", "embedding_up", peft=True),
        key(".lora_down", r"\.lora_down\.weight$", "down"),  # kohya
        key(".lora_up", r"\.lora_up\.weight$", "up"),
        key(".lora_mid", r"\.lora_mid\.weight$", "mid"),
        key(".down.", r"(?:\.lora_linear_layer|\.lora|_lora)\.down\.weight$", "down"),  # diffusers, old and oldest
        key(".up.", r"(?:\.lora_linear_layer|\.lora|_lora)\.up\.weight$", "up"),
        key("lora.alpha", r"(?:\.lora|_lora)\.alpha$", "alpha", number=True),
        key("lora_linear_layer.alpha", r"\.lora_linear_layer\.alpha$", "alpha", number=True),
        # XLabs: the number says picture or text, it stays in the name
        key(".down.", r"(?<=_lora[12])\.down\.weight$", "down"),
        key(".up.", r"(?<=_lora[12])\.up\.weight$", "up"),
        key(".alpha", r"\.alpha$", "alpha", number=True),  # of all algorithms with a scale
    )
    marks: ClassVar[tuple[str, ...]] = ("down", "up", "embedding_down", "embedding_up")
    inner_width: ClassVar[str] = "down"
    peft: ClassVar[tuple[str, ...]] = ("LoRA", "AdaLoRA")
    trainings: ClassVar[tuple[TrainedAs, ...]] = (
        TrainedAs("lora", "attention layers", network="networks.lora"),
        TrainedAs(
            "locon",
            "convolutions and feed-forward layers too",
            "all: 0, attn: 1, ff: 1, proj: 1, resnet: 1, sampler: 1",
            "networks.lora",
        ),
    )
    down: Tensor
    up: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def fits(self, shape: tuple[int, ...]) -> bool:
        columns = self.down.flatten(1).shape[1] * (1 if self.mid is None else self.mid[0, 0].numel())
        kernel = self.mid is None or tuple(self.mid.shape[2:]) == shape[2:]
        return kernel and (self.up.shape[0], columns) == flat(shape)

    def on(self, shape: tuple[int, ...]) -> Update:
        """A vector's is no product any more."""
        if len(shape) > 1:
            return self
        up, down = alike(self.up.flatten(1), self.down.flatten(1))
        return Difference((up @ down).flatten() * self.scale)

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return int(self.up.shape[0]), *self.down.shape[1:2], *self.kernel

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple((self.down if self.mid is None else self.mid).shape[2:])

    def delta(self, weight: Tensor) -> Tensor:
        up, down = near(self.up, weight).flatten(1), near(self.down, weight)
        if self.mid is not None:
            core = torch.einsum("or,rs...->os...", up, near(self.mid, weight))
            return torch.einsum("os...,si->oi...", core, down.flatten(1)).reshape(weight.shape) * self.scale
        return (up @ down.flatten(1)).reshape(weight.shape) * self.scale

    def products(self, layer: Layer, like: Tensor) -> tuple[Tensor, Tensor]:
        down, up = near(self.down, like), near(wide(self.up).flatten(1) * self.scale, like)
        if self.mid is not None:
            # the 1×1 down and the core in one kernel: r i y x
            return torch.einsum("rs...,si->ri...", near(self.mid, like), down.flatten(1)), up
        if layer.kind == "conv":
            down = down.reshape(self.rank, *layer.shape[1:])
        return (down if layer.kind == "conv" else down.flatten(1)), up

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        down, up = self.products(layer, like)
        return lambda x, y, s: layer.pointwise(layer.apply(x, down), up) * s

    def rows(self, start: int, length: int) -> Update:
        return replace(self, up=self.up[start : start + length])

    @classmethod
    def from_parts(cls, parts: Parts) -> Update:
        if "down" not in parts and "up" not in parts:
            return _of_embedding(parts)
        down, up, mid = parts.matrix("down"), parts.matrix("up"), parts.get("mid")
        rank, inner = int(down.shape[0]), int(up.flatten(1).shape[1])
        fits = inner == rank and up.shape[1] == inner
        if mid is not None:
            pointwise = down.flatten(1).shape[1] == down.shape[1]
            fits = (
                mid.ndim > 2 and inner == mid.shape[0] and mid.shape[1] == rank and up.shape[1] == inner and pointwise
            )
        if not fits:
            raise CorruptFileError(
                f"{parts.file}: the matrices of {quoted(parts.stem)} do not multiply: down {list(down.shape)}, up {list(up.shape)}"
                + (f", mid {list(mid.shape)}" if mid is not None else "")
                + "; their inner widths must be equal"
            )
        singular = parts.get("singular")
        if singular is not None:
            if parts.config is None or parts.config.method != "ADALORA":
                raise UnknownFormatError(
                    f"{parts.file} is a PEFT AdaLoRA file without its adapter_config.json, whose rank its strength needs; put it "
                    "beside the file"
                )
            if singular.numel() != rank or down.ndim != 2:
                raise parts.mismatch()
            down = down if down.is_meta else down.float() * singular.float().reshape(-1, 1)
        return cls(down, up, parts.scale(rank), mid)

    @classmethod
    def bias_from_parts(cls, parts: Parts) -> Update | None:
        """PEFT's bias of lora_B, so under the scale of the whole product."""
        if "lora_bias" not in parts:
            return None
        bias, down = parts.matrix("lora_bias", 1), parts.get("down")
        factor = 1.0 if down is None or down.ndim == 0 else parts.scale(int(down.shape[0]))
        return Difference(bias if factor == 1 or bias.is_meta else bias.float() * factor)

    def to_parts(self) -> dict[str, Tensor]:
        parts = {".lora_down.weight": self.down, ".lora_up.weight": self.up}
        if self.mid is not None:
            parts[".lora_mid.weight"] = self.mid
        return parts | {".alpha": torch.tensor(self.scale * self.rank)}

    def to_peft(self) -> dict[str, Tensor] | None:
        if self.mid is not None:
            return None
        up = self.up if self.scale == 1 else (wide(self.up) * self.scale).to(self.up.dtype)
        return {".lora_A.weight": self.down, ".lora_B.weight": up}

    def factors(self) -> tuple[Tensor, Tensor]:
        up, down = alike(self.up.flatten(1), self.down.flatten(1))
        if self.mid is not None:
            up, down, mid = alike(up, down, self.mid)
            down = torch.einsum("rs...,si->ri...", mid, down)
        return up * self.scale, down.flatten(1)

    @classmethod
    def fresh(cls, weight: Tensor, settings: Settings) -> Update:
        """``down`` uniform as torch's layers start, ``up`` zero (LoRA's paper has a normal distribution; trainers this one)."""
        rank = min(settings.rank, *flat(tuple(weight.shape)))
        up = torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2))
        return cls(uniform(rank, *weight.shape[1:]), up, scale_for(settings, rank))


def _of_embedding(parts: Parts) -> LowRank:
    """PEFT's LoRA of an embedding: its table changes by ``(B A)ᵀ``."""
    down, up = parts.matrix("embedding_down"), parts.matrix("embedding_up")
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise parts.mismatch()
    return LowRank(up.T, down.T, parts.scale(int(down.shape[0])))
