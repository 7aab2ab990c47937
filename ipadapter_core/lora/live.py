"""Live LoRAs: side paths beside a model's layers, no weight written, strength a number that is read at every call.

All low-rank LoRAs on one layer are concatenated along the rank: one product down, the strengths (and masks) on the few
columns between, one product up that adds to the layer's output. Other algorithms follow one by one.

Letters as in ``attention.py``; ``r`` is the sum of all ranks on a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.call import UNCOND, ModelCall
from ..errors import InvalidInputError
from ..models.grids import Pyramid, TokenGrid
from .patch import LoRAPatch
from .placement import Placement
from .update import Change, Layer
from .weights import Component


@dataclass(slots=True)
class Running:
    """The LoRAs of one part of a model in one call of it.

    ``patches`` are as they were when the call began. ``region`` is the masked patch whose text keys and values are wanted
    now, None for none. ``inputs`` keeps the text that the layers of masked patches saw.
    """

    patches: tuple[LoRAPatch, ...] = ()
    component: Component = "unet"
    model: ModelCall = field(default_factory=ModelCall)
    region: int | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _strengths: dict[int, tuple[float, ...]] = field(default_factory=dict[int, tuple[float, ...]])

    def strengths(self, index: int) -> tuple[float, ...]:
        """Strength of a patch on every chunk; one entry if they are equal."""
        found = self._strengths.get(index)
        if found is None:
            patch, component = self.patches[index], self.component
            cond = patch.strength_for(component)
            uncond = cond if patch.uncond_strength is None or component != "unet" else patch.uncond_strength
            if component == "unet" and not patch.window.constant:
                factor = patch.window.at(self.model.percent())
                cond, uncond = cond * factor, uncond * factor
            chunks = tuple(uncond if branch == UNCOND else cond for branch in self.model.branches)
            found = self._strengths[index] = chunks[:1] if len(set(chunks)) == 1 else chunks
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Fused:
    """Low-rank updates of one layer as two matrices; ``columns`` are where each one's rank begins and ends."""

    down: Tensor
    up: Tensor
    columns: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    index: int
    placement: Placement
    factor: float


