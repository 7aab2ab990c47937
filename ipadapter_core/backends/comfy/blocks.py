"""ComfyUI: image prompts inside a transformer's blocks, by hooks on their modules for the time of a model call.

The host offers slots for other packs around blocks and inside attention, others in every version and for every architecture,
and some of them hold one callable that the next pack overwrites. The modules are the same everywhere: a norm of the queries,
a projection of what the attention gives, the block. Hooks on them hear the query before it is rotated, work in whatever
calls the blocks, with options or without, and leave all slots to others. They are on a model only while a MODEL with image
prompts runs it, and act for that call alone.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...attention.call import ModelCall, SiteCall
from ...attention.patch import AdapterPatch
from ...errors import IncompatibleAdapterError
from ...models.grids import Size
from ...models.reach import Reach
from ...models.sites import ModelLayout, Site
from ..calls import Hooks, eagerly, uncaptured, uncompiled
from .compiled import past_the_host

PATCHES = "image_prompt"
"""Our list in the ``patches`` of transformer_options: one ``BlockPrompt`` for each image prompt, in order."""

Heard = tuple[Any, tuple[Any, ...], Any]
"""A module, and what it read and gave."""
Add = Callable[[Tensor], Tensor]
"""Adds image prompts to tokens ``b l c`` of those that ask."""


class Entry(Protocol):
    """One site of a kind of transformer, in the host's form of it: paths of modules, and what passes through them.

    ``heard`` are the modules that tell the query (and keys, values, conditioning), run before the ``projection`` reads what
    the attention gives; the ``block`` is around all.
    """

    @property
    def heard(self) -> tuple[str, ...]: ...
    @property
    def projection(self) -> str: ...
    @property
    def block(self) -> str: ...

    def site(self, heard: Sequence[Heard], reach: Reach, run: Run) -> SiteCall:
        """The attention of the tokens that ask, of what passed through the modules that are heard."""
        ...

    def projected(self, value: Tensor, reach: Reach, run: Run, add: Add) -> Tensor:
        """What the projection reads, with ``add`` done to the tokens that ask."""
        ...

    def behind(self, value: Any, reach: Reach, run: Run, add: Add) -> Any:
        """What the block gives, with ``add`` done to the tokens that ask."""
        ...


class Kind(Protocol):
    """A kind of transformer: the entries of its sites, what it refuses, and what tells the length of the text."""

    def entry(self, site: Site) -> Entry: ...

    def texts(self, layout: ModelLayout) -> Iterable[tuple[str, Callable[[Any], int]]]:
        """Blocks whose output tells how many tokens of text there are, where others have text and picture in one sequence."""
        ...

    def refusal(self, layout: ModelLayout, reach: Reach) -> str:
        """What of a reach this kind lacks, as in ``this adapter acts on …``; nothing if it has all."""
        ...


Group = tuple[Reach, tuple[AdapterPatch, ...]]
"""Adapters that ask and join alike."""


class Run(Protocol):
    """What an entry asks of the model call that runs."""

    @property
    def call(self) -> ModelCall: ...
    @property
    def text(self) -> int:
        """Tokens of text in front of the picture's, where both are one sequence."""
        ...

    def picture(self, tokens: int) -> int:
        """How many of this many tokens are the picture's own; reference pictures follow them."""
        ...


@dataclass(slots=True, eq=False)
class _Run:
    """One model call with its image prompts by site and join, and what its modules told so far."""

    call: ModelCall
    layout: ModelLayout
    acting: Acting
    traced: Traced
    site: int = -1
    heard: dict[int, Heard] = field(default_factory=dict[int, Heard])
    """Of this site alone, until all of it is heard; what others told is let go."""
    sites: dict[Reach, SiteCall] = field(default_factory=dict[Reach, SiteCall])
    """Of this site alone, from then on until the last join."""

    measured: int | None = None
    """Tokens of text, where a block that is not compiled told them."""

    @property
    def text(self) -> int:
        return self.traced.text if self.measured is None else self.measured

    def picture(self, tokens: int) -> int:
        return _picture(self.layout, self.call.size, tokens)


