"""Names of a base model's layers in files of every kind.

Files name a layer by its path in the model they were made for, and hosts build the same model with other paths: original
(LDM, ComfyUI) or diffusers. Some layers one of them fuses and the other keeps apart, hence rows. Names are compared with
underscores for dots, as kohya's trainers write them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every layer's weight by the layer's path, in the model's order."""


@dataclass(frozen=True, slots=True)
class Rows:
    """``length`` rows from ``source`` on in the file's layer are the rows from ``target`` on in the model's."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name of a file leads: a layer, or some rows of it."""

    path: str
    rows: Rows | None = None


Names = dict[str, tuple[Place, ...]]
"""Places by underscored name."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerNames:
    """All names of the layers of one model. ``labels`` are diffusers' paths and ``blocks`` short names such as ``in4``, by path."""

    family: str
    names: Names
    labels: Mapping[str, str]
    blocks: Mapping[str, str]


def underscored(path: str) -> str:
    return path.replace(".", "_")


def own_names(shapes: Shapes) -> Names:
    return {underscored(path): (Place(path),) for path in shapes}


def numbered_blocks(shapes: Shapes, words: Mapping[str, str]) -> dict[str, str]:
    """``double3`` for the layers of ``double_blocks.3``; ``words`` has the word for a list of blocks."""
    blocks: dict[str, str] = {}
    for path in shapes:
        parts = path.split(".")
        inside = len(parts) > 2 and parts[1].isdigit()
        blocks[path] = f"{words.get(parts[0], 'block')}{parts[1]}" if inside else "base"
    return blocks


@dataclass(frozen=True, slots=True)
class Link:
    """Some rows of a layer of the original model are some rows of a layer of diffusers'; None: all of them."""

    original: str
    diffusers: str
    rows: tuple[int, int, int] | None = None
    """First row in the original, first row in diffusers, number."""
    open_name: str = ""
    """The same in the open model initiative's names, which number the parts of a fused layer."""


def fused(original: str, diffusers: str, width: int) -> Iterator[Link]:
    """Q, K and V of ``width`` rows each, one layer in the original; ``{}`` stands for the letter in diffusers' path."""
    for i, part in enumerate("qkv"):
        yield Link(original, diffusers.format(part), (i * width, 0, width), f"{original}.{i}")


def swapped(original: str, diffusers: str, width: int) -> Iterator[Link]:
    """The original holds shift and scale, diffusers scale and shift."""
    yield Link(original, diffusers, (0, width, width))
    yield Link(original, diffusers, (width, 0, width))


def linked_names(links: Iterable[Link], shapes: Shapes, *, is_original: bool) -> tuple[Names, dict[str, str]]:
    """Names and labels of a model's layers, from its own paths and the links to the other form of the model."""
    names, labels = own_names(shapes), dict[str, str]()
    for link in links:
        own, other = (link.original, link.diffusers) if is_original else (link.diffusers, link.original)
        if own not in shapes:
            continue
        if link.rows is None:
            names.setdefault(underscored(other), (Place(own),))
            labels[own] = link.diffusers
        else:
            first, second, length = link.rows
            rows = Rows(second, first, length) if is_original else Rows(first, second, length)
            names[underscored(other)] = (*names.get(underscored(other), ()), Place(own, rows))
            labels.setdefault(own, own if is_original else link.diffusers)
        if link.open_name:
            names[underscored(link.open_name)] = names[underscored(link.diffusers)]
    return names, labels
