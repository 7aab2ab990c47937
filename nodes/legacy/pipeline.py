"""The objects on the old pack's sockets: made so that its own nodes could read them, understood whoever made them.

``IPADAPTER`` is either one adapter, a mapping with ``image_proj`` and ``ip_adapter``, or what a unified loader gives:
``{"ipadapter": {"file", "model"}, "clipvision": {"file", "model"}, "insightface": {"provider", "model"}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor

from ...ipadapter_core import InvalidInputError
from ...ipadapter_core.known_files import OLD_MARKS, old_mark
from .. import host


class LegacyAdapter(dict[str, Any]):
    """An adapter of ours that is the old pack's dictionary too: other packs ask ``isinstance(x, dict)``, and copy it.

    The tensors in it are the module's own. A copy is an ordinary dictionary, which understand() reads like anybody's.
    """

    def __init__(self, managed: host.adapters.ManagedAdapter) -> None:
        weights = managed.weights
        state = {**weights.module.checkpoint_state(), **weights.lora}
        groups = ("image_proj", "ip_adapter")
        super().__init__(
            {name: {k.split(".", 1)[1]: t for k, t in state.items() if k.startswith(f"{name}.")} for name in groups}
        )
        mark = old_mark(weights.spec)
        if mark is not None:
            self[mark] = True
        self.managed = managed


@dataclass(frozen=True)
class Pipeline:
    """What an IPADAPTER input carries, in our own objects."""

    adapter: host.adapters.ManagedAdapter
    clip_vision: Any = None
    insightface: Any = None


_FOREIGN: WeakKeyDictionary[Tensor, host.adapters.ManagedAdapter] = WeakKeyDictionary()
"""Adapters that another pack loaded, by one of their tensors."""


def understand(value: Any) -> Pipeline:
    """Read an IPADAPTER input. Raises InvalidInputError that says what was found there."""
    if isinstance(value, host.adapters.ManagedAdapter):
        return Pipeline(value)
    if isinstance(value, LegacyAdapter):
        return Pipeline(value.managed)
    if not isinstance(value, Mapping):
        raise InvalidInputError(
            f"the ipadapter input carries a {type(value).__name__}, which is no adapter that this pack knows; connect an "
            "IPAdapter loader (or Load IP-Adapter of this pack)"
        )
    value = cast("Mapping[str, Any]", value)
    if "ipadapter" in value:
        inner = _part(value, "ipadapter")
        if inner is None:
            raise InvalidInputError(
                "the pipeline on the ipadapter input holds no adapter; load one with a unified loader"
            )
        return Pipeline(understand(inner).adapter, _part(value, "clipvision"), _part(value, "insightface"))
    if not value.get("image_proj") or not value.get("ip_adapter"):
        raise InvalidInputError(
            f"the ipadapter input carries a table with {', '.join(map(str, list(value)[:6])) or 'nothing'}; "
            "image_proj and ip_adapter were expected. Connect an IPAdapter loader"
        )
    anchor = next(iter(value["ip_adapter"].values()))
    found = _FOREIGN.get(anchor) if isinstance(anchor, Tensor) else None
    if found is None:
        groups = {group: value[group] for group in ("image_proj", "ip_adapter")}
        told = next((name for mark, (*_, name) in OLD_MARKS.items() if mark in value), "the adapter")
        found = host.adapters.manage(groups, f"{told} of another pack")
        if isinstance(anchor, Tensor):
            _FOREIGN[anchor] = found
    return Pipeline(found)


def _part(pipeline: Mapping[str, Any], name: str) -> Any:
    part = pipeline.get(name)
    return cast("Mapping[str, Any]", part).get("model") if isinstance(part, Mapping) else None


def pack(
    adapter: host.adapters.ManagedAdapter, file: str, clip_vision: Any, clip_file: str | None, face: Any, provider: Any
) -> dict[str, Any]:
    """The dictionary that a unified loader hands on."""
    return {
        "clipvision": {"file": clip_file, "model": clip_vision},
        "ipadapter": {"file": file, "model": LegacyAdapter(adapter)},
        "insightface": {"provider": provider, "model": face},
    }
