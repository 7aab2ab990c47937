"""Where and how much, in words: ``all: 0, out3-5: 0.8, attn2 k: 0, *proj_in: 1``. Later entries win.

One language for strength and for what is trained. An entry names layers by one or more terms, all of which must hold:

- blocks, with a number, a range, ``*`` or nothing for all of them; ``base`` is what is in none.

  | model | blocks |
  |---|---|
  | UNets | ``in4``, ``in1-3``, ``mid``, ``mid0``, ``out*`` |
  | Flux, Flux.2, Chroma, HunyuanVideo, AuraFlow, HiDream | ``double0-18``, ``single*`` |
  | SD3 | ``joint0`` |
  | Z-Image, Lumina 2 | ``layers0-29``, ``noise_refiner0``, ``context_refiner*`` (Z-Image also ``siglip_refiner*``) |
  | Qwen-Image, Wan, Anima, Krea 2, PixArt, LTX-Video, unknown ones | ``block3`` |

  Beside them Chroma has ``guidance*``, HunyuanVideo ``refiner*``, HiDream ``caption*``, Wan ``vace*``, Anima ``adapter*`` and Krea 2
  ``layerwise*`` and ``refiner*``;
- layer types ``attn``, ``q``, ``k``, ``v``, ``out`` (the projection), ``ff``, ``mod`` (modulations of transformers), ``proj`` (in and out of
  a transformer), ``resnet``, ``conv``, ``linear``, ``norm``, ``sampler``; where there are two attentions ``attn1`` or ``self``, ``attn2`` or
  ``cross`` (UNets, Wan, Anima, PixArt, LTX-Video); where picture and text have layers of their own ``img``, ``txt`` (double and
  joint blocks, Qwen-Image, refiners);
- parts ``denoiser`` or ``unet`` (the same), ``te``, ``te1``, ``te2``, ``te3``; ``all``;
- a glob of the whole name of a layer, in diffusers or in its own model: ``*.attn2.to_k``, ``*proj_in``, ``up_blocks.?.resnets.*``.

A fused layer (``attn.qkv``, Flux's ``linear1``) is what the other form of the model keeps apart: ``k: 0`` acts on its own rows.

``re:…`` of older graphs is read as the globs that it means; a graph may hold no other regular expression.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..entries import MOST, entries, halves, number
from ..errors import InvalidInputError, quoted
from ..models import block_words, type_words
from .by_rows import Share
from .globs import Glob, globs_of
from .targets import Target

Test = Callable[[Target], bool]
MOST_GLOBS = 32
"""Globs of one selector: each is compared with every name of a model."""

BLOCK_WORDS = block_words()
"""What blocks are called, before their numbers."""
_BLOCK = re.compile(
    rf"({'|'.join(sorted(BLOCK_WORDS, key=len, reverse=True))})(?:(\*)|([0-9]{{1,4}})(?:-([0-9]{{1,4}}))?)?"
)


_EXAMPLES = ", ".join([f"{word}*" for word in BLOCK_WORDS if word not in ("in", "mid", "out")][:7])
"""Enough to see the form: a message is one sentence, and Inspect LoRA names a file's own."""


def _has_word(word: str) -> Test:
    return lambda target: word in target.words


TYPES: dict[str, Test] = {
    "all": lambda t: True,
    "denoiser": lambda t: t.component == "denoiser",
    "unet": lambda t: t.component == "denoiser",  # as graphs and texts of before say
    "te": lambda t: t.component != "denoiser",
    "te1": lambda t: t.component == "te1",
    "te2": lambda t: t.component == "te2",
    "te3": lambda t: t.component == "te3",
    "base": lambda t: t.block == "base" or t.component != "denoiser",
    **{word: _has_word(word) for word in type_words()},
    "conv": lambda t: len(t.shape) > 2,
    "linear": lambda t: len(t.shape) == 2,
    "norm": lambda t: len(t.shape) == 1,
}
"""What every word asks of a layer; those of a layer's kind are said by the model's family (``models/``)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry: its words as they were written, and the factor."""

    where: str
    factor: float


