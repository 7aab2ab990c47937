"""LoRAs in regions by hand: every layer blends, token by token, what it gives and what its merged weights would give.

It asks nothing of the package but the merge of one weight, so scripts in a host's Python can use it too.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Sequences = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""Regions of all sequences with tokens of the picture that a model has, made of those tokens' and of what others take."""


def text_apart(picture: Tensor, share: Tensor, *, text: int, others: int = 0, filled: int = 0) -> Sequence[Tensor]:
    """The picture alone, with other pictures or what it is filled up with behind it, and all of it with so much text in front."""
    front, behind = share.expand(text), share.expand(others + filled)
    return picture, torch.cat([picture, behind]), torch.cat([front, picture]), torch.cat([front, picture, behind])


def in_front(picture: Tensor, share: Tensor, *, text: int, filled: int) -> Sequence[Tensor]:
    """The picture filled up, alone and with so much text behind it."""
    return [torch.cat([picture, share.expand(count)]) for count in (filled, filled + text)]


def of_a_video(picture: Tensor, share: Tensor, *, moments: int) -> Sequence[Tensor]:
    return [picture.repeat(moments)]


def of_tokens(mask: Tensor, cell: int = 2) -> Tensor:
    """The mean of a mask over the latents of every token, ``cell`` to a side, ``y x``; those at odd ends are of fewer."""
    rows = [torch.stack([part.mean() for part in strip.split(cell, 1)]) for strip in mask.split(cell, 0)]
    return torch.stack(rows)


def blended(y: Tensor, grid: Tensor, sequences: Sequences, latents: int) -> Tensor:
    """How much of an output belongs to a region ``y x`` of tokens, told by its size alone."""
    share = grid.mean()
    lengths = {len(row): row for row in sequences(grid.flatten(), share)}
    if y.ndim >= 4:  # of convolutions, or of tokens with their places
        return grid[..., None] if y.shape[-3:-1] == grid.shape else grid
    if y.ndim == 3 and y.shape[1] in lengths:
        return lengths[int(y.shape[1])][None, :, None]
    if y.ndim == 2 and y.shape[0] // latents in lengths:  # the tokens of all latents in a row
        return lengths[y.shape[0] // latents].repeat(latents)[:, None]
    return share


PROMPT = re.compile(r"(.*\bcross_attn|blocks\.\d+\.attn2)\.(to_)?[kv](_proj)?$")
"""Keys and values that a cross-attention makes of the text."""


@contextmanager
def by_hand(
    model: nn.Module, patches: Iterable[Any], sequences: Sequences, *, latents: int = 2, cell: int = 2
) -> Generator[None]:
    """LoRAs with one mask each on a model, for batches of so many latents.

    A cross-attention to the text runs once for every region, with the region's own keys and values alone.
    """
    merged: dict[str, list[tuple[nn.Module, Tensor]]] = {}
    attentions: dict[str, list[tuple[dict[str, nn.Module], Tensor]]] = {}
    for patch in patches:
        grid = of_tokens(patch.mask.values[0], cell)
        own: dict[str, dict[str, nn.Module]] = {}
        for match, factor in patch.acting("denoiser"):
            module = copy.deepcopy(model.get_submodule(match.target.path))
            parameter: Tensor = getattr(module, match.parameter)
            total = parameter.detach().clone()
            match.change(parameter.detach(), total, patch.strength * factor)
            parameter.data = total
            if PROMPT.match(match.target.path):
                site, _, name = match.target.path.rpartition(".")
                own.setdefault(site, {})[name] = module
            else:
                merged.setdefault(match.target.path, []).append((module, grid))
        for site, modules in own.items():
            attentions.setdefault(site, []).append((modules, grid))

    def hook(path: str) -> Callable[..., Tensor]:
        def blend(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            changes = ((module(*args) - y) * blended(y, grid, sequences, latents) for module, grid in merged[path])
            return sum(changes, start=y)

        return blend

    def attend(site: str) -> Callable[..., Tensor]:
        def blend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            out = y
            for modules, grid in attentions[site]:
                kept = {name: module.get_submodule(name) for name in modules}
                for name, other in modules.items():
                    setattr(module, name, other)
                changed: Tensor = module.forward(*args, **kwargs)
                for name, former in kept.items():
                    setattr(module, name, former)
                out = out + (changed - y) * blended(y, grid, sequences, latents)
            return out

        return blend

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in merged]
    handles += [model.get_submodule(s).register_forward_hook(attend(s), with_kwargs=True) for s in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
