"""Where did the image act? What image prompts add to every latent token, recorded while a model samples.

Of a token at a site, in one call of the model, for the positive prompt:

    share of reference r  =  p_r · |A| / (|B| + Σ |A|)

``B`` is what images are added to there before any is: the attention to the text, or for adapters that join behind a block its
residual. ``A`` is what one image prompt adds, with strength, schedule and mask as they act; where its tokens attend to themselves
in the same softmax, the part that comes through image tokens. ``|·|`` is the root of the sum of squares over channels, ``Σ`` goes
over the image prompts that join at this place. ``p_r`` is the part of a prompt's attention to the image that goes to tokens of its
r-th reference, meaned over heads. So shares of all references lie in 0..1 and with the text's make 1, a token outside of a mask has
0, and what does nothing has 0.

A map is the mean of a share over sites and calls, those where nothing acts included. Sums are kept on the device, by reference,
stage of sampling and group of sites, at the latent's resolution; nothing waits for the device, but for sigma once a step where there
are several stages. Nobody pays for it who does not record: calls that are heard are told apart before their attentions run.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device_cache import DeviceCache
from ..errors import AdapterError, InvalidInputError
from ..models.grids import Size, TokenGrid
from ..models.sites import ModelLayout, Site
from .batch import Frames
from .call import COND, AddImage, Area, ModelCall, SiteCall
from .patch import AdapterPatch

MOST_STAGES = 20
NOTHING = "no image prompt acted in this run"
BUDGET = 256 * 2**20
"""Bytes of sums that a recording keeps at most; the usual picture takes 1 MB."""
MOST_OF_ONE = 4 * 2**20
"""Bytes of the sums of one reference, stage and group: beyond it, the last latents of a batch are left out."""


Rows = slice | Tensor
"""Where some latents stand among those that are recorded."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One picture of one image prompt: its number in the prompt from 1, 0 where the prompt has one."""

    name: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.name}, reference {self.number}" if self.number else self.name


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the sampling progress (0: pure noise, 1: done), and how many calls of the model fell into it."""

    start: float
    end: float
    calls: float

    def __str__(self) -> str:
        return f"{100 * self.start:.0f} to {100 * self.end:.0f} %"


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMaps:
    """What was recorded of one run. ``latent`` is its height and width, ``latents`` how many of the batch were recorded.

    ``references`` are in the order in which their prompts were prepared. ``sites`` are those of the model in execution order with their
    ``labels``. ``notes`` say what could not be recorded.
    """

    references: tuple[Reference, ...]
    stages: tuple[Stage, ...]
    sites: tuple[Site, ...]
    labels: tuple[str, ...]
    latent: Size
    latents: int
    notes: tuple[str, ...]
    _maps: Mapping[tuple[int, int, str], Tensor]
    _means: Mapping[tuple[int, int], Tensor]
    _counts: Tensor

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of sites (``input``, ``double``, …), in execution order."""
        return tuple(dict.fromkeys(site.group for site in self.sites))

    def map(self, reference: int | None = None, stage: int | None = None, group: str | None = None) -> Tensor:
        """Share of every latent, ``latents y x`` in 0..1; None stands for all of them.

        Over references it is the sum, over stages and groups the mean. 0 where no call of the model was.
        """
        stages = range(len(self.stages)) if stage is None else (stage,)
        wanted = self.groups if group is None else (group,)
        if group is not None and group not in self.groups:
            raise InvalidInputError(f"there is no group {group!r}; this model has {', '.join(self.groups)}")
        total = torch.zeros(self.latents, *self.latent)
        for (s, r, g), values in self._maps.items():
            if s in stages and g in wanted and reference in (None, r):
                total += values
        return total / (self._counts[list(stages)].sum(0) * sum(site.group in wanted for site in self.sites)).clamp(1)

    def by_site(self, stage: int | None = None) -> Tensor:
        """Mean share over the tokens of every site, ``references sites latents`` in 0..1."""
        stages = range(len(self.stages)) if stage is None else (stage,)
        out = torch.zeros(len(self.references), len(self.sites), self.latents)
        for (s, r), values in self._means.items():
            if s in stages:
                out[r] += values.T
        return out / self._counts[list(stages)].sum(0).flatten(1).mean(1).clamp_min(1e-9)

    def summary(self) -> str:
        """A paragraph for each reference and each note, without columns: for where letters differ in width."""
        shares = [(str(reference), self.map(r)) for r, reference in enumerate(self.references)]
        lines = [
            f"{name}: mean {100 * float(share.mean()):.1f} %, most {100 * float(share.max()):.1f} %"
            for name, share in shares
        ]
        return "\n\n".join([*(lines or [NOTHING]), *self.notes])

    def text(self) -> str:
        """The numbers as a table: per reference its mean, its strongest latent, and the mean of every stage and group."""
        columns = ["mean", "most", *map(str, self.stages), *self.groups]
        rows = [f"{'':<32}" + "".join(f"{c:>14}" for c in columns)]
        for r, reference in enumerate(self.references):
            whole = self.map(r)
            values = [whole.mean(), whole.max()]
            values += [self.map(r, stage=s).mean() for s in range(len(self.stages))]
            values += [self.map(r, group=g).mean() for g in self.groups]
            rows.append(f"{str(reference)[:31]:<32}" + "".join(f"{100 * float(v):>12.2f} %" for v in values))
        if not self.references:
            rows = [NOTHING]
        return "\n".join([*rows, *self.notes])