@dataclass(frozen=True, slots=True)
class Selector:
    """Factor of every layer: that of the last rule that matches, else 1."""

    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if len(self.rules) > MOST:
            raise InvalidInputError(f"the selector has {len(self.rules):,} entries; at most {MOST:,} can be used")
        for rule in self.rules:
            if not math.isfinite(rule.factor):
                raise InvalidInputError(
                    f"the factor of {quoted(rule.where)} is {rule.factor}, which is not a finite number"
                )
        if sum(len(_globs(word)) for word in _tests(self.rules)) > MOST_GLOBS:
            raise InvalidInputError(f"the selector has more than {MOST_GLOBS} globs; write blocks and layer types")

    def factor(self, target: Target) -> float:
        """Factor of one layer."""
        return self.factors((target,))[0]

    def factors(self, targets: Iterable[Target]) -> list[float]:
        """Factors of many layers, in their order; of a fused one the largest that a part has."""
        return [max((share.factor for share in shares), key=abs) for shares in self.shares(targets)]

    def shares(self, targets: Iterable[Target]) -> list[tuple[Share, ...]]:
        """Factors by rows: one share of all rows, or one for every part of a fused layer whose parts have different ones."""
        tests, rules = _tests(self.rules), [(_words(rule), rule.factor) for rule in reversed(self.rules)]

        def of(target: Target) -> float:
            seen = _Seen(tests, target)
            return next((factor for words, factor in rules if all(map(seen, words))), 1.0)

        found: list[tuple[Share, ...]] = []
        for target in targets:
            rows = target.shape[0] if target.shape else 1
            apart = [Share(part.start, part.length, of(piece)) for part, piece in target.apart()]
            same = len({share.factor for share in apart}) < 2
            whole = apart[0].factor if apart else None
            found.append((Share(0, rows, of(target) if whole is None else whole),) if same else tuple(apart))
        return found

    def chosen(self, targets: Iterable[Target]) -> list[Target]:
        """Those with a factor other than 0: what a training with this selector trains."""
        listed = list(targets)
        return [t for t, factor in zip(listed, self.factors(listed), strict=True) if factor != 0]

    def unmatched(self, targets: Iterable[Target]) -> list[str]:
        """Rules that match no layer, for a warning: most often a block that this model does not have."""
        tests, lost = _tests(self.rules), [(_words(rule), rule.where) for rule in self.rules]
        for target in targets:
            for piece in [piece for _, piece in target.apart()] or [target]:
                seen = _Seen(tests, piece)
                lost = [(words, where) for words, where in lost if not all(map(seen, words))]
        return [where for _, where in lost]

    def table(self, targets: Iterable[Target]) -> str:
        """What it resolves to: one line per block, with the layers of every factor counted, parts of fused layers as layers."""
        listed = list(targets)
        blocks: dict[str, dict[float, int]] = {}
        for target, shares in zip(listed, self.shares(listed), strict=True):
            counts = blocks.setdefault(target.block, {})
            for share in shares:
                counts[share.factor] = counts.get(share.factor, 0) + 1
        width = max((len(block) for block in blocks), default=0)
        width = max(width, 10)
        lines = [f"  {'block':<{width}} factor × layers"]
        for block in sorted(blocks, key=block_order):
            cells = ", ".join(f"{factor:g} × {count}" for factor, count in sorted(blocks[block].items(), reverse=True))
            lines.append(f"  {block:<{width}} {cells}")
        return "\n".join(lines)


def parse_selector(text: str) -> Selector:
    """Read ``all: 0, out3-5: 0.8`` (commas, semicolons or lines, ``:`` or ``=``, ``#`` comments). A bare entry counts as 1.

    Raises InvalidInputError for a text of another form, of more than 10,000 characters or 500 entries.
    """
    return Selector(tuple(Rule(*_entry(entry)) for entry in entries(text.replace(";", ","), "the selector")))


