"""What a selector says of each block of a LoRA file, for sliders; and presets that people keep in a file of their own."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidInputError, quoted
from .block_vectors import PRESETS
from .inspection import target_of
from .selector import Selector, block_order
from .weights import LoRAWeights

MOST_PRESETS = 500
"""Of one file; the largest that people share has some fifty."""


@dataclass(frozen=True, slots=True)
class BlockShare:
    """One block of a file: how many of its layers are in the file, and the least and greatest factor that they get."""

    block: str
    layers: int
    low: float
    high: float


def block_shares(weights: LoRAWeights, selector: Selector) -> tuple[BlockShare, ...]:
    """Every block of a file with what a selector gives its layers, in the model's order."""
    targets = [target_of(module, weights.base_model) for module in weights.modules]
    factors: dict[str, list[list[float]]] = {}
    for target, shares in zip(targets, selector.shares(targets), strict=True):
        factors.setdefault(target.block, []).append([share.factor for share in shares])
    return tuple(
        BlockShare(block, len(layers), min(map(min, layers)), max(map(max, layers)))
        for block, layers in sorted(factors.items(), key=lambda item: block_order(item[0]))
    )


def presets_for(base_model: str) -> tuple[str, ...]:
    """Names of the block presets that are made for a base model."""
    kind = "SD1.5" if base_model.startswith("SD2") else base_model.split()[0]
    return tuple(name for name, (layout, _) in PRESETS.items() if layout.split()[0] == kind)


def parse_presets(text: str) -> dict[str, str]:
    """Presets of a user, one a line: a name, a colon, and a block vector or selector. ``#`` begins a comment.

    Lines of Inspire's ``lbw-preset.custom.txt`` are read as they are. What a preset means is read where it is chosen.
    Raises InvalidInputError for a line without a name or a text, and for more than 500.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#", 1)[0].strip()
        name, colon, meaning = (part.strip() for part in line.partition(":"))
        if line and not (name and colon and meaning):
            raise InvalidInputError(
                f"line {number} of the presets is {quoted(line)}; write 'NAME: 1,0,0.5,…' or 'NAME: all: 0, in4: 1'"
            )
        if line:
            found[name] = meaning
    if len(found) > MOST_PRESETS:
        raise InvalidInputError(f"there are {len(found):,} presets; at most {MOST_PRESETS:,} can be used")
    return found
