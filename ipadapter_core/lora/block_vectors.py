"""Block vectors that people share (``1,0,0,1,…``) as selectors, by name: a file that lacks blocks shifts nothing.

Orders: kohya's svd_merge_lora.py (12, 17, 20, 26) and Inspire's lbw-preset.txt (21, 27, Flux). The text encoders and all
that is in no block follow BASE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import InvalidInputError
from .selector import Rule, Selector, parse_selector


def _numbered(name: str, numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{name}{n}" for n in numbers)


_MIDDLE = ("mid0", "mid1", "mid2")
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "SD1.5 17": ("base", *_numbered("in", (1, 2, 4, 5, 7, 8)), "mid", *_numbered("out", range(3, 12))),
    "SD1.5 26": ("base", *_numbered("in", range(12)), "mid", *_numbered("out", range(12))),
    "SD1.5 27": ("base", *_numbered("in", range(1, 12)), *_MIDDLE, *_numbered("out", range(12))),
    "SDXL 12": ("base", *_numbered("in", (4, 5, 7, 8)), "mid", *_numbered("out", range(6))),
    "SDXL 20": ("base", *_numbered("in", range(9)), "mid", *_numbered("out", range(9))),
    "SDXL 21": ("base", *_numbered("in", range(1, 9)), *_MIDDLE, *_numbered("out", range(9))),
    "Flux 20": ("base", *_numbered("double", range(19))),
    "Flux 58": ("base", *_numbered("double", range(19)), *_numbered("single", range(38))),
}
"""Blocks in the order of each kind of vector."""


def _preset(layout: str, base: float, *on: tuple[str, float]) -> tuple[str, tuple[float, ...]]:
    values = {"base": base, **dict(on)}
    return layout, tuple(values.get(block, values.get(block.rstrip("0123456789"), 0.0)) for block in LAYOUTS[layout])


def _each(prefix: str, numbers: Sequence[int], value: float = 1.0) -> tuple[tuple[str, float], ...]:
    return tuple((f"{prefix}{n}", value) for n in numbers)


_ALL, _IN, _OUT, _MID = (("in", 1.0), ("mid", 1.0), ("out", 1.0)), ("in", 1.0), ("out", 1.0), ("mid", 1.0)
PRESETS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "SD-NONE": _preset("SD1.5 17", 0),
    "SD-ALL": _preset("SD1.5 17", 1, *_ALL),
    "SD-INS": _preset("SD1.5 17", 1, *_each("in", (1, 2, 4))),
    "SD-IND": ("SD1.5 17", (1, 0, 0, 0, 1, 1, 1, *(0,) * 10)),
    "SD-INALL": _preset("SD1.5 17", 1, _IN),
    "SD-MIDD": _preset("SD1.5 17", 1, *_each("in", (5, 7, 8)), _MID, *_each("out", (3, 4, 5, 6))),
    "SD-MIDD0.2": ("SD1.5 17", (1, 0, 0, 0, 0, 0, 0.2, 0.4, 0.4, 0.2, 0, 0, 0, 0, 0, 0, 0)),
    "SD-MIDD0.8": ("SD1.5 17", (1, 0, 0, 0, 0, 0.5, 0.8, 0.8, 0.4, 0, 0, 0, 0, 0, 0, 0, 0)),
    "SD-MOUT": ("SD1.5 17", (1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0, 0)),
    "SD-OUTD": _preset("SD1.5 17", 1, *_each("out", (3, 4, 5, 6))),
    "SD-OUTS": _preset("SD1.5 17", 1, *_each("out", (7, 8, 9, 10, 11))),
    "SD-OUTALL": _preset("SD1.5 17", 1, _OUT),
    "SD-ALL0.5": _preset("SD1.5 17", 0.5, ("in", 0.5), ("mid", 0.5), ("out", 0.5)),
    "SD-LyC-NONE": _preset("SD1.5 27", 0),
    "SD-LyC-ALL": _preset("SD1.5 27", 1, *_ALL),
    "SD-LyC-INALL": _preset("SD1.5 27", 1, _IN),
    "SD-LyC-MIDALL": _preset("SD1.5 27", 1, _MID),
    "SD-LyC-OUTALL": _preset("SD1.5 27", 1, _OUT),
    "SDXL-NONE": _preset("SDXL 12", 0),
    "SDXL-ALL": _preset("SDXL 12", 1, *_ALL),
    "SDXL-INALL": _preset("SDXL 12", 1, _IN),
    "SDXL-MIDALL": _preset("SDXL 12", 1, _MID),
    "SDXL-OUTALL": _preset("SDXL 12", 1, _OUT),
    "SDXL-LyC-NONE": _preset("SDXL 21", 0),
    "SDXL-LyC-ALL": _preset("SDXL 21", 1, *_ALL),
    "SDXL-LyC-INALL": _preset("SDXL 21", 1, _IN),
    "SDXL-LyC-MIDALL": _preset("SDXL 21", 1, _MID),
    "SDXL-LyC-OUTALL": _preset("SDXL 21", 1, _OUT),
    "FLUX-DBL-FRONT": _preset("Flux 20", 1, *_each("double", range(5))),
    "FLUX-DBL-MID": _preset("Flux 20", 0, *_each("double", range(5, 11))),
    "FLUX-DBL-TAIL": _preset("Flux 20", 0, *_each("double", range(11, 17))),
}
"""Named vectors: (layout, values), the values of Inspire's file. Its random ones (R, U) and A/B ones take a number first.
Its three Flux ones have 18 entries, read by position: BASE and the double blocks 0..16; the blocks beyond are 0."""


def block_vector(text: str, layout: str | None = None, *, base_model: str | None = None) -> Selector:
    """A vector ``1,0,0.5,…`` or a preset's name as a selector; every block that the vector names not gets 0.

    ``layout`` is one of LAYOUTS; None: by the number of entries, where 20 needs ``base_model`` (``SDXL`` or ``Flux``).
    """
    text = text.strip()
    if text in PRESETS:
        layout, values = PRESETS[text]
    else:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            raise InvalidInputError(
                f"{text!r} is neither numbers with commas nor a block preset; presets: {', '.join(PRESETS)}"
            ) from None
        layout = layout or _layout_of(len(values), base_model)
    if layout not in LAYOUTS:
        raise InvalidInputError(f"unknown block layout {layout!r}; choose one of: {', '.join(LAYOUTS)}")
    blocks = LAYOUTS[layout]
    if len(values) != len(blocks):
        raise InvalidInputError(f"the block layout {layout!r} has {len(blocks)} entries, the vector has {len(values)}")
    rest = (Rule(f"unet {kind}*", 0.0) for kind in ("in", "mid", "out", "double", "single"))
    rules = (Rule(block, value) for block, value in zip(blocks, values, strict=True))
    return Selector((*rest, *rules))


def _layout_of(entries: int, base_model: str | None) -> str:
    found = [name for name in LAYOUTS if name.endswith(f" {entries}")]
    if len(found) > 1 and base_model is not None:
        found = [name for name in found if name.startswith(base_model)]
    if len(found) == 1:
        return found[0]
    raise InvalidInputError(
        f"a block vector of {entries} entries is "
        + (f"ambiguous: say which of {', '.join(found)}" if found else f"of no known kind: {', '.join(LAYOUTS)}")
    )


def parse_where(text: str, base_model: str | None = None) -> Selector:
    """A selector, or a block vector or preset, whichever the text is."""
    entries = text.strip()
    numbers = re.fullmatch(r"[-+.\deE\s]+(?:,[-+.\deE\s]+)+", entries)
    return block_vector(entries, base_model=base_model) if numbers or entries in PRESETS else parse_selector(text)
