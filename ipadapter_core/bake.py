"""From adapter and prompt to what a backend applies: image keys and values per site, computed once."""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .attention.call import UNCOND
from .attention.kv import TIMESTEPS_KEPT, Baked, HeldKeys, Norms, SiteKV, Timed, TimedTokens
from .attention.masks import RegionMask
from .attention.maths import split_heads
from .attention.patch import AdapterPatch, resolve_weights
from .attention.schedule import WeightSchedule
from .checkpoints import AdapterSpec, AdapterWeights, Format
from .compatibility import CORRECT, Rules
from .errors import IncompatibleAdapterError
from .images.pictures import Picture
from .models.sites import ModelLayout
from .prompt.image_prompt import ImagePrompt

_Baked = WeakKeyDictionary[nn.Module, dict[tuple[ModelLayout, Format], HeldKeys]]


_BAKED: WeakKeyDictionary[ImagePrompt, _Baked] = WeakKeyDictionary()
"""K/V live as long as the prompt and the adapter that made them; a changed strength or mask finds them here."""


def bake(
    adapter: AdapterWeights,
    prompt: ImagePrompt,
    layout: ModelLayout,
    schedule: WeightSchedule | None = None,
    mask: RegionMask | Picture | None = None,
    *,
    prepare: Callable[[], object] | None = None,
    rules: Rules = CORRECT,
) -> AdapterPatch:
    """Project the prompt's tokens to K and V of every site, once per prompt, adapter and layout.

    ``prepare`` is called before weights are used (to move them to the device), hence not where K/V are already there.
    Raises IncompatibleAdapterError if the adapter was trained for another base model.
    """
    check_adapter(adapter, layout)
    if prompt.token_dim != adapter.spec.token_dim:
        raise IncompatibleAdapterError(
            f"the image prompt was encoded for {prompt.adapter!r} ({prompt.token_dim} wide tokens), not for {adapter.name!r} "
            f"({adapter.spec.token_dim}); encode the image with the adapter that you apply"
        )
    if adapter.spec.projected_by_model and prompt.cond.shape[-1] != prompt.token_dim:
        raise IncompatibleAdapterError(
            f"the tokens of {prompt.adapter!r} are {prompt.cond.shape[-1]} wide and must become {prompt.token_dim} wide by the "
            "model's own projection first: in Python, call project_by_model(prompt, unet)"
        )
    schedule = schedule or WeightSchedule()
    weights, latent_weights = resolve_weights(schedule, layout, rules)
    region = RegionMask.of(mask, clamp=not rules.stretched_masks)
    baked = _BAKED.setdefault(prompt, WeakKeyDictionary()).setdefault(adapter.module, {})
    form = adapter.spec.format.under(rules)
    if (layout, form) not in baked:
        if prepare is not None:
            prepare()
        read = replace(adapter, spec=replace(adapter.spec, format=form))
        baked[layout, form] = _sites(read, prompt, layout)
    held = baked[layout, form]
    return AdapterPatch(
        adapter.name, layout, held.sites, schedule, region, weights, rules, latent_weights, form.reach, held
    )


def _sites(adapter: AdapterWeights, prompt: ImagePrompt, layout: ModelLayout) -> HeldKeys:
    """K and V of every site that the adapter's reach names."""
    seen, silent = _seen(prompt)
    tokens = torch.cat(seen).to(adapter.device, adapter.dtype).unflatten(0, (len(seen), -1))
    images, reach = prompt.features.shape[1], adapter.spec.format.reach
    timed = TimedTokens(partial(_tokens_at, adapter, tokens, images)) if reach.timed else None
    sites: list[SiteKV | None] = [None] * len(layout.sites)
    for layer, index in enumerate(reach.sites(layout)):
        project = partial(_project, adapter, layer, layout.sites[index].heads, images, silent)
        sites[index] = (
            project(tokens, None) if timed is None else Timed(timed, project, silent, not reach.block_by_block)
        )
    return HeldKeys(tuple(sites), _transient(adapter, tokens, images) if reach.timed else 0)


