"""What scripts inside a ComfyUI's own Python share: files as modules, operations counted, and what other packs do to a model.

A script sees it because its own folder comes first on ``sys.path``; nothing of ComfyUI is imported here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def load(name: str, file: Path, *, package: bool = False) -> Any:
    """A file as a module of this name, ``package``: with the modules beside it."""
    where = [str(file.parent)] if package else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=where)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counting(TorchDispatchMode):
    """The operations that ran, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def hooks_on(model: Any) -> int:
    """Hooks on the modules of a MODEL's model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


@contextmanager
def without_options(blocks: Iterable[Any]) -> Iterator[None]:
    """As under a pack with a forward of its own, that does not hand options on to the blocks."""
    changed = list(blocks)

    def without(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, transformer_options=None, **kwargs: forward(*args, **kwargs)

    for block in changed:
        block.forward = without(block.forward)
    try:
        yield
    finally:
        for block in changed:
            del block.forward


class Packed(nn.Module):
    """A matrix without ``weight``, as quantised layers have it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.register_buffer("stored", layer.weight.double())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.stored.to(x), self.bias)


@contextmanager
def weights_packed(model: Any) -> Iterator[None]:
    """A MODEL with every matrix packed."""
    found = [
        (module, name, layer)
        for module in model.model.diffusion_model.modules()
        for name, layer in module.named_children()
        if isinstance(layer, nn.Linear)
    ]
    for module, name, layer in found:
        setattr(module, name, Packed(layer))
    try:
        yield
    finally:
        for module, name, layer in found:
            setattr(module, name, layer)
