"""The one cache: values made for a device, a dtype and a kind of call, kept up to a limit and let go with the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")
Key = tuple[Hashable, ...]

LIMIT = 64
"""What most caches keep: some hundred frames of an animation in windows of sixteen, and the levels of a UNet."""


class DeviceCache(dict[Key, Value]):
    """Values by tuples that name all that they depend on, the device among it; the oldest go beyond ``limit``.

    Where speed counts, ask with ``get(key)``, which is a dictionary's own, and put with ``keep``; elsewhere
    ``made(key, make)`` does both. Any number of threads may use one: the worst is that a value is made twice. A copy starts
    empty, since it belongs to another model.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        super().__init__()
        self.limit = limit

    def keep(self, key: Key, value: Value) -> Value:
        """Put a value in place of the oldest one; returns it."""
        for oldest in list(self)[: max(len(self) - self.limit + 1, 0)]:  # a list: threads share the cache
            self.pop(oldest, None)
        self[key] = value
        return value

    def made(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value under a key, made now if it is not there."""
        found = self.get(key)
        return self.keep(key, make()) if found is None else found

    def release(self, device: torch.device | None = None) -> None:
        """Forget what lives on other devices than ``device``; everything for None."""
        for key in list(self):
            if device is None or any(isinstance(part, torch.device) and part != device for part in key):
                self.pop(key, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit,)
