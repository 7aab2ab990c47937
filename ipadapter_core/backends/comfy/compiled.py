"""Image prompts inside compiled ComfyUI models: one operation that torch.compile does not look into, so no graph breaks.

ComfyUI keeps torch.compile from guarding ``transformer_options``: whatever a hook reads while it is traced is frozen into the
code, also for clones with other prompts and for later steps. So the code holds the place of image prompts alone, the number
of their site. Which prompts act there, how strongly and on which branches is looked up when the code runs.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ...attention.call import ModelCall
from ...errors import IncompatibleAdapterError
from ..calls import uncaptured


@runtime_checkable
class CompiledHook(Protocol):
    """A hook that compiled code can hold the place of: the number of its site, and what of it is part of the code."""

    index: int
    kind: str

    def at_site(self, call: ModelCall, base: Tensor, q: Tensor, heads: int, shape: tuple[int, int]) -> Tensor:
        """``base`` with every image prompt of the site added; ``shape`` is the tokens' rows and columns, 0 if unknown."""
        ...


class _Running(threading.local):
    """The model call that this thread is in, and what acts in it by site."""

    def __init__(self) -> None:
        self.call = ModelCall()
        self.hooks: Mapping[int, CompiledHook] = {}


_RUNNING = _Running()


@contextmanager
def acting(call: ModelCall, hooks: Iterable[object]) -> Generator[None]:
    """For the time of a model call: what its compiled code finds at each site."""
    before = _RUNNING.call, _RUNNING.hooks
    _RUNNING.call, _RUNNING.hooks = call, {hook.index: hook for hook in hooks if isinstance(hook, CompiledHook)}
    try:
        yield
    finally:
        _RUNNING.call, _RUNNING.hooks = before


def _add(base: Tensor, q: Tensor, site: int, heads: int, rows: int, columns: int) -> Tensor:
    hook = _RUNNING.hooks.get(site)
    if hook is None:
        raise past_the_host()
    out = hook.at_site(_RUNNING.call, base, q, heads, (rows, columns))
    return out.clone() if out is base else out  # an operation must not give back what it was given


def _like_base(base: Tensor, q: Tensor, site: int, heads: int, rows: int, columns: int) -> Tensor:
    return torch.empty_like(base)


def past_the_host() -> IncompatibleAdapterError:
    """A call that no wrapper of the host's saw."""
    return IncompatibleAdapterError(
        "a compiled model was called past ComfyUI's apply_model, so its image prompts are unknown; remove the node that "
        "calls it, or the one that compiles the model"
    )


add_at_site = uncaptured("add_at_site", _add, _like_base)
"""The operation; None where this torch cannot keep it out of CUDA graphs, which would freeze what it does."""
