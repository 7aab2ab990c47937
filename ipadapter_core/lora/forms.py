"""A LoRA for one form of a transformer as one for the other: layers renamed, fused ones cut into their parts, parts put together.

A product's rows are its factors' rows, so cutting is exact. Parts together are one product whose ranks add up, but for parts that
share one ``down``, as cut ones do: these get back what they were.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import InvalidInputError, quoted
from ..models.layers import underscored
from ..models.naming import Form, Found
from .algorithms.difference import Difference
from .algorithms.low_rank import LowRank
from .base_names import found_in
from .update import Rows, Update, alike
from .weights import LoRAModule


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one module says of a layer: some of its rows (all without any), which are rows of the layer from ``offset`` on."""

    module: LoRAModule
    rows: tuple[int, int] | None
    offset: int
    halves: bool = False


def in_form(modules: Iterable[LoRAModule], base_model: str, form: Form) -> list[LoRAModule]:
    """The modules with the names of one form of the model; those that are in no table of ``base_model`` stay as they are.

    Raises InvalidInputError for changes of fused layers that cannot be cut or put together.
    """
    placed: dict[str, tuple[Found, list[_Piece], int]] = {}
    order: list[LoRAModule | str] = []
    for module in modules:
        found = found_in(module.name, base_model) if module.component == "denoiser" else None
        if found is None:
            order.append(module)
            continue
        for path, piece, length in _pieces(module, found, form):
            if path not in placed:
                placed[path] = found, [], length
                order.append(path)
            placed[path][1].append(piece)
    return [one if isinstance(one, LoRAModule) else _layer(one, *placed[one]) for one in order]


def path_in(module: LoRAModule, base_model: str, form: Form) -> str | None:
    """The dotted path of a module that has the names of this form; None for one in no table."""
    found = found_in(module.name, base_model) if module.component == "denoiser" else None
    if found is None:
        return None
    if form == "original" or len(found.diffusers) == 1:
        return found.original if form == "original" else found.diffusers[0]
    return found.diffusers[found.parts[0]] if len(found.parts) == 1 else None


def _pieces(module: LoRAModule, found: Found, form: Form) -> Iterable[tuple[str, _Piece, int]]:
    """Layer, piece and the layer's rows for everything that a module changes in this form."""
    row = found.row
    shape = _shape(module, found)
    lengths = row.lengths(shape)
    starts = tuple(accumulate(lengths, initial=0))
    parts = found.parts or tuple(range(len(lengths)))
    whole = len(parts) == len(lengths)
    if form == "original" or len(row.diffusers) == 1:
        path = found.original if form == "original" else found.diffusers[0]
        turned = found.name == (row.diffusers[0] if form == "original" else row.original) and row.swapped(shape)
        yield path, _Piece(module, None, 0 if whole else starts[parts[0]], turned), shape[0]
        return
    for part in parts:
        own = starts[part] - starts[parts[0]], lengths[part]
        yield found.diffusers[part], _Piece(module, None if len(parts) == 1 else own, 0), lengths[part]


def _shape(module: LoRAModule, found: Found) -> tuple[int, ...]:
    """Shape of the whole layer of the original, from that of the module's change."""
    update = module.weight if module.weight is not None else module.bias
    shape = () if update is None else tuple(size or 0 for size in update.weight_shape)
    if not shape or not shape[0]:
        shape = (1, *shape[1:])
    if not found.parts or len(found.parts) == len(found.row.words) or len(shape) < 2:
        return shape
    rows, columns = shape[:2]
    count = len(found.row.words)
    total = round(found.row.ratio * columns) if found.row.ratio else (count if count < 4 else 7) * columns
    lengths = found.row.lengths((total, columns))
    if sum(lengths[i] for i in found.parts) != rows:
        raise InvalidInputError(
            f"{quoted(module.stem)} has {rows} rows, a part of {quoted(found.original)} {sum(lengths[i] for i in found.parts)}; it is for "
            "another variant of the model, so that its layers cannot be put together"
        )
    return total, columns


