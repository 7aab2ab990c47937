"""Block vectors that people share (``1,0,0,1,…``) as selectors, by name: a file that lacks blocks shifts nothing.

Orders: kohya's svd_merge_lora.py (12, 17, 20, 26) and Inspire's lbw-preset.txt (21, 27, Flux). Nobody shares any for other
transformers yet: BASE and their blocks in execution order. The text encoders, refiners and all that is in no block follow BASE. What else people paste beside the numbers is that of ltdrdata's Inspire pack and of hako-mikan's
sd-webui-lora-block-weight: ``NAME:`` before them, letters for numbers, several numbers in one entry, ``%default=…``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..entries import at_most, halves, number, plain
from ..errors import InvalidInputError, quoted
from ..models import BASE_MODELS
from .selector import BLOCK_WORDS, Rule, Selector, parse_selector
from .weights import families_in


def _numbered(name: str, numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{name}{n}" for n in numbers)


_MIDDLE = ("mid0", "mid1", "mid2")
_SHARED: Mapping[str, tuple[str, ...]] = {
    "SD1.5 17": ("base", *_numbered("in", (1, 2, 4, 5, 7, 8)), "mid", *_numbered("out", range(3, 12))),
    "SD1.5 26": ("base", *_numbered("in", range(12)), "mid", *_numbered("out", range(12))),
    "SD1.5 27": ("base", *_numbered("in", range(1, 12)), *_MIDDLE, *_numbered("out", range(12))),
    "SDXL 12": ("base", *_numbered("in", (4, 5, 7, 8)), "mid", *_numbered("out", range(6))),
    "SDXL 20": ("base", *_numbered("in", range(9)), "mid", *_numbered("out", range(9))),
    "SDXL 21": ("base", *_numbered("in", range(1, 9)), *_MIDDLE, *_numbered("out", range(9))),
    "Flux 20": ("base", *_numbered("double", range(19))),
    "Flux 58": ("base", *_numbered("double", range(19)), *_numbered("single", range(38))),
}
"""Blocks in the order of each kind of vector that people share."""


def _own_layouts() -> dict[str, tuple[str, ...]]:
    """BASE and every block of each published model of a family that has a table."""
    found: dict[str, tuple[str, ...]] = {}
    for base in BASE_MODELS:
        counted = [blocks for blocks in base.naming.lists if blocks.counts] if base.naming else []
        for numbers in zip(*(blocks.counts for blocks in counted), strict=True):
            names = [_numbered(b.word, range(n)) for b, n in zip(counted, numbers, strict=True)]
            blocks = ("base", *(name for one in names for name in one))
            found[f"{base.name} {len(blocks)}"] = blocks
    return found


SHARED = frozenset(_SHARED)
LAYOUTS: Mapping[str, tuple[str, ...]] = {**_SHARED, "Chroma 20": _SHARED["Flux 20"], **_own_layouts()}
"""All of them, by family and number of entries; those of ``SHARED`` count where nothing is known of the file."""


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


_NAMES = {name.upper(): name for name in PRESETS}
_WITH_LETTERS = {"SD-ROUT": "R", "SD-AOUT": "A", "SD-AB": "A and B"}
"""Presets of Inspire's file that hold letters."""

_SHORT = (18, 55)
"""Lengths of Inspire's vectors for Flux, which end before the model does: the last number is that of all blocks behind."""

_WIDGETS, _RANDOM = frozenset("AaBb"), frozenset("RrUu")
_MAIN = (blocks.word for base in BASE_MODELS if base.naming for blocks in base.naming.lists if blocks.counts)
_KINDS = tuple(dict.fromkeys(("in", "mid", "out", *_MAIN)))
"""What the blocks are called that vectors have entries for."""


def block_vector(text: str, layout: str | None = None, *, base_model: str | None = None) -> Selector:
    """A vector ``1,0,0.5,…`` or a preset's name as a selector; every block that the vector names not gets 0.

    ``layout`` is one of LAYOUTS; None: by the number of entries, where some need ``base_model`` (20: ``SDXL`` or ``Flux``).
    Presets may be written in any case, with ``_`` or blanks for ``-``; one without its first part (``OUTALL``) is that of the
    base model. Raises InvalidInputError.
    """
    text = _bare(plain(text, "the block vector"))
    preset = _preset_name(text, base_model)
    if preset:
        layout, values = PRESETS[preset]
    else:
        values = _values(text, layout)
        if layout is None and len(values) in _SHORT and not _others(base_model, "Flux", "Chroma"):
            layout, values = "Flux 58", values + values[-1:] * (58 - len(values))
        layout = layout or _layout_of(len(values), base_model)
    if layout not in LAYOUTS:
        raise InvalidInputError(f"unknown block layout {quoted(layout)}; choose one of: {', '.join(LAYOUTS)}")
    blocks = LAYOUTS[layout]
    if len(values) != len(blocks):
        raise InvalidInputError(f"the block layout {layout!r} has {len(blocks)} entries, the vector has {len(values)}")
    rest = [Rule(f"unet {kind}*", 0.0) for kind in _KINDS]
    outside = [Rule(f"unet {word}*", values[0]) for word in BLOCK_WORDS if word not in _KINDS]
    rules = (Rule(block, value) for block, value in zip(blocks, values, strict=True))
    return Selector((*rest, *outside, *rules))


