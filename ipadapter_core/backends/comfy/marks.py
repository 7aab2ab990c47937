"""ComfyUI models that are compiled: what tells code made for one call or block apart from code for others."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

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


_MARKED: WeakKeyDictionary[nn.Module, dict[str, tuple[Hooks, dict[str, nn.Module]]]] = WeakKeyDictionary()
"""Per model and what acts on it: a mark on the layers of every block, and where these are."""
_LAYERS = (".norm1", ".norm2", ".norm3", ".attn1.to_q", ".attn2.to_q")
"""In a UNet's transformer block: those between which a graph may break."""


def marked(model: object, what: Callable[[], str]) -> AbstractContextManager[None]:
    """For the time of a call: what tells code compiled for it apart from code for other calls and other blocks.

    The host keeps torch.compile from looking at transformer_options, which say what acts and which block it is. Code of
    a model without image prompts, or of another block of the same shape, would be run; and code that copies the options
    looks for every entry that was there when it was made.
    """
    if "torch._dynamo" not in sys.modules or not isinstance(model, nn.Module):
        return nullcontext()
    watch_hooks()
    model = uncompiled(model)
    known, name = _MARKED.setdefault(model, {}), what()
    if name not in known:
        layers = {path: model.get_submodule(path) for path in _layers(model)}
        known[name] = Hooks([(path, _Mark(f"{path}, {name}").look) for path in layers]), layers
    hooks, layers = known[name]

    def find(path: str) -> nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError:  # a pack that skips blocks has others in the lists of blocks for the time of this call
            return layers[path]

    return hooks.on(model, find)


def _layers(model: nn.Module) -> list[str]:
    """Paths of the layers to mark: some of every transformer block in a UNet, elsewhere all with weights in lists of blocks."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    of_unet = [path for path in modules if ".transformer_blocks." in path and path.endswith(_LAYERS)]
    lists = {name for name, part in model.named_children() if isinstance(part, nn.ModuleList)}
    return of_unet or [
        path
        for path, layer in modules.items()
        if path.split(".")[0] in lists and next(layer.children(), None) is None and _has_weights(layer)
    ]


def _has_weights(layer: nn.Module) -> bool:
    return hasattr(layer, "in_features") or next(layer.parameters(), None) is not None
