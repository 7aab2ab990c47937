"""Unfused LoRAs: side paths beside a model's layers, no weight written, strength a number that is read at every call.

Graphs call this mode ``live``, other tools bypass.

All low-rank LoRAs on one layer run as one (``products.py``), other algorithms follow one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..device_cache import DeviceCache
from ..errors import IncompatibleAdapterError, InvalidInputError
from ..models.streams import Stream
from .layer import Layer, RowsOf, add_rows, rows_of
from .patch import LoRAPatch
from .products import Acting, Part, Products
from .running import Running, mask_like
from .update import Change
from .weights import Component


class UnfusedLayer:
    """Everything that acts on one layer. ``prompt`` says that it makes keys or values of the prompt: every region has its own."""

    def __init__(self, path: str, parts: Sequence[Part]) -> None:
        self.path = path
        self.stream = parts[0].match.target.stream
        self.prompt = self.stream is not None and self.stream.sees == "prompt"
        self.joined = tuple(part for part in parts if part.joins)
        self.others = tuple(part for part in parts if not part.joins)
        self.indices = {part.index for part in parts}
        self.products = Products()
        self._changes: DeviceCache[Change] = DeviceCache()

    @property
    def held_bytes(self) -> int:
        """Bytes of the factors that are kept for devices now."""
        return self.products.held_bytes

    def release(self) -> None:
        """Forget what was made for a device."""
        self.products.release()
        self._changes.release()

    def add(self, module: nn.Module, x: Tensor, y: Tensor, running: Running) -> Tensor:
        """The layer's output with every LoRA that acts in this call; the same object if none does."""
        if self.prompt and any(running.patches[i].mask is not None for i in self.indices):
            running.inputs[self.path] = x
        layer, base = Layer(module), y
        joined = self._acting(self.joined, layer, y, running)
        others = self._acting(self.others, layer, y, running) if self.others else ()
        if not joined and not others:
            return y
        x = x.to(y.dtype) if x.dtype != y.dtype and x.is_floating_point() else x  # an embedding reads ids
        if joined:
            y = self.products.add(layer, x, y, joined)
        for one in others:
            y = self._add_change(layer, x, base, y, one)
        return y

    def masked_change(self, module: nn.Module, index: int, y: Tensor, running: Running) -> Tensor | None:
        """What masked patch ``index`` alone adds to a text layer's output; None if nothing."""
        if index not in self.indices or self.path not in running.inputs:
            return None
        only = tuple(patch if i == index else patch.with_strength(0.0) for i, patch in enumerate(running.patches))
        alone = Running(only, "denoiser", running.model, index)
        changed = self.add(module, running.inputs[self.path], y, alone)
        return None if changed is y else changed

    def _acting(self, parts: Sequence[Part], layer: Layer, y: Tensor, running: Running) -> list[Acting]:
        found = ((part, self._strengths(part, y, running)) for part in parts)
        return [Acting(part, s, self._mask(part, layer, y, running)) for part, s in found if any(s)]

    def _strengths(self, part: Part, y: Tensor, running: Running) -> tuple[float, ...]:
        if self.prompt and running.patches[part.index].mask is not None and running.region != part.index:
            return (0.0,)
        strengths = running.strengths(part.index)
        if len(strengths) > 1 and self.stream is not None:
            strengths *= self._times(self.stream, y, running.model.batch)
        return strengths if part.factor == 1 else tuple(s * part.factor for s in strengths)

    def _times(self, stream: Stream, y: Tensor, batch: int | None) -> int:
        """How often all chunks of the batch come one behind the other."""
        if stream.sees == "texts":
            raise InvalidInputError(
                f"{self.path} reads the texts of all latents in one row, so a LoRA there cannot have another strength for the negative "
                f"prompt; leave the layer out with the selector, *{self.path.split('.')[0]}*: 0"
            )
        more, rest = divmod(int(y.shape[0]), batch) if batch else (1, 0)
        return more if stream.sees == "text" and stream.of.again and more > 1 and not rest else 1

    def _mask(self, part: Part, layer: Layer, y: Tensor, running: Running) -> Tensor | None:
        if self.prompt or self.stream is None or running.patches[part.index].mask is None:
            return None
        return mask_like(y, part.index, running, self.stream, channels_first=layer.channels_first)

    def _add_change(self, layer: Layer, x: Tensor, base: Tensor, y: Tensor, one: Acting) -> Tensor:
        """``y`` and what an update that is no product adds to the layer's own output ``base``."""
        rows, change = one.part.match.rows, self._change(layer, one.part, y)
        own = base if rows is None else rows_of(base, rows, layer)
        if len(one.strengths) == 1:
            added = change(x, own, one.strengths[0])
        else:
            count = len(one.strengths)
            chunks = zip(x.chunk(count), own.chunk(count), one.strengths, strict=True)
            added = torch.cat([change(a, b, s).expand_as(b) for a, b, s in chunks])  # a bias adds the same to every row
        added = added if one.mask is None else added * one.mask
        return y + added if rows is None else add_rows(y, added, rows, layer)

    def _change(self, layer: Layer, part: Part, like: Tensor) -> Change:
        key = (layer.module, part, like.device, like.dtype)
        found = self._changes.get(key)
        if found is None:
            update, rows = part.match.update, part.match.rows
            if part.match.parameter == "bias":
                make = update.unfused_bias
            else:
                make = update.unfused_in_groups if part.match.target.grouped else update.unfused
            found = self._changes.keep(key, make(layer if rows is None else RowsOf(layer.module, *rows), like))
        return found


