"""The LoRAs that run beside a model's layers in one call of it: how strong each is on every chunk of the batch, and where."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from math import prod

from torch import Tensor

from ..attention.call import UNCOND, ModelCall
from ..attention.masks import RegionMask, inference_mode, token_rows
from ..device_cache import DeviceCache
from ..errors import InvalidInputError
from ..models.grids import TokenGrid
from ..models.streams import Stream
from .patch import LoRAPatch
from .weights import Component


@dataclass(slots=True)
class Running:
    """The LoRAs of one part of a model in one call of it.

    ``patches`` are as they were when the call began. ``region`` is the masked patch whose text keys and values are wanted
    now, None for none. ``inputs`` keeps the text that the layers of masked patches saw, ``text`` is how many tokens of it stand
    in front of the picture's where a layer sees both, and ``rows`` are regions by patch, where a call's are its own.
    """

    patches: tuple[LoRAPatch, ...] = ()
    component: Component = "denoiser"
    model: ModelCall = field(default_factory=ModelCall)
    region: int | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    text: int | None = None
    rows: dict[int, DeviceCache[Tensor]] = field(default_factory=dict[int, "DeviceCache[Tensor]"])
    _strengths: dict[int, tuple[float, ...]] = field(default_factory=dict[int, tuple[float, ...]])

    def strengths(self, index: int) -> tuple[float, ...]:
        """Strength of a patch on every chunk; one entry if they are equal."""
        found = self._strengths.get(index)
        if found is None:
            patch, component = self.patches[index], self.component
            cond = patch.strength_for(component)
            uncond = cond if patch.uncond_strength is None or component != "denoiser" else patch.uncond_strength
            if component == "denoiser" and not patch.window.constant:
                factor = patch.window.at(self.model.percent())
                cond, uncond = cond * factor, uncond * factor
            chunks = tuple(uncond if branch == UNCOND else cond for branch in self.model.branches)
            found = self._strengths[index] = chunks[:1] if len(set(chunks)) == 1 else chunks
        return found


def mask_like(y: Tensor, index: int, call: Running, stream: Stream, *, channels_first: bool = False) -> Tensor:
    """Region of a patch, shaped to multiply the output of a layer: ``b l 1`` of tokens, ``b 1 y x`` of pictures, ``b 1`` of vectors.

    What is not the picture's (text, embeddings, modulations, tokens of reference pictures) takes the part of the picture that the
    region covers. Made once for every kind of call and layer.
    """
    mask, model = call.patches[index].mask, call.model
    assert mask is not None
    shape = (*y.shape[:1], *y.shape[2:]) if channels_first else tuple(y.shape[:-1])
    text = call.text if stream.sees == "text, picture" else None
    key = (
        stream.sees, stream.of.tokens, stream.of.multiple, shape, channels_first, text, model.latent, model.areas, model.branches,
        model.batch, model.times, model.frames, y.device, y.dtype, inference_mode(),
    )  # fmt: skip
    # windows of an animation are too many to keep longer than their call
    kept = mask.rows if model.frames is None else call.rows.setdefault(index, DeviceCache())
    found = kept.get(key)
    return kept.keep(key, _make_rows(mask, y, call, stream, channels_first)) if found is None else found


def _make_rows(mask: RegionMask, y: Tensor, call: Running, stream: Stream, channels_first: bool) -> Tensor:
    model = call.model
    if model.latent is None or model.seen is None:
        raise InvalidInputError(
            "a region mask needs the latent's size, which this model does not tell; remove the mask"
        )
    batch = model.batch or int(y.shape[0])
    latents = batch // len(model.branches)
    tokens = stream.sees not in ("text", "texts")
    in_a_row = y.ndim == 2 and tokens and y.shape[0] > batch and y.shape[0] % batch == 0
    dims = (int(y.shape[0]) // batch,) if in_a_row else _token_dims(y, channels_first)
    if not tokens or not dims:
        dims = (1,) * (y.ndim - 2)
        # the same share as beside tokens
        whole = stream.of.tokens.grid(model.seen, sys.maxsize) or TokenGrid(*model.seen, 1)
        rows = token_rows(mask, replace(model, times=1), whole, y, latents).mean(1, keepdim=True)
    else:
        grid, front, behind = _places(dims, channels_first, call, stream)
        rows = token_rows(mask, model, grid, y, latents, front=front, behind=behind)
    if in_a_row:  # all latents' tokens one after the other, in the place of the batch
        return rows.expand(batch, -1, -1).reshape(-1, 1)
    if rows.shape[0] not in (1, y.shape[0]):
        more, rest = divmod(int(y.shape[0]), rows.shape[0])
        if rest or not more or stream.sees == "texts":
            rows = rows.mean(0, keepdim=True)
        else:  # for reference pictures again, or for every moment of a video
            rows = rows.repeat(more, 1, 1) if stream.of.again else rows.repeat_interleave(more, 0)
    return rows.reshape(-1, *((1, *dims) if channels_first else (*dims, 1)))


def _token_dims(y: Tensor, channels_first: bool) -> tuple[int, ...]:
    """Sizes of the axes along which an output has tokens; 1 for the heads of what is split into some. None of a vector."""
    dims = tuple(int(size) for size in (y.shape[2:] if channels_first else y.shape[1:-1]))
    if channels_first or len(dims) != 2:
        return dims
    return (dims[0], 1) if dims[0] >= dims[1] else (1, dims[1])


def _places(dims: tuple[int, ...], channels_first: bool, call: Running, stream: Stream) -> tuple[TokenGrid, int, int]:
    """The grid of the picture's tokens, and how many others there are in front of them and behind them."""
    model, rule, count = call.model, stream.of, prod(dims)
    assert model.seen is not None
    grid = rule.tokens.grid(model.seen, count, (dims[0], dims[1]) if channels_first and len(dims) == 2 else None)
    own = 0 if grid is None else grid.rows * grid.columns * model.times
    front = 0
    if stream.sees == "text, picture":
        front = count if call.text is None else call.text
    elif stream.sees == "picture last":
        front = count - -(-own // rule.multiple) * rule.multiple
    if grid is None or front < 0 or front + own > count:
        raise InvalidInputError(
            f"a region mask does not fit a layer with {count} tokens, which is no level of a latent of {model.latent}; "
            "another node changes the token count (token merging?): remove it or the mask"
        )
    return grid, front, count - front - own