def _picture(layout: ModelLayout, size: Size | None, tokens: int) -> int:
    grid = None if size is None else layout.model.tokens.grid(size, tokens)
    return tokens if grid is None else grid.rows * grid.columns


_SOUND: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()


def sound_norm(norm: nn.Module) -> Tensor | None:
    """The weight of an RMS norm that can be divided by; None if some of it is nearly 0 beside the rest.

    Read from the device once. Older hosts call it ``scale``. Layer norms are others: they forget the mean, too.
    """
    if isinstance(norm, nn.LayerNorm):
        return None
    weight = getattr(norm, "weight", None)
    weight = getattr(norm, "scale", None) if weight is None else weight
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    sound = _SOUND.get(weight)
    if sound is None:
        size = weight.detach().float().abs()
        sound = _SOUND[weight] = bool(size.min() >= 1e-3 * size.median())
    return weight if sound else None


@dataclass(frozen=True, slots=True, eq=False)
class BlockPrompt:
    """An image prompt on a MODEL. Frozen, and itself in copies of options: clones that share it never change."""

    patch: AdapterPatch
    of: Kind

    def to(self, device: object) -> BlockPrompt:
        """The host moves patches when it (un)loads a model: copies on an accelerator are dropped with it."""
        if isinstance(device, torch.device) and device.type == "cpu":
            for index in range(len(self.patch.layout.sites)):
                self.patch.release(index, device)
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> BlockPrompt:
        return self


def prompts_in(options: Mapping[str, Any]) -> Iterator[BlockPrompt]:
    """The image prompts in transformer_options that act inside of blocks, in order."""
    for entry in options.get("patches", {}).get(PATCHES, ()):
        if isinstance(entry, BlockPrompt):
            yield entry


