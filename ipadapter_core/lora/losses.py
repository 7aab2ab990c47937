"""When what finds no place in a model makes a LoRA another one: the one rule by which a half-applied file is refused.

Trainers train every layer of the kinds they choose, so a file that fits loses a few modules at most (a layer that one
variant of a model has and another has not). A file in names that are not known loses whole kinds of layers, or a share.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable

from .weights import Component

LOST_SHARE = 0.06
"""Of a component's modules that may be lost: one in 17. Known variants differ by less: Flux dev and schnell by 2 of 500."""

Module = tuple[Component, str]
"""Part and name, as ``names.canonical`` gives them."""

_IN_BLOCK = re.compile(r"^.*(?:blocks?|attentions|resnets|layers|refiner|encoders|injector)_\d+_")


def kind_of(name: str) -> str | None:
    """What is left of a name behind its last numbered block (``attn2_to_q``); None outside of blocks."""
    found = _IN_BLOCK.match(name)
    return None if found is None else name[found.end() :]


def lost_part(matched: Iterable[Module], lost: Iterable[Module], parts: Container[Component]) -> str | None:
    """What of a LoRA is lost, in words, if that matters; None if not. Components that are not in ``parts`` do not count.

    It matters if more than LOST_SHARE of a component's modules have no place, or all of a kind of layer that occurs at
    least twice.
    """
    there = Counter(component for component, _ in set(matched))
    kinds = {(component, kind_of(name)) for component, name in matched}
    gone = [(component, name) for component, name in set(lost) if component in parts]
    missing = Counter(component for component, _ in gone)
    for component, count in missing.items():
        total = count + there[component]
        if count > LOST_SHARE * total:
            return f"{count} of {total} modules of {component} have no place in the model"
    missing_kinds = Counter((component, kind) for component, name in gone if (kind := kind_of(name)) is not None)
    for (component, kind), count in missing_kinds.items():
        if count > 1 and (component, kind) not in kinds:
            return f"all {count} modules of the kind {kind!r} of {component} have no place in the model"
    return None
