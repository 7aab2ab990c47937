"""The LoRAs that run beside a model's layers in one call of it: how strong each is on every chunk of the batch, and where."""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention.call import UNCOND, ModelCall
from ..errors import InvalidInputError
from ..models.grids import Pyramid, TokenGrid
from .patch import LoRAPatch
from .weights import Component


@dataclass(slots=True)
class Running:
    """The LoRAs of one part of a model in one call of it.

    ``patches`` are as they were when the call began. ``region`` is the masked patch whose text keys and values are wanted
    now, None for none. ``inputs`` keeps the text that the layers of masked patches saw.
    """

    patches: tuple[LoRAPatch, ...] = ()
    component: Component = "denoiser"
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
            uncond = cond if patch.uncond_strength is None or component != "denoiser" else patch.uncond_strength
            if component == "denoiser" and not patch.window.constant:
                factor = patch.window.at(self.model.percent())
                cond, uncond = cond * factor, uncond * factor
            chunks = tuple(uncond if branch == UNCOND else cond for branch in self.model.branches)
            found = self._strengths[index] = chunks[:1] if len(set(chunks)) == 1 else chunks
        return found


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