class Recorder:
    """Records the calls of a model that it is told of by ``begin``. Any number of threads may run them.

    ``stages`` equal parts of the sampling progress are kept apart (1 to 20). ``start`` forgets all for the next run.
    """

    def __init__(self, stages: int = 3) -> None:
        if not 1 <= stages <= MOST_STAGES:
            raise InvalidInputError(f"a recording has 1 to {MOST_STAGES} stages, not {stages}")
        self.stages = stages
        self._lock = threading.Lock()
        self._run = _Run(stages)

    def __deepcopy__(self, memo: dict[int, object]) -> Recorder:
        return self  # hosts that copy a model's options record into the same one

    def start(self) -> None:
        """A run of the sampler starts: what was recorded before is forgotten."""
        with self._lock:
            self._run = _Run(self.stages)

    def begin(self, call: ModelCall) -> ModelCall:
        """The call with somebody who hears what image prompts add in it; the same where a second owner of prompts asks again."""
        run, thread = self._run, threading.get_ident()
        last = run.open.get(thread)
        if last is not None and last.told is call:
            return last.call
        run.close(thread)
        chunks = tuple(i for i, branch in enumerate(call.branches) if branch == COND)
        if not chunks or call.latent is None:
            return call
        hearing = run.open[thread] = run.begin(call, chunks)
        return hearing.call

    def maps(self) -> AttentionMaps:
        """What was recorded since ``start``. Raises InvalidInputError if that is nothing."""
        return self._run.maps()


@dataclass(slots=True, eq=False)
class _Place:
    """Where images are added in one call: a site and a join, the length of what is there, and of what each prompt adds."""

    site: int
    join: str
    base: Tensor
    at: SiteCall
    added: list[tuple[AdapterPatch, Tensor, Tensor | None]] = field(
        default_factory=list[tuple[AdapterPatch, Tensor, Tensor | None]]
    )