def _layer(path: str, found: Found, pieces: Sequence[_Piece], length: int) -> LoRAModule:
    """One layer's module out of its pieces."""
    first = pieces[0].module
    named = replace(first, name=underscored(path))
    if len(pieces) == 1 and pieces[0].offset == 0 and not pieces[0].halves:
        piece = pieces[0]
        if piece.rows is None and (found.row.diffusers[1:] == () or _rows_of(first) in (None, length)):
            return named
        if piece.rows is not None:
            weight = None if first.weight is None else _cut(first, first.weight, *piece.rows)
            bias = None if first.bias is None else first.bias.rows(*piece.rows)
            return replace(named, weight=weight, bias=bias)
    weight = None if all(piece.module.weight is None for piece in pieces) else _together(path, pieces, length)
    return replace(named, weight=weight, bias=_biases_together(path, pieces, length), alpha=None, alpha_from="")


def _biases_together(path: str, pieces: Sequence[_Piece], length: int) -> Update | None:
    """Whole differences of the biases of parts as one of the layer's."""
    whole = torch.zeros(length)
    with_bias = [piece for piece in pieces if piece.module.bias is not None]
    for piece in with_bias:
        update = piece.module.bias
        if not isinstance(update, Difference):
            raise InvalidInputError(
                f"{quoted(piece.module.stem)} changes the bias of a part of {quoted(path)} in a way that cannot be put together"
            )
        vector = update.diff.flatten() if piece.rows is None else update.rows(*piece.rows).tensors()["diff"].flatten()
        whole[piece.offset : piece.offset + len(vector)] += _turned(vector) if piece.halves else vector
    return Difference(whole) if with_bias else None


def _rows_of(module: LoRAModule) -> int | None:
    return None if module.weight is None else module.weight.weight_shape[0]


def _cut(module: LoRAModule, update: Update, start: int, length: int) -> Update:
    part = update.rows(start, length)
    if not isinstance(part, Rows):
        return part
    factors = part.inner.factors()
    if factors is None:
        raise InvalidInputError(
            f"{quoted(module.stem)} is {update.title} on a fused layer, which cannot be cut into its parts; write 'kohya' or 'generic', "
            "which have the layer's own name"
        )
    return LowRank(factors[1], factors[0][start : start + length])


def _together(path: str, pieces: Sequence[_Piece], length: int) -> Update:
    """Their changes as one of the layer, at their rows."""
    updates = [_part(piece) for piece in pieces]
    if all(isinstance(update, Difference) for update in updates):
        columns = next(update.weight_shape[1:] for update in updates)
        whole = torch.zeros(length, *(size or 1 for size in columns))
        for piece, update in zip(pieces, updates, strict=True):
            rows = update.weight_shape[0] or length
            whole[piece.offset : piece.offset + rows] += update.delta(whole[piece.offset : piece.offset + rows])
        return Difference(_turned(whole) if pieces[0].halves else whole)
    factors: list[tuple[int, Tensor, Tensor]] = []
    for piece, update in zip(pieces, updates, strict=True):
        found = update.factors()
        if found is None or update.kernel:
            raise InvalidInputError(
                f"{quoted(piece.module.stem)} is {update.title} on a part of {quoted(path)}; only products of matrices can be put together "
                "there. Write 'diffusers', or keep the form of the file"
            )
        factors.append((piece.offset, _turned(found[0]) if piece.halves else found[0], found[1]))
    first = factors[0][2]
    apart = all(
        a[0] + len(a[1]) <= b[0] for a, b in zip(sorted(factors, key=_at), sorted(factors, key=_at)[1:], strict=False)
    )
    shared = apart and all(down.shape == first.shape and torch.equal(down, first) for _, _, down in factors)
    tensors = alike(*(t for _, up, down in factors for t in (up, down)))
    rank = len(first) if shared else sum(len(down) for _, _, down in factors)
    whole, column = tensors[0].new_zeros(length, rank), 0
    for (offset, _, _), up in zip(factors, tensors[::2], strict=True):
        whole[offset : offset + len(up), column : column + up.shape[1]] += up
        column += 0 if shared else up.shape[1]
    return LowRank(tensors[1] if shared else torch.cat(tensors[1::2]), whole)


def _at(piece: tuple[int, Tensor, Tensor]) -> int:
    return piece[0]


def _part(piece: _Piece) -> Update:
    update = piece.module.weight
    if update is None:
        raise InvalidInputError(
            f"{quoted(piece.module.stem)} changes nothing but a bias, which cannot be put together with others"
        )
    return update if piece.rows is None else _cut(piece.module, update, *piece.rows)


def _turned(rows: Tensor) -> Tensor:
    """The second half first."""
    return torch.cat(rows.chunk(2)[::-1])
