"""How the files of a family name what is in an ``AdapterModule``, read both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

_NUMBER = r"(0|[1-9][0-9]{0,4})"


@dataclass(frozen=True)
class Keys:
    """The names of tensors in a family's files.

    ``projector`` stands before the keys of the projector. ``layers`` has, for each list of layers in ``AdapterModule``, the
    name of one, with ``{}`` for its number; the i-th of a list has the number ``first + step * i``. The defaults are those of
    a UNet, whose files number every attention, down, up, mid: the odd ones are cross-attention.
    """

    projector: str = "image_proj."
    layers: Mapping[str, str] = field(
        default_factory=lambda: {name: f"ip_adapter.{{}}.{name}" for name in ("to_k_ip", "to_v_ip")}, hash=False
    )
    first: int = 1
    step: int = 2

    @property
    def in_common_group(self) -> bool:
        """Whether layers are in the group ``ip_adapter``, as those of most families."""
        return self.layers["to_k_ip"].startswith("ip_adapter.")

    def number(self, index: int) -> int:
        """The number in keys of the layer at ``index``."""
        return self.first + self.step * index

    def layer(self, name: str, number: int, rest: str = "weight") -> str:
        """The key of a tensor of one layer, by its number in keys."""
        return self.layers[name].format(number) + (f".{rest}" if rest else "")

    def in_module(self, key: str) -> str | None:
        """The key of a file's tensor inside ``AdapterModule``; None if it has no place there."""
        for name, pattern in self._patterns.items():
            match = pattern.fullmatch(key)
            if match is not None:
                index, odd = divmod(int(match[1]) - self.first, self.step)
                return None if odd or index < 0 else f"{name}.{index}{match[2] or ''}"
        return f"projector.{key.removeprefix(self.projector)}" if key.startswith(self.projector) else None

    def in_file(self, key: str) -> str:
        """The inverse of ``in_module``."""
        name, _, rest = key.partition(".")
        if name == "projector":
            return self.projector + rest
        index, _, rest = rest.partition(".")
        return self.layer(name, self.number(int(index)), rest)

    def of_projector(self, keys: Iterable[str]) -> list[str]:
        """Those of a file's keys that begin like the projector's, without what they begin with; layers are none of them."""
        return [
            key.removeprefix(self.projector)
            for key in keys
            if key.startswith(self.projector) and not any(p.fullmatch(key) for p in self._patterns.values())
        ]

    def numbers(self, keys: Iterable[str], name: str) -> set[int]:
        """The numbers under which a file holds layers of a list, by their weights."""
        return {number for number, rest in self._found(keys, name) if rest in (".weight", "")}

    def any_layer(self, keys: Iterable[str]) -> bool:
        """Whether a file holds a tensor of any layer."""
        listed = list(keys)
        return any(True for name in self.layers for _ in self._found(listed, name))

    def sequence(self) -> str:
        """The numbers that layers have, for messages: ``1, 3, 5, …``."""
        return ", ".join(str(self.number(index)) for index in range(3)) + ", …"

    def _found(self, keys: Iterable[str], name: str) -> Iterator[tuple[int, str]]:
        for match in filter(None, map(self._patterns[name].fullmatch, keys)):
            yield int(match[1]), match[2] or ""

    @cached_property
    def _patterns(self) -> Mapping[str, re.Pattern[str]]:
        return {
            name: re.compile(re.escape(text).replace(re.escape("{}"), _NUMBER) + r"(\..+)?")
            for name, text in self.layers.items()
        }


UNET = Keys()


def numbered(*names: str, projector: str = "image_proj.") -> Keys:
    """``ip_adapter.0.to_k_ip.…``: nested files whose layers are numbered 0, 1, 2, …"""
    return Keys(projector, {name: f"ip_adapter.{{}}.{name}" for name in names}, first=0, step=1)