class _Hearing:
    """One call of the model that is recorded."""

    def __init__(self, run: _Run, call: ModelCall, chunks: tuple[int, ...], stage: int) -> None:
        self.run, self.told, self.chunks, self.stage = run, call, chunks, stage
        self.call = replace(call, hearing=self, acting={})
        self._place: _Place | None = None

    def heard(self, patch: object, site: int, add: AddImage, references: Sequence[AddImage], count: int) -> AddImage:
        """``add`` that also tells; ``references`` give attention to ``count`` pictures in columns of each head."""
        assert isinstance(patch, AdapterPatch)

        def telling(base: Tensor, at: SiteCall, rows: Tensor) -> Tensor:
            self._tell(patch, site, base, at, rows, add, references, count)
            return add(base, at, rows)

        return telling

    @torch.no_grad()
    def _tell(
        self,
        patch: AdapterPatch,
        site: int,
        base: Tensor,
        at: SiteCall,
        rows: Tensor,
        add: AddImage,
        references: Sequence[AddImage],
        count: int,
    ) -> None:
        place = self._place
        if place is None or (place.site, place.join) != (site, patch.reach.join):
            self.close()
            place = self._place = _Place(site, patch.reach.join, _length(base, at), at)
        nothing = torch.zeros_like(base)
        if at.v is not None:  # what comes through the picture's own values is no reference's
            at = replace(at, v=torch.zeros_like(at.v))
        parts = None
        if references:
            heads, own = at.heads, [one(nothing, at, rows) for one in references]
            columns = torch.cat([t.unflatten(-1, (heads, -1)).mean(-2, dtype=_exact(t)) for t in own], -1)[..., :count]
            columns = columns[:, at.text :]
            parts = columns / columns.sum(-1, keepdim=True).clamp_min(torch.finfo(columns.dtype).tiny)
        place.added.append((patch, _length(add(nothing, at, rows), at), parts))

    def close(self) -> None:
        """The place that was heard last is whole."""
        place, self._place = self._place, None
        if place is None:
            return
        whole = place.base
        for _, added, _ in place.added:
            whole = whole + added
        whole = whole.clamp_min(torch.finfo(whole.dtype).tiny)
        for patch, added, parts in place.added:
            share = (added / whole)[..., None]
            self.run.take(self, place, patch, share if parts is None else share * parts)


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _length(tokens: Tensor, at: SiteCall) -> Tensor:
    """Of the picture's tokens, ``b l``."""
    return torch.linalg.vector_norm(tokens[:, at.text :], dim=-1, dtype=_exact(tokens))