def _transient(adapter: AdapterWeights, tokens: Tensor, images: int) -> int:
    """Bytes of tokens, keys and values of the timesteps that are kept; keys and values block by block take one block's."""
    spec, (branches, latents, _, _) = adapter.spec, tokens.shape
    rows = branches * latents * images * spec.num_tokens * adapter.dtype.itemsize
    if spec.format.reach.block_by_block:
        return rows * (TIMESTEPS_KEPT * spec.token_dim + 2 * max(spec.layer_channels))
    return rows * TIMESTEPS_KEPT * (spec.token_dim + 2 * sum(spec.layer_channels))


def _seen(prompt: ImagePrompt) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tokens of the branches, one for both where they see the same, and the branches that see nothing."""
    match prompt.negative_branch:
        case "off":
            return [prompt.cond], (UNCOND,)
        case "same":
            return [prompt.cond], ()
        case "tokens":
            return [prompt.uncond, prompt.cond], ()


@torch.no_grad()
def _tokens_at(adapter: AdapterWeights, constant: Tensor, images: int, timestep: float) -> Tensor:
    """Tokens ``r m n d`` of all branches at a timestep; those of several references stand side by side, as ``constant``'s do."""
    r, m, n, _ = constant.shape
    tokens = adapter.tokens_at(constant.reshape(r * m * images, n // images, -1), timestep)
    return tokens.reshape(r, m, -1, tokens.shape[-1])


@torch.no_grad()
def _project(
    adapter: AdapterWeights,
    layer: int,
    heads: int,
    images: int,
    silent: tuple[int, ...],
    tokens: Tensor,
    timestep: float | None,
) -> Baked:
    """K and V of one layer for tokens ``r m n d``."""
    branches, spec = tokens.shape[0], adapter.spec
    k, v = (
        nn.Parameter(split_heads(t, heads).contiguous().unflatten(0, (branches, -1)), requires_grad=False)
        for t in adapter.key_value(layer, tokens.flatten(0, 1), timestep)
    )
    form, reach = spec.format, spec.format.reach
    norms = None
    if reach.query == "raw":
        norms = Norms(form.query_weight(adapter.module, layer), form.self_weight(adapter.module, layer), reach.own_keys)
    return Baked(k, v, images, silent, norms, adapter.gate(layer) if reach.gated else None)


def check_adapter(adapter: AdapterWeights, layout: ModelLayout) -> None:
    """Raise IncompatibleAdapterError unless the adapter's layers fit the sites that it names one by one."""
    check_spec(adapter.spec, adapter.name, layout)


def check_spec(spec: AdapterSpec, name: str, layout: ModelLayout) -> None:
    """``check_adapter`` by what is known of a file without its numbers."""
    reach = spec.format.reach
    reached = reach.sites(layout)
    if (reach.text_wide and spec.token_dim != layout.token_dim) or len(spec.layer_channels) != len(reached):
        wide = spec.token_dim, layout.token_dim
        if not reach.text_wide:  # the text's width says nothing of whether they fit, the attentions' does
            wide = max(spec.layer_channels, default=0), max((site.channels for site in layout.sites), default=0)
        raise IncompatibleAdapterError(
            f"{name!r} is an adapter for {spec.base_model} ({len(spec.layer_channels)} attention layers, "
            f"{wide[0]} wide); the model is {layout.name} ({len(reached)} layers, {wide[1]} wide). "
            f"Load an adapter made for this model, or a {spec.base_model} model"
        )
    for layer, index in enumerate(reached):
        site, channels = layout.sites[index], spec.layer_channels[layer]
        if channels != site.channels:
            raise IncompatibleAdapterError(
                f"{name!r} has {channels} channels in layer {spec.format.keys.number(layer)}, but {layout.label(site)} of "
                f"{layout.name} has {site.channels}; the adapter was made for another variant of this model"
            )
