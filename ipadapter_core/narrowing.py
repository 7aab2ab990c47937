"""What a value of unknown kind is, in words that the type checker keeps: one test here in place of a cast at each use.

What a container holds is ``object`` until it is tested in its turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard


def is_table(value: object) -> TypeGuard[dict[str, object]]:
    """Whether a value of a JSON text is a table. JSON has no keys but texts."""
    return isinstance(value, dict)


def is_mapping(value: object) -> TypeGuard[Mapping[object, object]]:
    """Whether a value is a table of any kind, with keys of any kind."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[object]]:
    """Whether a value is a list."""
    return isinstance(value, list)


def is_row(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value is a list or a tuple."""
    return isinstance(value, (list, tuple))
