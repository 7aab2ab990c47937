"""The one cache: values made for a device, a dtype and a kind of call, kept up to a limit and let go with the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

Value = TypeVar("Value")
Key = tuple[Hashable, ...]

LIMIT = 64
"""What most caches keep: some hundred frames of an animation in windows of sixteen, and the levels of a UNet."""


class DeviceCache(Generic[Value]):
    """Values by tuples that name all that they depend on, the device among it; the oldest go beyond ``limit``.

    Where speed counts, ask with ``get`` and put with ``keep``; elsewhere ``made`` does both. Any number of threads may use
    one: the worst is that a value is made twice. A copy starts empty, since it belongs to another model.
    """

    # no dict itself: torch.compile of torch 2.6 fails in what classes derived from it inherit

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._kept: dict[Key, Value] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> Value | None:
        """The value under a key; None where there is none."""
        return self._kept.get(key)

    def keep(self, key: Key, value: Value) -> Value:
        """Put a value in place of the oldest one; returns it."""
        for oldest in list(self._kept)[: max(len(self._kept) - self.limit + 1, 0)]:  # a list: threads share the cache
            self._kept.pop(oldest, None)
        self._kept[key] = value
        return value

    def made(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value under a key, made now if it is not there."""
        found = self._kept.get(key)
        return self.keep(key, make()) if found is None else found

    def items(self) -> list[tuple[Key, Value]]:
        """All keys and values there are now, the oldest first."""
        return list(self._kept.items())

    def drop(self, key: Key) -> None:
        """Forget a value, if it is there."""
        self._kept.pop(key, None)

    def release(self, device: torch.device | None = None) -> None:
        """Forget what lives on other devices than ``device``; everything for None."""
        for key in list(self._kept):
            if device is None or any(isinstance(part, torch.device) and part != device for part in key):
                self.drop(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit,)
