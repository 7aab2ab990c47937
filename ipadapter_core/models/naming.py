"""A family's table of layers: what the original model and diffusers call each, and the selector's words for it.

The original is its authors' code, whose module names ComfyUI has. Where one form fuses what the other keeps apart (q, k and v
in one layer), the parts are rows of it in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal

from torch import nn

from .layers import LayerNames, LayerPart, Names, Place, Rows, Shapes, own_names, spellings, underscored

Form = Literal["original", "diffusers"]


@dataclass(frozen=True, slots=True)
class Row:
    """One layer of the original.

    ``diffusers`` is its name there, or those of its parts; ``words`` what the selector calls it, or each of its parts. A layer
    can have parts in both forms. ``aliases`` are further names of the whole, ``runs`` of some parts in turn (first, number).
    ``ratio`` is rows by columns where that tells related families apart.
    """

    original: str
    diffusers: tuple[str, ...]
    words: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    runs: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]], hash=False)
    halves: bool = False
    """The original holds shift and scale, diffusers scale and shift, if it has no more than these two."""
    ratio: float | None = None

    def lengths(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Rows of every part of a layer of this shape.

        Queries have as many rows as the layer has columns. Keys and values share the rest, or are as many (three of four
        parts), and the last of four has what is left.
        """
        rows, columns = shape[0], shape[1] if len(shape) > 1 else 0
        count = len(self.words)
        if count == 3 and rows > columns and (rows - columns) % 2 == 0:
            return columns, (rows - columns) // 2, (rows - columns) // 2
        if count == 4 and rows > 3 * columns:
            return columns, columns, columns, rows - 3 * columns
        return tuple(rows // count + (i < rows % count) for i in range(count))

    def swapped(self, shape: tuple[int, ...]) -> bool:
        """Whether the two halves of a layer of this shape stand in the other order in diffusers' form."""
        return self.halves and len(shape) == 2 and shape[0] == 2 * shape[1]


def layer(original: str, diffusers: str, words: str, *aliases: str, ratio: float | None = None, halves: bool = False) -> Row:  # fmt: skip
    """A layer that both forms have."""
    return Row(original, (diffusers,), (words,), aliases, halves=halves, ratio=ratio)


def attention(name: str, short: str, words: str, *, projection: str, out: str, norm: str) -> tuple[Row, ...]:
    """The layers of an attention ``name`` that diffusers calls ``short``: queries, keys and values, output, norms of the first two.

    ``projection`` and ``norm`` are the original's names of one with ``{}`` for its letter, ``out`` that of the output.
    """
    return (
        *(layer(f"{name}.{projection.format(n)}", f"{short}.to_{n}", f"{words} attn {n}") for n in "qkv"),
        layer(f"{name}.{out}", f"{short}.to_out.0", f"{words} attn out"),
        *(layer(f"{name}.{norm.format(n)}", f"{short}.norm_{n}", f"{words} attn") for n in "qk"),
    )


def fused(original: str, diffusers: str, words: str, *aliases: str, parts: str = "qkv", ratio: float | None = None) -> Row:  # fmt: skip
    """One layer of the original that diffusers keeps apart; ``{}`` stands for the part's letter in its names."""
    names = tuple(diffusers.format(part) for part in parts)
    return Row(original, names, tuple(f"{words} {part}" for part in parts), aliases, ratio=ratio)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A list of blocks, by its path in each form. ``word`` is what a block is called before its number; ``words`` are those of all its layers.

    ``counts`` are the numbers of blocks of published models, those of the lists that make them up in one order; block vectors have
    entries for these.
    """

    original: str
    diffusers: str
    word: str
    rows: tuple[Row, ...]
    words: str = ""
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """What a name stands for: a row, the block that it is in and its number, and which of the row's parts; all of it without any.

    ``name`` is the name as the table has it, without block and number.
    """

    row: Row
    blocks: Blocks | None
    number: int
    parts: tuple[int, ...] = ()
    name: str = ""

    @property
    def block(self) -> str:
        """Short name of the block, such as ``double3``; ``base`` outside of any."""
        return "base" if self.blocks is None else f"{self.blocks.word}{self.number}"

    @property
    def words(self) -> frozenset[str]:
        """The selector's words of the parts."""
        chosen = (self.row.words[i] for i in self.parts) if self.parts else iter(self.row.words)
        return frozenset(word for words in chosen for word in self.words_of(words))

    def words_of(self, words: str) -> frozenset[str]:
        """The words of one part of the row, with those of its list of blocks."""
        return frozenset(f"{words} {self.blocks.words if self.blocks else ''}".split())

    def path(self, name: str, form: Form) -> str:
        """The path of a layer of the row in its block."""
        if self.blocks is None:
            return name
        return f"{self.blocks.original if form == 'original' else self.blocks.diffusers}.{self.number}.{name}"

    @property
    def original(self) -> str:
        return self.path(self.row.original, "original")

    @property
    def diffusers(self) -> tuple[str, ...]:
        return tuple(self.path(name, "diffusers") for name in self.row.diffusers)


@dataclass(frozen=True, slots=True)
class Signs:
    """Layers that tell a form of a family: all of ``has``, none of ``lacks``."""

    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()

    def hold(self, shapes: Shapes) -> bool:
        return all(path in shapes for path in self.has) and not any(path in shapes for path in self.lacks)


@dataclass(frozen=True, eq=False)
class Naming:
    """All that is known of the names of a family's layers.

    ``original`` and ``diffusers`` tell the form of a model, ``lists`` and ``ends`` are its layers in blocks and outside. ``widths`` are
    those of the hidden states of published models.
    """

    family: str
    original: Signs
    diffusers: Signs
    lists: tuple[Blocks, ...]
    ends: tuple[Row, ...]
    widths: tuple[int, ...] = ()

    def __call__(self, model: nn.Module, shapes: Shapes) -> LayerNames | None:
        """The names of a model's layers; None for another model."""
        form = self.form_of(shapes)
        if form is None:
            return None
        made = _Made(shapes, form == "original")
        for found in self.layers_of(shapes):
            made.add(found)
        return LayerNames(self.family, made.names, made.labels, made.blocks, made.words, made.parts)

    def form_of(self, shapes: Shapes) -> Form | None:
        """The form that a model with these layers has; None for another model."""
        if self.original.hold(shapes):
            return "original"
        return "diffusers" if self.diffusers.hold(shapes) else None

    def layers_of(self, shapes: Shapes) -> Iterator[Found]:
        """Every row for every block that a model has, in either form, whether it has the layer or not."""
        for blocks in self.lists:
            numbers: set[int] = set()
            for name in {blocks.original, blocks.diffusers}:
                starting = (path[len(name) + 1 :] for path in shapes if path.startswith(f"{name}."))
                numbers |= {int(head) for rest in starting if (head := rest.partition(".")[0]).isdecimal()}
            for number in sorted(numbers):
                yield from (Found(row, blocks, number) for row in blocks.rows)
        yield from (Found(row, None, 0) for row in self.ends)

    def paths(self) -> Iterator[str]:
        """Every name in the table: of lists of blocks, and of layers in them or outside."""
        yield from (name for blocks in self.lists for name in (blocks.original, blocks.diffusers))
        rows = [row for blocks in self.lists for row in blocks.rows]
        yield from (name for row in (*rows, *self.ends) for name, _ in _spellings(row))

    def find(self, name: str) -> Found | None:
        """What an underscored name of either form stands for; None if it is of no layer of the family."""
        found = self._outside.get(name)
        if found is not None:
            return Found(found[0], None, 0, *found[1:])
        for start, blocks, rows in self._inside:
            if name.startswith(start):
                number, _, rest = name[len(start) :].partition("_")
                inner = rows.get(rest) if number.isdecimal() and len(number) < 5 else None
                if inner is not None:
                    return Found(inner[0], blocks, int(number), *inner[1:])
        return None

    @cached_property
    def _outside(self) -> dict[str, _Named]:
        return _by_name(self.ends)

    @cached_property
    def _inside(self) -> tuple[tuple[str, Blocks, dict[str, _Named]], ...]:
        pairs = [
            (f"{underscored(name)}_", blocks, _by_name(blocks.rows))
            for blocks in self.lists
            for name in {blocks.original, blocks.diffusers}
        ]
        return tuple(sorted(pairs, key=lambda pair: -len(pair[0])))


_Named = tuple[Row, tuple[int, ...], str]


def _by_name(rows: tuple[Row, ...]) -> dict[str, _Named]:
    """Row, parts and name in the table by every underscored name."""
    found: dict[str, _Named] = {}
    for row in rows:
        for name, parts in _spellings(row):
            for spelled in spellings(name):
                found.setdefault(spelled, (row, parts, name))
    return found


def _spellings(row: Row) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every name of a row, and which parts it means; () are all of them."""
    count = len(row.words)
    yield row.original, ()
    if len(row.diffusers) == 1:
        yield row.diffusers[0], ()
    else:
        yield from ((name, (i,)) for i, name in enumerate(row.diffusers))
    yield from ((name, ()) for name in row.aliases)
    if count > 1:
        yield from ((f"{row.original}.{i}", (i,)) for i in range(count))  # the open model initiative's names
    yield from ((name, tuple(range(first, first + number))) for name, (first, number) in row.runs.items())


class _Made:
    """The names of one model, row by row."""

    def __init__(self, shapes: Shapes, is_original: bool) -> None:
        self.shapes, self.is_original = shapes, is_original
        self.names: Names = own_names(shapes)
        self.labels: dict[str, str] = {}
        self.blocks: dict[str, str] = dict.fromkeys(shapes, "base")
        self.words: dict[str, frozenset[str]] = {}
        self.parts: dict[str, tuple[LayerPart, ...]] = {}

    def add(self, found: Found) -> None:
        own = (found.original,) if self.is_original else found.diffusers
        there = [path for path in own if path in self.shapes]
        if not there:
            return
        for path in there:
            self.blocks[path] = found.block
            self.words[path] = found.words
        if len(own) == 1:
            self._one(found, own[0])
        else:
            self._apart(found, own)

    def _one(self, found: Found, path: str) -> None:
        """A row that is one layer here."""
        row, shape = found.row, self.shapes[path]
        lengths = row.lengths(shape)
        starts = tuple(accumulate(lengths, initial=0))
        split = len(row.diffusers) > 1
        self.labels[path] = path if split else found.diffusers[0]
        if len(lengths) > 1:
            self.parts[path] = tuple(
                LayerPart(found.diffusers[i] if split else found.diffusers[0], starts[i], length, found.words_of(row.words[i]))
                for i, length in enumerate(lengths)
            )  # fmt: skip
        half = shape[0] // 2
        turned = (Place(path, Rows(0, half, half)), Place(path, Rows(half, 0, half)))
        for name, parts in _spellings(row):
            whole = not parts or len(parts) == len(lengths)
            places = (
                (Place(path),) if whole else (Place(path, Rows(0, starts[parts[0]], sum(lengths[i] for i in parts))),)
            )
            other = row.diffusers[0] if self.is_original else row.original
            self._name(found, name, turned if name == other and row.swapped(shape) else places)

    def _apart(self, found: Found, own: tuple[str, ...]) -> None:
        """A row whose parts are layers here."""
        row = found.row
        known = next(self.shapes[path][0] for path in own if path in self.shapes)
        lengths = [self.shapes[path][0] if path in self.shapes else known for path in own]
        starts = tuple(accumulate(lengths, initial=0))
        for i, path in enumerate(own):
            if path in self.shapes:
                self.labels[path] = path
                self.words[path] = found.words_of(row.words[i])
        for name, parts in _spellings(row):
            chosen = parts or tuple(range(len(own)))
            if len(chosen) == 1:
                places = (Place(own[chosen[0]]),)
            else:
                first = starts[chosen[0]]
                places = tuple(Place(own[i], Rows(starts[i] - first, 0, lengths[i])) for i in chosen)
            self._name(found, name, tuple(place for place in places if place.path in self.shapes))

    def _name(self, found: Found, name: str, places: tuple[Place, ...]) -> None:
        if not places:
            return
        paths = {found.path(name, "original"), found.path(name, "diffusers")}
        for path in sorted(paths):
            for spelled in spellings(path):
                self.names.setdefault(spelled, places)
