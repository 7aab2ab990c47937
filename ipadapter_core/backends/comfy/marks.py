"""ComfyUI models that are compiled: what tells code made for one call or block apart from code for others."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

from torch import nn

from ..calls import Hooks, uncompiled, watch_hooks


class _Mark:
    """A hook that does nothing but have a name, for which compiled code is checked."""

    def __init__(self, name: str) -> None:
        self.name = name

    def look(self, *_: object) -> None:
        assert self.name


_MARKED: WeakKeyDictionary[nn.Module, dict[str, Hooks]] = WeakKeyDictionary()
"""Per UNet and what acts on it: a mark on the layers of every transformer block."""
_LAYERS = (".norm1", ".norm2", ".norm3", ".attn1.to_q", ".attn2.to_q")
"""In a block: those between which a graph may break."""


def marked(unet: object, what: Callable[[], str]) -> AbstractContextManager[None]:
    """For the time of a call: what tells code compiled for it apart from code for other calls and other blocks.

    The host keeps torch.compile from looking at transformer_options, which say what acts and which block it is. Code of
    a model without image prompts, or of another block of the same shape, would be run.
    """
    if "torch._dynamo" not in sys.modules or not isinstance(unet, nn.Module):
        return nullcontext()
    watch_hooks()
    unet = uncompiled(unet)
    known, name = _MARKED.setdefault(unet, {}), what()
    if name not in known:
        paths: list[str] = [
            path for path, _ in unet.named_modules() if ".transformer_blocks." in path and path.endswith(_LAYERS)
        ]
        known[name] = Hooks([(path, _Mark(f"{path}, {name}").look) for path in paths])
    return known[name].on(unet)
