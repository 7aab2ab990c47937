"""What a backend applies: image keys and values per site, with schedule and mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import count

import torch
from torch import Tensor

from ..compatibility import CORRECT, Rules
from ..device_cache import LIMIT, DeviceCache
from ..errors import InvalidInputError
from ..images.pictures import Picture
from ..models.reach import Reach
from ..models.sites import ModelLayout
from .adding import adding, attending, on_chunks
from .batch import Frames, fit_batch
from .call import COND, UNCOND, Acting, AddImage, Ready, SiteCall
from .kv import HeldKeys, SiteKV
from .masks import RegionMask, inference_mode, token_rows
from .maths import Scale, scale_for
from .presets import OFF, SiteWeight
from .schedule import WeightSchedule

H94 = Reach()
"""The first families and most since: one layer for every cross-attention of a UNet."""


KINDS = 8
"""Kinds of calls (batch, latent, device, dtype) for which a prompt keeps what is ready at its sites."""


class LatentWeights:
    """Weight of every site for every latent, ``sites latents``; rows are kept per device and kind of call."""

    def __init__(self, schedule: WeightSchedule, layout: ModelLayout) -> None:
        rows = {s: replace(schedule.place, strength=s).of(layout) for s in schedule.latent_strengths}
        self._table = torch.tensor([[w.weight for w in rows[s]] for s in schedule.latent_strengths]).T
        self._rows: DeviceCache[Tensor] = DeviceCache(LIMIT * len(self._table))

    def active(self, site: int) -> bool:
        return bool((self._table[site] != 0).any())

    def of(self, site: int, chunks: int, latents: int, frames: Frames | None, like: Tensor) -> Tensor:
        """``b 1 1`` for a call of ``chunks`` times ``latents`` members."""
        key = (site, chunks, latents, frames, like.device, like.dtype, inference_mode())
        found = self._rows.get(key)
        if found is None:
            row = fit_batch(self._table[site], latents, frames).repeat(chunks)[:, None, None]
            found = self._rows.keep(key, row.to(like.device, like.dtype))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class AdapterPatch:
    """An image prompt ready to be applied: K/V per site of ``layout`` (None where the adapter has no layer), schedule and mask.

    ``reach`` says how the adapter acts at a site. Changing the schedule or the mask bakes nothing: ``patch.with_schedule(…)`` shares the tensors.
    """

    name: str
    layout: ModelLayout
    sites: tuple[SiteKV | None, ...]
    schedule: WeightSchedule
    mask: RegionMask | None
    weights: tuple[SiteWeight, ...]
    rules: Rules = CORRECT
    latent_weights: LatentWeights | None = None
    reach: Reach = H94
    held: HeldKeys | None = None
    """The keys and values of ``sites`` as what a host's memory manager moves."""
    made: int = field(default_factory=count().__next__, repr=False)
    """Higher than of those made before; other schedules and masks of one have its number."""
    _kinds: DeviceCache[list[Ready | None]] = field(
        default_factory=lambda: DeviceCache[list[Ready | None]](KINDS), init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.held is not None:
            self.held.watch(self._kinds)

    def __deepcopy__(self, memo: dict[int, object]) -> AdapterPatch:
        return self  # frozen: a copied model shares the keys and values

    def with_schedule(self, schedule: WeightSchedule) -> AdapterPatch:
        """The same image under another schedule."""
        weights, latent_weights = resolve_weights(schedule, self.layout, self.rules)
        return replace(self, schedule=schedule, weights=weights, latent_weights=latent_weights)

    def with_mask(self, mask: RegionMask | Picture | None) -> AdapterPatch:
        """The same image in another region."""
        return replace(self, mask=RegionMask.of(mask))

    def active(self, site: int) -> bool:
        """Whether the site can ever see the image; an inactive one needs no hook."""
        return self.sites[site] is not None and self.weights[site].weight != 0.0 and not self.schedule.window.never

    def release(self, site: int, device: torch.device) -> None:
        """Forget what one site keeps on other devices than ``device``."""
        self._kinds.release(device)
        kv = self.sites[site]
        if kv is not None:
            kv.release(device)

    def add_to(self, base: Tensor, site: int, at: SiteCall) -> Tensor:
        """Add this image's attention to the attention output ``base`` (``b l c``) of one site."""
        if torch.compiler.is_compiling():  # what is kept would be part of the code, and code be made for every call
            acting = Acting(*self._now(at), [None] * len(self.sites))
        else:
            acting = at.call.acting.get(self)
            if acting is None:
                acting = at.call.acting[self] = self._acting(at)
        if acting.factor == 0.0:
            return base
        q, ready = at.q, acting.sites[site]
        if (
            ready is None
            or ready.factor != acting.factor
            or ready.device != q.device
            or ready.dtype != q.dtype
            or (ready.tokens is not None and ready.tokens != q.shape[1])
        ):
            ready = self._ready(site, at, acting)
            if ready is None:
                return base
        return ready.add(base, at, at.rows(ready.groups, ready.width))

    def _acting(self, at: SiteCall) -> Acting:
        """What the sites have in common in a call."""
        call, q = at.call, at.q
        factor, branches = self._now(at)
        kind = (branches, q.shape[0], q.device, q.dtype, call.latent, call.areas, call.size, inference_mode())
        if call.frames is not None or call.hearing is not None:  # windows of an animation are too many to keep
            return Acting(factor, branches, [None] * len(self.sites))
        return Acting(factor, branches, self._kinds.made(kind, lambda: [None] * len(self.sites)))

    def _now(self, at: SiteCall) -> tuple[float, tuple[int, ...]]:
        """The factor of a call's step, and the branches as this prompt sees them."""
        call, window = at.call, self.schedule.window
        branches = call.branches
        if self.rules.branches_by_index and call.order is not None:
            branches = tuple(UNCOND if index == 1 else COND for index in call.order)
        return 1.0 if window.constant else window.at(call.percent()), branches

    def _ready(self, site: int, at: SiteCall, acting: Acting) -> Ready | None:
        """Resolve what acts at a site; None if nothing does."""
        call, q, weight, site_kv, factor = at.call, at.q, self.weights[site], self.sites[site], acting.factor
        if weight.weight == 0.0 or site_kv is None:
            return None
        count = len(acting.branches)
        latents = q.shape[0] // count
        silent = () if weight.flipped else site_kv.silent
        chunks = [i for i, branch in enumerate(acting.branches) if branch not in silent]
        if not chunks:
            return None
        branches = acting.branches if len(chunks) == count else tuple(acting.branches[i] for i in chunks)
        kv = site_kv.at(at, branches, weight.flipped, self.rules.mean_per_image)
        if self.latent_weights is None:
            scale = self._scale(site, weight.weight * factor)
        else:
            rows = self.latent_weights.of(site, len(chunks), latents, call.frames, q)
            scale = self._scale(site, rows if factor == 1.0 else rows * factor)
        mask = None if self.mask is None else self._mask_rows(self.mask, at, latents)
        if mask is not None and mask.shape[0] > 1 and len(chunks) < count:
            mask = torch.cat([mask.chunk(count)[chunk] for chunk in chunks])
        groups, _, _, width = kv.k.shape
        tokens = None if mask is None else q.shape[1]
        folded = groups != latents * len(chunks)

        def seen(add: AddImage) -> AddImage:
            return on_chunks(add, chunks, count, groups, width) if len(chunks) < count else add

        add = seen(adding(kv, at.heads, scale, mask, folded))
        if call.hearing is not None:
            references = [seen(one) for one in attending(kv, at.heads, scale, folded)]
            add = call.hearing.heard(self, site, add, references, kv.images)
        ready = Ready(add, factor, groups, width, tokens, q.device, q.dtype)
        if site_kv.constant and self.reach.query != "raw":  # norms that are undone may be other ones in the next call
            acting.sites[site] = ready
        return ready

    def _scale(self, site: int, weight: float | Tensor) -> Scale:
        return scale_for(
            self.schedule.scaling, weight, self.layout.sites[site].channels, self.layout.model.reference_width
        )

    def _mask_rows(self, mask: RegionMask, at: SiteCall, latents: int) -> Tensor:
        """How much of every token lies inside, ``1|b l 1``; tokens of text take the part of the picture that the region covers."""
        call, q = at.call, at.q
        if self.rules.stretched_masks and call.size is not None:
            rows = mask.stretched(call.size, self.rules.stretched_masks, q, latents, call.frames)
            return rows if rows.shape[0] == 1 else rows.repeat(q.shape[0] // latents, 1, 1)
        shape = None if at.shape is None else (at.shape[-2], at.shape[-1])
        grid = None if call.seen is None else self.layout.model.tokens.grid(call.seen, q.shape[1] - at.text, shape)
        if grid is None or call.latent is None:
            raise InvalidInputError(
                f"a region mask needs the latent's size, but this attention has {q.shape[1] - at.text} tokens, which is no level "
                f"of a latent of {call.latent}; another node changes the token count (token merging?): remove it or the mask"
            )
        return token_rows(mask, call, grid, q, latents, front=at.text)


def resolve_weights(
    schedule: WeightSchedule, layout: ModelLayout, rules: Rules
) -> tuple[tuple[SiteWeight, ...], LatentWeights | None]:
    """Weight per site (1 where latents have their own), and those per latent."""
    weights = schedule.site_weights(layout)
    per_latent = LatentWeights(schedule, layout) if schedule.latent_strengths else None
    if per_latent is not None:
        weights = tuple(SiteWeight(float(per_latent.active(i)), w.flipped) for i, w in enumerate(weights))
    if not rules.middle_block:
        weights = tuple(
            OFF if site.group == "middle" else weight for site, weight in zip(layout.sites, weights, strict=True)
        )
    return weights, per_latent