def _entry(entry: str) -> tuple[str, float]:
    where, written = halves(entry) or (entry, "1")
    factor = number(written)
    if factor is None and "re:" in entry:  # the colon is that of an expression without a factor
        where, factor = entry, 1.0
    if not where:
        raise InvalidInputError(
            f"cannot read {quoted(entry)} in the selector; write entries such as 'all: 0', 'in4: 0.5', 'attn2 k: 1.2'"
        )
    if factor is None:
        raise InvalidInputError(
            f"the factor of {quoted(where)} in the selector is {quoted(written)}, which is no finite number such as 0.5"
        )
    return where, factor


class _Seen:
    """Which words hold for one target, each asked once however many rules have it."""

    def __init__(self, tests: dict[str, Test], target: Target) -> None:
        self._tests, self._target = tests, target
        self._known: dict[str, bool] = {}

    def __call__(self, word: str) -> bool:
        if word not in self._known:
            self._known[word] = self._tests[word](self._target)
        return self._known[word]


def _words(rule: Rule) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rule.where.split()))


def _tests(rules: Iterable[Rule]) -> dict[str, Test]:
    """What every word of the rules asks."""
    tests: dict[str, Test] = {}
    for rule in rules:
        tests |= {word: _test(word, rule.where) for word in _words(rule) if word not in tests}
    return tests


def _test(word: str, where: str) -> Test:
    name = word.lower()
    # "out" alone is the attention's output projection; the output blocks are out* or out0-11
    if name in TYPES:
        return TYPES[name]
    match = _BLOCK.fullmatch(name)
    if match is not None:
        return _in_block(match[1], match[3], match[4])
    globs = _globs(word)
    if globs:
        return _named(globs)
    if number(word) is not None:
        raise InvalidInputError(
            f"{quoted(word)} stands alone in the selector entry {quoted(where)}; write where it acts and a colon, as in "
            "'in4: 0.5'"
        )
    raise InvalidInputError(
        f"unknown word {quoted(word)} in the selector entry {quoted(where)}; use blocks (in4, mid, out3-5 in UNets, "
        f"{_EXAMPLES} in transformers), types ({', '.join(TYPES)}) or a glob of a layer's name such as *proj_in"
    )


def _globs(word: str) -> tuple[Glob, ...]:
    """What a word says about names: nothing if it is a block, a type or unknown."""
    if word.startswith("re:"):
        globs = globs_of(word[3:])
        if globs is None:
            raise InvalidInputError(
                f"{quoted(word[3:])} is not a regular expression that is a glob, and a selector takes no other; write the "
                "layer's whole name with * for any characters, ? for one and [0-9] for one of some: *.attn2.to_k, *proj_in"
            )
        return globs
    plain = number(word) is not None or _BLOCK.fullmatch(word.lower()) is not None
    return () if plain or not any(c in word for c in "*?[.") else (Glob.parse(word),)


def _named(globs: Sequence[Glob]) -> Test:
    def named(target: Target) -> bool:
        names = (target.label,) if target.path == target.label else (target.label, target.path)
        return any(glob.matches(name) for glob in globs for name in names)

    return named


def _in_block(kind: str, first: str | None, last: str | None) -> Test:
    numbers = None if first is None else range(int(first), int(last or first) + 1)

    def in_block(target: Target) -> bool:
        if target.component != "denoiser":
            return False
        own, at = _split_block(target.block)
        return own == kind and at is not None and (numbers is None or at in numbers)

    return in_block


@lru_cache(maxsize=1024)
def _split_block(block: str) -> tuple[str, int | None]:
    """``in4`` as its kind and number."""
    kind = block.rstrip("0123456789")
    return kind, int(block[len(kind) :]) if len(kind) < len(block) else None


def block_order(block: str) -> tuple[int, int]:
    """What blocks are sorted by: parts of no block first, then as the model runs."""
    order = (
        "base",
        "te1",
        "te2",
        "te3",
        "in",
        "down",
        "mid",
        "out",
        "up",
        *BLOCK_WORDS,
    )  # down, up: UNets of unknown size
    kind, at = (block, None) if block in order else _split_block(block)
    return (order.index(kind) if kind in order else len(order), at or 0)
