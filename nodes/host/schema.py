"""What a node says of itself, on every version of ComfyUI: a field that one does not know yet would disable the whole pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from comfy_api.latest import io

Entry = TypeVar("Entry", bound=io.Input)


def schema(
    *,
    node_id: str,
    display_name: str,
    category: str,
    description: str,
    search_aliases: Sequence[str],
    inputs: Sequence[io.Input],
    outputs: Sequence[io.Output],
    **more: Any,
) -> io.Schema:
    """A node's schema, without the fields that this host does not know.

    ``search_aliases`` are words by which people look for the node and which its title lacks, in small letters.
    """
    fields: dict[str, Any] = {
        "node_id": node_id, "display_name": display_name, "category": category, "description": description,
        "search_aliases": list(search_aliases), "inputs": list(inputs), "outputs": list(outputs), **more,
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{name: value for name, value in fields.items() if name in known})


def advanced(entry: Entry) -> Entry:
    """Fold an input away where the host can; elsewhere it stays in its place. Changes ``entry`` and returns it.

    The keyword that newer hosts have for it breaks older ones.
    """
    entry.extra_dict = {**entry.extra_dict, "advanced": True}
    return entry