def parse_where(text: str, base_model: str | None = None) -> Selector:
    """A selector, or a block vector, preset or ``%default=…`` line, whichever the text is. Raises InvalidInputError."""
    plain_text = plain(text, "the selector")
    bare = _bare(plain_text)
    if bare.startswith("%"):
        return _by_groups(bare[1:])
    if bare.startswith(("<lora:", "<lyco:")):
        raise InvalidInputError(
            f"{quoted(bare)} is a prompt of the web UI; write what follows lbw= here, and the strength in its own widget"
        )
    if bare.startswith("@"):
        raise InvalidInputError(f"{quoted(bare)} is a series of Inspire's XY plot, not a block vector")
    known = _preset_name(bare, base_model) and bare.lower() not in (
        "all",
        "base",
    )  # these two are words of the selector
    if known or _is_vector(bare) or bare.upper().startswith(("SD-", "SDXL-", "FLUX-")):
        return block_vector(bare, base_model=base_model)
    return parse_selector(plain_text)


def check_where(text: str) -> None:
    """Raise InvalidInputError for a text that ``parse_where`` can read for no base model: before a file tells which it is."""
    refusals: list[InvalidInputError] = []
    for base_model in (None, "SDXL", "Flux"):
        try:
            parse_where(text, base_model)
        except InvalidInputError as error:
            refusals.append(error)
        else:
            return
    raise refusals[0]


def _bare(text: str) -> str:
    """Without comments, empty lines, quotes or brackets around it, and ``lbw=``; commas for semicolons."""
    lines = (line.split("#", 1)[0].strip() for line in text.replace(";", ",").splitlines())
    bare = "\n".join(line for line in lines if line).strip("\"'`[]()").strip()
    return bare[4:].strip() if bare[:4].lower() == "lbw=" else bare


def _preset_name(text: str, base_model: str | None) -> str | None:
    """The preset that a text names, in any case and with its first part left out; None if it is none."""
    if not 0 < len(text) <= 40:
        return None
    name = "-".join(text.upper().replace("_", " ").replace("-", " ").split())
    known = families_in(base_model)
    family = "SDXL-" if (base_model or "").startswith("SDXL") else "FLUX-" if {"Flux", "Chroma"} & known else "SD-"
    candidates = (name, family + name, "SD-" + name)
    letters = next((_WITH_LETTERS[c] for c in candidates if c in _WITH_LETTERS), None)
    if letters:
        raise InvalidInputError(f"the preset {quoted(text)} holds {letters} for numbers: " + _letters(letters[0]))
    return next((_NAMES[c] for c in candidates if c in _NAMES), None)


def _cells(text: str) -> list[str]:
    """The entries of a vector, empty ones too, without a name before them and without commas at the ends of lines."""
    at = min((i for i in map(text.find, ":=") if i >= 0), default=-1)
    lines = text[at + 1 :].splitlines()
    if "," not in text:
        return text[at + 1 :].split()
    whole = ",".join(stripped for line in lines if (stripped := line.strip().rstrip(", \t")))
    return [cell.strip() for cell in whole.split(",")]


def _is_vector(text: str) -> bool:
    """Whether most entries are numbers or the letters for them, which no entry of a selector is."""
    filled = [cell for cell in _cells(text) if cell]
    like = sum(all(number(word) is not None or _stands_for_number(word) for word in cell.split()) for cell in filled)
    alone = len(filled) == 1 and number(text) is None
    return 2 * like > len(filled) and not alone and not _all_named(text)


def _all_named(text: str) -> bool:
    """Whether every number has a place before it, in several entries or lines: a selector whose lines end without commas."""
    entries = [entry for line in text.splitlines() for entry in line.split(",") if entry.strip()]
    pairs = [halves(entry) for entry in entries]
    return len(pairs) > 1 and all(pair is not None and number(pair[1]) is not None for pair in pairs)


def _stands_for_number(word: str) -> bool:
    return word in _WIDGETS or word in _RANDOM or (word[:1] in ("X", "x") and word[1:2] in ("", "+", "-"))