def without_prompts(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options as the model reads them: compiled code that found our list there would miss it in calls without."""
    lists: Mapping[str, Any] = options.get("patches", {})
    if PATCHES not in lists:
        return options
    lists = {name: entries for name, entries in lists.items() if name != PATCHES}
    rest = {name: value for name, value in options.items() if name != "patches"}
    return {**rest, "patches": lists} if lists else rest


# --- while a call runs ------------------------------------------------------------------------------------------------


class _Running(threading.local):
    def __init__(self) -> None:
        self.run: _Run | None = None


_RUNNING = _Running()


@contextmanager
def acting_inside(model: nn.Module, call: ModelCall, prompts: Sequence[BlockPrompt]) -> Generator[None]:
    """For the time of a model call: the hooks on its modules, and what they look up."""
    groups: dict[tuple[int, str], dict[Reach, list[AdapterPatch]]] = {}
    for prompt in prompts:
        patch = prompt.patch
        for index in filter(patch.active, range(len(patch.layout.sites))):
            groups.setdefault((index, patch.reach.join), {}).setdefault(patch.reach, []).append(patch)
    acting = {place: tuple((r, tuple(p)) for r, p in of.items()) for place, of in groups.items()}
    before, model = _RUNNING.run, uncompiled(model)
    layout, kind = prompts[0].patch.layout, prompts[0].of
    hooks, traced = _hooks(model, layout, kind, acting)
    _RUNNING.run, traced.size = _Run(call, layout, acting, traced), call.size
    try:
        with hooks.on(model, find_modules(model, layout, kind).__getitem__):
            yield
    finally:
        _RUNNING.run = before


@contextmanager
def unprompted() -> Generator[bool]:
    """For the time of it no image prompt acts in this thread; gives whether any was acting."""
    before, _RUNNING.run = _RUNNING.run, None
    try:
        yield before is not None
    finally:
        _RUNNING.run = before


@dataclass(slots=True, eq=False)
class _Found:
    """The modules of a model's sites by path, as they were last found, and the paths of each site with their parts.

    Packs that skip blocks put others in the lists of blocks for the time of a call; then those found before count.
    """

    sites: tuple[tuple[tuple[str, tuple[str, ...]], ...], ...]
    modules: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])


_FOUND: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


def find_modules(model: nn.Module, layout: ModelLayout, kind: Kind) -> dict[str, nn.Module]:
    """The modules of every site of a model by path, remembered."""
    model = uncompiled(model)
    found = _FOUND.get(model)
    if found is None:
        entries = [kind.entry(site) for site in layout.sites]
        paths = [(*entry.heard, entry.projection, entry.block) for entry in entries]
        found = _FOUND[model] = _Found(tuple(tuple((p, tuple(p.split("."))) for p in of_site) for of_site in paths))
    known = found.modules
    for of_site in found.sites:
        try:  # all of a block or none: another's block has the path, but not what is inside
            known |= [(path, _submodule(model, parts)) for path, parts in of_site]
        except AttributeError:
            missing = [path for path, _ in of_site if path not in known]
            if missing:
                raise IncompatibleAdapterError(
                    f"{type(model).__name__} has no {missing[0]}, where an image prompt should act; another node has changed its "
                    "blocks: apply the image prompt in front of that node"
                ) from None
    return known


def _submodule(module: Any, parts: tuple[str, ...]) -> nn.Module:
    """As ``get_submodule``, some times faster."""
    for part in parts:
        inner = module.__dict__["_modules"].get(part)
        module = (
            getattr(module, part) if inner is None else inner
        )  # compiled modules have their parts' names as attributes
    return module


Acting = Mapping[tuple[int, str], tuple[Group, ...]]
"""What acts, by site and join."""


class Traced:
    """What hooks of a model share: the latent's size, and how many tokens of text there are; compiled code is checked for both."""

    def __init__(self, layout: ModelLayout) -> None:
        self.layout, self.text = layout, 0
        self.size: Size | None = None
        self.call = ModelCall()  # of no meaning: the operation knows which one runs

    def picture(self, tokens: int) -> int:
        return _picture(self.layout, self.size, tokens)


_HOOKS: WeakKeyDictionary[nn.Module, dict[object, tuple[Hooks, Traced]]] = WeakKeyDictionary()
"""By model and by the kinds of adapters that act where; always the same, so that what is compiled for them serves the next call."""


def _hooks(model: nn.Module, layout: ModelLayout, kind: Kind, acting: Acting) -> tuple[Hooks, Traced]:
    known = _HOOKS.setdefault(model, {})
    key = tuple((place, tuple(reach for reach, _ in acting[place])) for place in sorted(acting))
    found = known.get(key)
    if found is None:
        after: list[tuple[str, Callable[..., object]]] = []
        before: list[tuple[str, Callable[..., object]]] = []
        traced, reaches = Traced(layout), dict(key)
        for index in sorted({index for index, _ in acting}):
            entry = kind.entry(layout.sites[index])
            of_joins = (reaches.get((index, "attention"), ()), reaches.get((index, "residual"), ()))
            hook = _SiteHook(index, layout, entry, traced, *of_joins)
            after += [(path, partial(hook.hear, i)) for i, path in enumerate(entry.heard)]
            if hook.attention:
                before.append((entry.projection, hook.extend))
            if hook.residual:
                after.append((entry.block, hook.extend_output))
        after += [(path, partial(_measure, traced, length)) for path, length in kind.texts(layout)]
        found = known[key] = Hooks(after, before), traced
    return found


def _measure(traced: Traced, length: Callable[[Any], int], module: nn.Module, args: object, output: Any) -> None:
    """Note the text's length for compiled code, and for the call that runs in this thread: others may have another text."""
    traced.text = length(output)
    if not torch.compiler.is_compiling() and (run := _RUNNING.run) is not None:
        run.measured = length(output)


class _SiteHook:
    """The hooks at one site: hear what its modules tell, and add the image prompts of the call that runs in this thread.

    ``attention`` and ``residual`` are the kinds of adapters at each join. ``traced_heard`` is what compiled code heard, for its
    own joins and for those that run outside of it.
    """

    def __init__(
        self,
        index: int,
        layout: ModelLayout,
        entry: Entry,
        traced: Traced,
        attention: tuple[Reach, ...],
        residual: tuple[Reach, ...],
    ) -> None:
        self.index, self.layout, self.entry, self.traced = index, layout, entry, traced
        self.attention, self.residual = attention, residual
        self.heads = layout.sites[index].heads
        self.traced_heard: tuple[Heard, ...] = ()
        self.queries_suffice = add_inside is not None and all(
            (reach.query, reach.own_keys, reach.gated) == ("normed", False, False) for reach in (*attention, *residual)
        )

    def _tracing(self) -> bool:
        return torch.compiler.is_compiling() and self.queries_suffice and not torch.is_grad_enabled()

    def hear(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._tracing():
            self.traced_heard = (*(self.traced_heard if number else ()), (module, args, output))
        else:
            eagerly(self._hear, number, (module, args, output))

    def _hear(self, number: int, heard: Heard) -> None:
        run = _RUNNING.run
        if run is None:
            return
        if run.site != self.index or number in run.heard:
            run.site, run.heard, run.sites = self.index, {}, {}
        run.heard[number] = heard
        if len(run.heard) == len(self.entry.heard):
            told, run.heard = [run.heard[i] for i in range(len(run.heard))], {}  # before the block's MLP takes memory
            for reach in (*self.attention, *self.residual):
                run.sites[reach] = self.entry.site(told, reach, run)

    def extend(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """In front of the projection."""
        if self._tracing():
            value = args[0]
            for number, reach in enumerate(self.attention):
                value = self.entry.projected(value, reach, self.traced, self._traced_adding(reach, "attention", number))
            if not self.residual:
                self.traced_heard = ()
            return (value, *args[1:])
        return eagerly(self._extend, args)

    def _extend(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        run = _RUNNING.run
        if run is None:
            return None
        value = args[0]
        for reach, patches in run.acting.get((self.index, "attention"), ()):
            value = self.entry.projected(value, reach, run, self._adding(run, reach, patches))
        return (value, *args[1:])

    def extend_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind the block."""
        if self._tracing():
            for number, reach in enumerate(self.residual):
                output = self.entry.behind(output, reach, self.traced, self._traced_adding(reach, "residual", number))
            self.traced_heard = ()
            return output
        return eagerly(self._extend_output, output)

    def _extend_output(self, output: Any) -> Any:
        run = _RUNNING.run
        if run is None:
            return None
        for reach, patches in run.acting.get((self.index, "residual"), ()):
            output = self.entry.behind(output, reach, run, self._adding(run, reach, patches))
        return output

    def _traced_adding(self, reach: Reach, join: str, number: int) -> Add:
        assert add_inside is not None
        act, at = add_inside, self.entry.site(self.traced_heard, reach, self.traced)
        return lambda base: act(base, at.q, self.index, join, number, self.heads, at.text)

    def _adding(self, run: _Run, reach: Reach, patches: Sequence[AdapterPatch]) -> Add:
        if len(self.traced_heard) == len(self.entry.heard):  # compiled code ran up to here
            for number, heard in enumerate(self.traced_heard):
                self._hear(number, heard)
            self.traced_heard = ()
        at = run.sites.pop(reach, None) if run.site == self.index else None
        if at is None:
            raise IncompatibleAdapterError(
                f"an image prompt cannot act in {self.layout.label(self.layout.sites[self.index])} of {self.layout.name}: another "
                f"node runs this block without {' and '.join(self.entry.heard)}; remove that node or the image prompt"
            )
        return partial(_add_all, patches, self.index, at)


def _add_all(patches: Sequence[AdapterPatch], index: int, at: SiteCall, base: Tensor) -> Tensor:
    for patch in patches:
        base = patch.add_to(base, index, at)
    return base


# --- inside compiled code ---------------------------------------------------------------------------------------------


def _add_now(base: Tensor, q: Tensor, site: int, join: str, number: int, heads: int, text: int) -> Tensor:
    run = _RUNNING.run
    if run is None:
        raise past_the_host()
    _, patches = run.acting[site, join][number]
    out = _add_all(patches, site, SiteCall(run.call, q, heads, text=text), base).contiguous()
    return out.clone() if out is base else out  # an operation must not give back what it was given


def _like_base(base: Tensor, q: Tensor, site: int, join: str, number: int, heads: int, text: int) -> Tensor:
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


add_inside = uncaptured("add_inside", _add_now, _like_base)
"""The operation; None where this torch cannot keep it out of CUDA graphs, which would freeze what it does."""
