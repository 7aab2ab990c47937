"""The one cache: bounded, let go with its device, and never shared by copies."""

from __future__ import annotations

import copy
import pickle

import torch

from ipadapter_core.device_cache import DeviceCache

CPU, META = torch.device("cpu"), torch.device("meta")


def test_a_value_is_made_once() -> None:
    cache: DeviceCache[list[int]] = DeviceCache()
    first = cache.made(("a", CPU), lambda: [1])
    assert cache.made(("a", CPU), lambda: [2]) is first
    assert cache.get(("a", CPU)) is first
    assert cache.get(("b", CPU)) is None


def test_the_oldest_go_beyond_the_limit() -> None:
    cache: DeviceCache[int] = DeviceCache(3)
    for i in range(5):
        assert cache.keep((i,), i) == i
    assert cache.items() == [((i,), i) for i in (2, 3, 4)]


def test_what_is_on_another_device_is_let_go() -> None:
    cache: DeviceCache[int] = DeviceCache()
    for key in ((1, CPU), (2, META), (3,), (META, 4)):
        cache.keep(key, 0)
    cache.release(CPU)
    assert [key for key, _ in cache.items()] == [(1, CPU), (3,)]
    cache.release()
    assert cache.items() == []


def test_a_copy_starts_empty_with_the_same_limit() -> None:
    cache: DeviceCache[int] = DeviceCache(7)
    cache.keep((1,), 1)
    for made in (copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        assert (type(made), made.limit, made.items()) == (DeviceCache, 7, [])