def _values(text: str, layout: str | None) -> tuple[float, ...]:
    if not _is_vector(text) and number(text) is None:
        raise InvalidInputError(
            f"{quoted(text)} is neither numbers with commas nor a block preset; presets: {', '.join(PRESETS)}"
        )
    cells = at_most(_cells(text), "the block vector")
    numbers, empty = sum(1 for cell in cells if cell), cells.count("")
    if empty:
        empties = "an empty one" if empty == 1 else f"{empty} empty ones"
        raise InvalidInputError(
            f"the block vector has {numbers} number{'s' * (numbers != 1)} and {empties}; {_lengths(layout)}"
        )
    return tuple(_value(cell, place) for place, cell in enumerate(cells, 1))


def _value(cell: str, place: int) -> float:
    """The number of one entry; several that are equal are one."""
    words = cell.split()
    for word in words:
        if _stands_for_number(word):
            raise InvalidInputError(f"entry {place} of the block vector is {quoted(cell)}: " + _letters(word))
    found = {number(word) for word in words}
    if None in found:
        second = "; a second vector begins there: keep one" if halves(cell) else ""
        raise InvalidInputError(f"entry {place} of the block vector, {quoted(cell)}, is no finite number{second}")
    if len(found) > 1:
        raise InvalidInputError(
            f"entry {place} of the block vector, {quoted(cell)}, gives the layers of a block one number each in the order of "
            "the file (Inspire's way); write one number, or name the layers in a selector: 'in4 attn2: 0.5'"
        )
    return next(value for value in found if value is not None)


def _letters(word: str) -> str:
    if word in _RANDOM:
        return "R and U are random numbers in the node that it was made for; write the numbers that it drew"
    if word in _WIDGETS:
        return (
            "A and B are the widgets of the node that it was made for (4 and 1 unless changed), a and b half of them; write "
            "the numbers"
        )
    return "X is a number beside the vector in the web UI (x=); write the numbers"


def _lengths(layout: str | None = None, base_model: str | None = None) -> str:
    if layout is not None and layout in LAYOUTS:
        return f"the block layout {layout!r} has {len(LAYOUTS[layout])}"
    own = families_in(base_model)
    names = [name for name in LAYOUTS if name.rpartition(" ")[0] in own] or list(SHARED)
    *most, last = sorted({len(LAYOUTS[name]) for name in names})
    return f"vectors{' of ' + (base_model or '') if own else ''} have {', '.join(map(str, most))}{' or ' * bool(most)}{last}"


def _others(base_model: str | None, *families: str) -> bool:
    """Whether a file is for other families than these."""
    known = families_in(base_model)
    return bool(known) and not known & set(families)


def _layout_of(entries: int, base_model: str | None) -> str:
    found = [name for name in LAYOUTS if name.endswith(f" {entries}")]
    own = [name for name in found if name.rpartition(" ")[0] in families_in(base_model)]
    found = own or [name for name in found if name in SHARED] or found
    if len({LAYOUTS[name] for name in found}) == 1:
        return found[0]
    raise InvalidInputError(
        f"a block vector of {entries} number{'s' * (entries != 1)} is "
        + (
            f"ambiguous: say which of {', '.join(found)}"
            if found
            else f"of no known kind: {_lengths(base_model=base_model)}; name blocks in a selector, such as 'all: 0, block3: 0.5'"
        )
    )


def _by_groups(text: str) -> Selector:
    """Inspire's ``%default=0.5,base=1,in=0,out=1``: all, what is in no block, and whole groups of blocks."""
    default, base, groups = 1.0, None, dict[str, float]()
    for item in filter(None, map(str.strip, text.replace("\n", ",").split(","))):
        name, written = halves(item) or (item, "")
        name, value = name.lower(), number(written)
        if name.rstrip("0123456789-") in _KINDS and name not in _KINDS:
            raise InvalidInputError(
                f"{quoted(item)} counts the blocks that the file has (Inspire's way); name blocks in a selector, such as "
                f"'all: {default:g}, in4: 0.5', or write whole groups: {', '.join(_KINDS)}"
            )
        if value is None or name not in ("default", "base", *_KINDS):
            raise InvalidInputError(
                f"cannot read {quoted(item)} in a block vector by groups; write for example '%default=0.5,base=1,in=0,out=1'"
            )
        if name == "default":
            default = value
        elif name == "base":
            base = value
        else:
            groups[name] = value
    rules = [Rule("all", default), Rule("base", default if base is None else base)]
    return Selector((*rules, *(Rule(f"unet {kind}*", value) for kind, value in groups.items())))