class LiveLayer:
    """Everything that acts on one layer. ``text`` says that the layer reads the prompt, so it has no pixels to mask."""

    def __init__(self, path: str, label: str, parts: Sequence[_Part]) -> None:
        self.path, self.label = path, label
        self.text = label.endswith((".attn2.to_k", ".attn2.to_v"))
        self.low_rank = [p for p in parts if p.placement.update.fuses and p.placement.parameter == "weight"]
        self.others = [p for p in parts if p not in self.low_rank]
        self.indices = {part.index for part in parts}
        self._fused: dict[tuple[object, ...], _Fused] = {}
        self._changes: dict[tuple[object, ...], Change] = {}
        self._vectors: dict[tuple[object, ...], Tensor] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the factors that are kept for devices now."""
        return sum(t.nbytes for fused in list(self._fused.values()) for t in (fused.down, fused.up))

    def __getstate__(self) -> dict[str, Any]:
        """What was made for a device, or from a weight, is another model's in a copy."""
        return self.__dict__ | {"_fused": {}, "_changes": {}, "_vectors": {}}

    def release(self) -> None:
        """Forget what was made for a device."""
        for kept in (self._fused, self._changes, self._vectors):
            kept.clear()

    def add(self, module: nn.Module, x: Tensor, y: Tensor, call: Running) -> Tensor:
        """The layer's output with every LoRA that acts in this call; the same object if none does."""
        low = [(p, s) for p in self.low_rank if any(s := self._strengths(p, call))]
        others = [(p, s) for p in self.others if any(s := self._strengths(p, call))] if self.others else ()
        if self.text and any(call.patches[i].mask is not None for i in self.indices):
            call.inputs[self.path] = x
        if not low and not others:
            return y
        x = x.to(y.dtype) if x.dtype != y.dtype and x.is_floating_point() else x  # an embedding reads ids
        base = y
        if low:
            y = self._add_low_rank(module, x, y, low, call)
        for part, strengths in others:
            change = self._change(module, part, y)
            rows, layer = part.placement.rows, Layer(module)
            added = self._changed(change, x, base if rows is None else _rows_of(base, rows, layer), strengths)
            weight = self._mask(part, y, call)
            y = _placed_sum(y, added if weight is None else added * weight, rows, layer)
        return y

    def masked_change(self, module: nn.Module, index: int, y: Tensor, call: Running) -> Tensor | None:
        """What masked patch ``index`` alone adds to a text layer's output; None if nothing."""
        if index not in self.indices or self.path not in call.inputs:
            return None
        only = tuple(patch if i == index else patch.with_strength(0.0) for i, patch in enumerate(call.patches))
        alone = Running(only, "unet", call.model, index)
        changed = self.add(module, call.inputs[self.path], y, alone)
        return None if changed is y else changed

    def _strengths(self, part: _Part, call: Running) -> tuple[float, ...]:
        if self.text and call.patches[part.index].mask is not None and call.region != part.index:
            return (0.0,)
        strengths = call.strengths(part.index)
        return strengths if part.factor == 1 else tuple(s * part.factor for s in strengths)

    def _mask(self, part: _Part, y: Tensor, call: Running) -> Tensor | None:
        if self.text or call.patches[part.index].mask is None:
            return None
        return mask_like(y, part.index, call)

    def _add_low_rank(
        self,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        acting: Sequence[tuple[_Part, tuple[float, ...]]],
        call: Running,
    ) -> Tensor:
        layer = Layer(module)
        fused = self._prepare(layer, tuple(self.low_rank.index(part) for part, _ in acting), y)
        inner = layer.apply(x, fused.down)
        alpha = 1.0
        masks = [self._mask(part, y, call) for part, _ in acting]
        strengths = [s for _, s in acting]
        if len(set(strengths)) == 1 and len(strengths[0]) == 1 and all(mask is None for mask in masks):
            alpha = strengths[0][0]
        elif all(len(s) == 1 for s in strengths) and all(mask is None for mask in masks):
            inner = inner * layer.channels(self._vector(strengths, fused, y))
        else:
            pieces: list[Tensor] = []
            channel = 1 if layer.kind == "conv" else -1
            for (begin, end), strength, mask in zip(fused.columns, strengths, masks, strict=True):
                piece = inner.narrow(channel, begin, end - begin) * self._per_row(strength, inner)
                pieces.append(piece if mask is None else piece * mask)
            inner = torch.cat(pieces, channel)
        if layer.kind == "conv":
            return torch.add(y, layer.pointwise(inner, fused.up), alpha=alpha)
        if y.ndim == 2:
            return torch.addmm(y, inner, fused.up.T, alpha=alpha)
        rows = torch.addmm(y.reshape(-1, y.shape[-1]), inner.reshape(-1, inner.shape[-1]), fused.up.T, alpha=alpha)
        return rows.view(y.shape)

    def _prepare(self, layer: Layer, acting: tuple[int, ...], like: Tensor) -> _Fused:
        key = (acting, like.device, like.dtype, torch.is_inference_mode_enabled())
        found = self._fused.get(key)
        if found is None:
            downs: list[Tensor] = []
            ups: list[Tensor] = []
            columns: list[tuple[int, int]] = []
            begin = 0
            for part in (self.low_rank[i] for i in acting):
                update, rows = part.placement.update, part.placement.rows
                down, up = update.products(layer, like)
                if rows is not None:  # a part of a fused layer: zeros elsewhere
                    start, length = rows
                    up = F.pad(up, (0, 0, start, layer.shape[0] - start - length))
                downs.append(down)
                ups.append(up)
                columns.append((begin, begin + down.shape[0]))
                begin += down.shape[0]
            found = self._fused[key] = _Fused(torch.cat(downs), torch.cat(ups, 1), tuple(columns))
        return found

    def _vector(self, strengths: Sequence[tuple[float, ...]], fused: _Fused, like: Tensor) -> Tensor:
        """Strength per rank column."""
        numbers = [s[0] for s, (begin, end) in zip(strengths, fused.columns, strict=True) for _ in range(begin, end)]
        return self._kept(tuple(numbers), like)

    def _per_row(self, strengths: tuple[float, ...], like: Tensor) -> float | Tensor:
        """One number, or one per chunk of the batch, shaped ``b 1 …``."""
        if len(strengths) == 1:
            return strengths[0]
        rows = like.shape[0] // len(strengths)
        return self._kept(strengths, like).repeat_interleave(rows).reshape(-1, *[1] * (like.ndim - 1))

    def _kept(self, numbers: tuple[float, ...], like: Tensor) -> Tensor:
        """Numbers as a tensor; kept, as making one waits for the device."""
        key = (numbers, like.device, like.dtype)
        found = self._vectors.get(key)
        if found is None:
            if len(self._vectors) > 64:  # a curve has a value per step
                self._vectors.clear()
            found = self._vectors[key] = torch.tensor(numbers, dtype=like.dtype).to(like.device)
        return found

    def _change(self, module: nn.Module, part: _Part, like: Tensor) -> Change:
        key = (id(module), id(part), like.device, like.dtype)
        found = self._changes.get(key)
        if found is None:
            update, rows = part.placement.update, part.placement.rows
            layer = Layer(module) if rows is None else _RowsOf(module, *rows)
            make = update.live if part.placement.parameter == "weight" else update.live_bias
            found = self._changes[key] = make(layer, like)
        return found

    @staticmethod
    def _changed(change: Change, x: Tensor, y: Tensor, strengths: tuple[float, ...]) -> Tensor:
        if len(strengths) == 1:
            return change(x, y, strengths[0])
        chunks = zip(x.chunk(len(strengths)), y.chunk(len(strengths)), strengths, strict=True)
        return torch.cat([change(a, b, s) for a, b, s in chunks])