class _Run:
    """The sums of one run."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.open: dict[int, _Hearing] = {}
        """By thread: the call that runs, or ran last."""
        self._lock = threading.RLock()
        self._latent: Size | None = None
        self._forget()

    def _forget(self) -> None:
        self._layout: ModelLayout | None = None
        self._latents = self._bytes = 0
        self._references: dict[AdapterPatch, range] = {}
        self._maps: dict[tuple[int, int, str, torch.device], Tensor] = {}
        self._means: dict[tuple[int, int, torch.device], Tensor] = {}
        self._windows: DeviceCache[Tensor] = DeviceCache()
        self._calls: Counter[tuple[int, Area | None, Frames | None]] = Counter()
        self._notes: dict[str, None] = {}

    def close(self, thread: int) -> None:
        """What a thread's last call told is whole."""
        hearing = self.open.pop(thread, None)
        if hearing is not None:
            hearing.close()

    def begin(self, call: ModelCall, chunks: tuple[int, ...]) -> _Hearing:
        """A call of the model starts, in which the positive prompt has these chunks of the batch."""
        with self._lock:
            if self._latent != call.latent:  # a run of another size
                self._forget()
                self._latent = call.latent
        stage, areas = self._stage_of(call), call.areas or (None,) * len(call.branches)
        with self._lock:
            self._calls.update((stage, areas[chunk], call.frames) for chunk in chunks)
        return _Hearing(self, call, chunks, stage)

    def _stage_of(self, call: ModelCall) -> int:
        """The stage of a call; sigma is read where there are several."""
        if self.stages == 1:
            return 0
        try:
            return min(int(call.percent() * self.stages + 1e-6), self.stages - 1)
        except AdapterError:
            self._notes["the sampler tells no progress, so all of its steps stand in the first stage"] = None
            return 0

    def take(self, hearing: _Hearing, place: _Place, patch: AdapterPatch, shares: Tensor) -> None:
        """Add shares ``b l r`` of one prompt's references at one place."""
        call, at = hearing.call, place.at
        latents, layout = shares.shape[0] // len(call.branches), patch.layout
        areas = call.areas or (None,) * len(call.branches)
        with self._lock:
            if call.latent is None or call.latent != self._latent:
                return  # a run that was forgotten
            if self._layout not in (None, layout):
                self._notes[f"a {layout.name} model ran beside {layout.name}, and is left out"] = None
                return
            self._layout = layout
            first = self._number_of(patch, shares.shape[-1])
            found = self._recorded(call, latents, shares.device)
            if found is None:
                return
            taken, rows = found
            for chunk in hearing.chunks:
                area = areas[chunk]
                seen = call.latent if area is None else area[:2]
                mine = shares[chunk * latents : (chunk + 1) * latents].permute(2, 0, 1)[:, taken]  # r m l
                part = seen[0] * seen[1] / (call.latent[0] * call.latent[1])
                shape = None if at.shape is None else (at.shape[-2], at.shape[-1])
                grid = layout.model.tokens.grid(seen, mine.shape[-1], shape)
                for r, tokens in enumerate(mine, first):
                    self._add_mean(hearing.stage, r, place.site, rows, part * tokens.mean(-1))
                    if grid is not None:
                        group = layout.sites[place.site].group
                        self._add_map((hearing.stage, r, group), rows, area, spread(tokens, grid, seen))
                if grid is None:
                    self._notes[
                        f"{layout.label(layout.sites[place.site])} is not in the maps: its {mine.shape[-1]} tokens are no level of the "
                        "latent (token merging?)"
                    ] = None

    def _number_of(self, patch: AdapterPatch, count: int) -> int:
        """The number of a prompt's first reference."""
        if patch not in self._references:
            first = sum(map(len, self._references.values()))
            self._references[patch] = range(first, first + count)
        return self._references[patch].start

    def _recorded(self, call: ModelCall, latents: int, device: torch.device) -> tuple[Rows, Rows] | None:
        """Which latents of a call are recorded, and where they stand among all that are; None if none is."""
        assert self._latent is not None
        total = latents if call.frames is None else call.frames.count
        kept = max(1, MOST_OF_ONE // (4 * self._latent[0] * self._latent[1]))
        if total > kept:
            self._notes[f"the first {kept} of {total} images are recorded"] = None
        self._latents = max(self._latents, min(total, kept))
        numbers = range(latents) if call.frames is None else call.frames.numbers
        found = [(i, number) for i, number in enumerate(numbers) if number < kept]
        if not found:
            return None
        taken, rows = zip(*found, strict=True)
        return self._rows(taken, device), self._rows(rows, device)

    def _rows(self, numbers: tuple[int, ...], device: torch.device) -> Rows:
        """Made once for a window: a copy to a device is waited for."""
        if numbers == tuple(range(numbers[0], numbers[0] + len(numbers))):
            return slice(numbers[0], numbers[0] + len(numbers))
        return self._windows.made((numbers, device), lambda: torch.tensor(numbers, device=device))

    def _add_map(self, key: tuple[int, int, str], rows: Rows, area: Area | None, values: Tensor) -> None:
        assert self._latent is not None
        found = self._sums(self._maps, (*key, values.device), self._latent, values)
        if found is not None:
            height, width, top, left = area or (*self._latent, 0, 0)
            _add_at(found[:, top : top + height, left : left + width], rows, values)

    def _add_mean(self, stage: int, reference: int, site: int, rows: Rows, values: Tensor) -> None:
        assert self._layout is not None
        found = self._sums(self._means, (stage, reference, values.device), (len(self._layout.sites),), values)
        if found is not None:
            _add_at(found[:, site], rows, values)

    def _sums(self, kept: dict[Any, Tensor], key: Any, size: tuple[int, ...], like: Tensor) -> Tensor | None:
        """The sums under a key, ``latents …``; None where there is no more room for any."""
        found = kept.get(key)
        if found is not None and found.shape[0] >= self._latents:
            return found
        shape = (self._latents, *size)
        if self._bytes + 4 * math.prod(shape) > BUDGET:
            self._notes[f"not all is recorded: it would take more than {BUDGET >> 20} MiB; choose fewer stages"] = None
            return None
        self._bytes += 4 * math.prod(shape)
        new = torch.zeros(shape, device=like.device)
        if found is not None:  # another batch
            self._bytes -= 4 * found.numel()
            new[: found.shape[0]] = found
        kept[key] = new
        return new

    def maps(self) -> AttentionMaps:
        with self._lock:
            for thread in list(self.open):
                self.close(thread)
            if not self._calls or self._latent is None:
                raise InvalidInputError(
                    "nothing was recorded: the model that is recorded was not called; sample with it, and then ask for the maps"
                )
            sites = () if self._layout is None else self._layout.sites
            labels = () if self._layout is None else tuple(map(self._layout.label, sites))
            counts = torch.zeros(self.stages, max(self._latents, 1), *self._latent)
            for (stage, area, frames), calls in self._calls.items():
                height, width, top, left = area or (*self._latent, 0, 0)
                rows = range(counts.shape[1]) if frames is None else frames.numbers
                for row in (row for row in rows if row < counts.shape[1]):
                    counts[stage, row, top : top + height, left : left + width] += calls
            edges = [i / self.stages for i in range(self.stages + 1)]
            stages = (Stage(edges[i], edges[i + 1], float(counts[i].mean())) for i in range(self.stages))
            # not in the order in which they were first heard, which is that of the sites where they act
            prompts = sorted(self._references, key=lambda patch: patch.made)
            numbers = [number for patch in prompts for number in self._references[patch]]
            order = {number: place for place, number in enumerate(numbers)}
            return AttentionMaps(
                self._named(prompts),
                tuple(stages),
                sites,
                labels,
                self._latent,
                counts.shape[1],
                tuple(self._notes),
                {(s, order[r], g): sums for (s, r, g), sums in _gathered(self._maps, counts.shape[1]).items()},
                {(s, order[r]): sums for (s, r), sums in _gathered(self._means, counts.shape[1]).items()},
                counts,
            )

    def _named(self, prompts: Sequence[AdapterPatch]) -> tuple[Reference, ...]:
        """The references of prompts; those of one adapter are numbered."""
        named: list[Reference] = []
        for patch in prompts:
            same = [other for other in prompts if other.name == patch.name]
            name = f"{patch.name} ({same.index(patch) + 1})" if len(same) > 1 else patch.name
            count = len(self._references[patch])
            named += [Reference(name, i + 1 if count > 1 else 0) for i in range(count)]
        return tuple(named)


def _add_at(sums: Tensor, rows: Rows, values: Tensor) -> None:
    """``sums[rows] += values``."""
    if isinstance(rows, slice):
        sums[rows] += values
    else:
        sums.index_add_(0, rows, values.to(sums.dtype))


def _gathered(sums: Mapping[tuple[Any, ...], Tensor], latents: int) -> dict[Any, Tensor]:
    """Sums of all devices on the CPU, without the device in their keys."""
    out: dict[Any, Tensor] = {}
    for (*key, _), values in sums.items():
        values = values.cpu()
        values = F.pad(values, (*(0, 0) * (values.ndim - 1), 0, latents - values.shape[0]))
        out[tuple(key)] = values + out[tuple(key)] if tuple(key) in out else values
    return out


def spread(tokens: Tensor, grid: TokenGrid, seen: Size) -> Tensor:
    """Tokens ``m l`` of a site over the latents that each covers, ``m y x``; of a video's frames the mean."""
    rows, columns, cell = grid
    picture = tokens.unflatten(1, (-1, rows, columns)).mean(1) if tokens.shape[1] % (rows * columns) == 0 else (
        tokens[:, : rows * columns].unflatten(1, (rows, columns))
    )  # fmt: skip
    if (rows, columns) != (-(-seen[0] // cell), -(-seen[1] // cell)):  # another node's sizes
        return F.interpolate(picture[None], size=seen, mode="nearest-exact")[0]
    return picture.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, : seen[0], : seen[1]]