class UnfusedStack:
    """Patches on one part of a model, layer by layer. What it keeps per device is made when first used."""

    def __init__(self, patches: Sequence[LoRAPatch], component: Component = "denoiser") -> None:
        self.patches = tuple(patches)
        self.component: Component = component
        parts: dict[str, list[Part]] = {}
        for index, patch in enumerate(patches):
            for match, factor in patch.acting(component):
                parts.setdefault(match.target.path, []).append(Part(index, match, factor))
        self.layers = {path: UnfusedLayer(path, found) for path, found in parts.items()}
        self._prompts: dict[str, list[str]] = {}
        for path, layer in self.layers.items():
            if layer.prompt:
                self._prompts.setdefault(path.rpartition(".")[0], []).append(path)
        self._check_streams()

    def _regional(self) -> Iterator[UnfusedLayer]:
        """Layers on which masked patches act; a text encoder has no regions."""
        regional = {i for i, patch in enumerate(self.patches) if patch.mask is not None}
        return (layer for layer in self.layers.values() if self.component == "denoiser" and layer.indices & regional)

    def _check_streams(self) -> None:
        unknown = [layer.path for layer in self._regional() if layer.stream is None]
        if unknown:
            raise IncompatibleAdapterError(
                f"a LoRA with a mask acts on {unknown[0]}{f' and {len(unknown) - 1} other layers' * (len(unknown) > 1)}, of which this "
                "pack does not know whether picture or text passes through; remove the mask, or leave these out with the selector"
            )

    @property
    def text_sites(self) -> tuple[str, ...]:
        """Cross-attentions whose keys or values a masked patch changes, by module path."""
        found = (layer.path.rpartition(".")[0] for layer in self._regional() if layer.prompt)
        return tuple(dict.fromkeys(found))

    @property
    def measured(self) -> str:
        """The path of the module whose output tells the length of the text, where masked patches need it."""
        streams = (layer.stream for layer in self._regional())
        return next((s.of.text for s in streams if s is not None and s.sees == "text, picture"), "")

    def regions_at(self, site: str, running: Running) -> list[int]:
        """Masked patches that act on the text keys or values of one cross-attention now."""
        indices = {i for layer in self._prompt_layers(site) for i in layer.indices}
        return [i for i in sorted(indices) if running.patches[i].mask is not None and any(running.strengths(i))]

    def blend(self, site: str, output: Tensor, running: Running, again: Callable[[], Tensor]) -> Tensor:
        """What a cross-attention gave, blended with what it gives ``again`` with every region's own keys and values."""
        base = output
        for index in self.regions_at(site, running):
            running.region = index
            try:
                changed = again()
            finally:
                running.region = None
            output = torch.addcmul(output, changed - base, self.region_at(site, index, base, running))
        return output

    def region_at(self, site: str, index: int, base: Tensor, running: Running) -> Tensor:
        """Where a masked patch acts in what one cross-attention gives, shaped to multiply it."""
        stream = next(layer.stream for layer in self._prompt_layers(site) if layer.stream is not None)
        return mask_like(base, index, running, stream._replace(sees="picture"))

    def _prompt_layers(self, site: str) -> Iterator[UnfusedLayer]:
        return (self.layers[path] for path in self._prompts.get(site, ()))

    def tensors(self) -> tuple[Tensor, ...]:
        """The files' tensors behind everything that acts. Low-rank ones are kept per device at about this size;
        LoHa, whose factors are as wide as the square of its rank, at more."""
        parts = (part for layer in self.layers.values() for part in (*layer.joined, *layer.others))
        found = (t for part in parts for t in part.match.update.tensors().values())
        return tuple({id(t): t for t in found}.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of the low-rank factors that are kept for devices now; other algorithms keep theirs in closures."""
        return sum(layer.held_bytes for layer in self.layers.values())

    def release(self) -> None:
        """Forget everything made for a device."""
        for layer in self.layers.values():
            layer.release()