class _RowsOf(Layer):
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
        return self.without_bias(_rows_of(whole, (self._start, self._length), self))


def _rows_of(y: Tensor, rows: tuple[int, int], layer: Layer) -> Tensor:
    """The output of some rows of a fused layer."""
    return y.narrow(1 if layer.kind == "conv" else -1, *rows)


def _placed_sum(y: Tensor, added: Tensor, rows: tuple[int, int] | None, layer: Layer) -> Tensor:
    if rows is None:
        return y + added
    y = y.clone()
    _rows_of(y, rows, layer).add_(added)
    return y


def mask_like(y: Tensor, index: int, call: Running) -> Tensor:
    """Region of a patch, shaped to multiply an output: ``b l 1`` of tokens, ``b 1 y x`` of pictures, ``b 1`` of embeddings.

    Layers without pixels (time embeddings) take the part of the picture that the region covers.
    """
    mask, model = call.patches[index].mask, call.model
    assert mask is not None
    chunks = len(model.branches)
    latents = y.shape[0] // chunks
    if model.latent is None:
        raise InvalidInputError(
            "a region mask needs the latent's size, which this model does not tell; remove the mask"
        )
    areas = model.areas or (None,)
    if y.ndim == 2:
        grid = TokenGrid(*model.latent, 1)
    else:
        shape = (int(y.shape[-2]), int(y.shape[-1])) if y.ndim == 4 else None
        tokens = int(y.shape[1]) if shape is None else shape[0] * shape[1]
        found = _TOKENS.grid(model.seen or model.latent, tokens, shape)
        if found is None:
            raise InvalidInputError(
                f"a region mask does not fit a layer with {tokens} tokens, which is no level of a latent of {model.latent}; "
                "another node changes the token count (token merging?): remove it or the mask"
            )
        grid = found
    grids = [mask.grid(model.latent, area, grid, y, latents) for area in areas]
    rows = grids[0] if len(grids) == 1 else torch.cat([g.expand(latents, -1, -1) for g in grids])
    if rows.shape[0] not in (1, y.shape[0]):
        rows = rows.repeat(y.shape[0] // rows.shape[0], 1, 1)
    if y.ndim == 2:
        return rows.mean(1)
    return rows if y.ndim == 3 else rows.transpose(1, 2).unflatten(2, grid[:2])


_TOKENS = Pyramid()
"""LoRAs with masks run on UNets."""


class LiveStack:
    """Patches on one part of a model, layer by layer. What it keeps per device is made when first used."""

    def __init__(self, patches: Sequence[LoRAPatch], component: Component = "unet") -> None:
        self.patches = tuple(patches)
        self.component: Component = component
        parts: dict[str, list[_Part]] = {}
        labels: dict[str, str] = {}
        for index, patch in enumerate(patches):
            for placement, factor in patch.acting(component):
                parts.setdefault(placement.target.path, []).append(_Part(index, placement, factor))
                labels[placement.target.path] = placement.target.label
        self.layers = {path: LiveLayer(path, labels[path], found) for path, found in parts.items()}

    @property
    def text_sites(self) -> tuple[str, ...]:
        """Cross-attentions whose keys or values a masked patch changes, by module path."""
        regional = {i for i, patch in enumerate(self.patches) if patch.mask is not None}
        found = (
            path.rpartition(".")[0] for path, layer in self.layers.items() if layer.text and layer.indices & regional
        )
        return tuple(dict.fromkeys(found))

    def regions_at(self, site: str, call: Running) -> list[int]:
        """Masked patches that act on the text keys or values of one cross-attention now."""
        indices = {i for n in ("to_k", "to_v") if (layer := self.layers.get(f"{site}.{n}")) for i in layer.indices}
        return [i for i in sorted(indices) if call.patches[i].mask is not None and any(call.strengths(i))]

    def tensors(self) -> tuple[Tensor, ...]:
        """The files' tensors behind everything that acts. Low-rank ones are kept per device at about this size;
        LoHa, whose factors are as wide as the square of its rank, at more."""
        parts = (p for layer in self.layers.values() for p in (*layer.low_rank, *layer.others))
        found = (t for part in parts for t in part.placement.update.tensors().values())
        return tuple({id(t): t for t in found}.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of the low-rank factors that are kept for devices now; other algorithms keep theirs in closures."""
        return sum(layer.held_bytes for layer in self.layers.values())

    def release(self) -> None:
        """Forget everything made for a device."""
        for layer in self.layers.values():
            layer.release()
