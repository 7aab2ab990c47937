"""Where and how much, in words: ``all: 0, out3-5: 0.8, attn2 k: 0, re:proj_in$: 1``. Later entries win.

One language for strength and for what is trained. An entry names layers by one or more terms, all of which must hold:

- blocks ``in4``, ``in1-3``, ``mid``, ``mid0``, ``out*``, ``double*``, ``single3-7``, ``joint0``, ``base`` (what is in no block);
- layer types ``attn``, ``attn1`` (self), ``attn2`` (cross), ``q``, ``k``, ``v``, ``out`` (the projection), ``ff``, ``proj``
  (in and out of a transformer), ``resnet``, ``conv``, ``linear``, ``norm``, ``sampler``;
- parts ``unet``, ``te``, ``te1``, ``te2``, ``te3``; ``all``;
- ``re:…`` a regular expression searched in the module's diffusers name and in its own (no commas or colons in it).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import InvalidInputError
from .targets import Target

Test = Callable[[Target], bool]
_BLOCK = re.compile(r"^(in|mid|out|double|single|joint|block)(?:(\*)|(\d+)(?:-(\d+))?)?$")
_FUSED = (".qkv", ".linear1")


def _has(target: Target, *parts: str) -> bool:
    return any(part in f".{target.label}." for part in parts)


def _ends(target: Target, *names: str) -> bool:
    return target.label.rsplit(".", 1)[-1] in names


def _attention(target: Target) -> bool:
    return _has(target, ".attn.", ".attn1.", ".attn2.", ".self_attn.", ".img_attn.", ".txt_attn.", "_block.attn")


TYPES: dict[str, Test] = {
    "all": lambda t: True,
    "unet": lambda t: t.component == "unet",
    "te": lambda t: t.component != "unet",
    "te1": lambda t: t.component == "te1",
    "te2": lambda t: t.component == "te2",
    "te3": lambda t: t.component == "te3",
    "base": lambda t: t.block == "base" or t.component != "unet",
    "attn": _attention,
    "attn1": lambda t: _has(t, ".attn1."),
    "attn2": lambda t: _has(t, ".attn2."),
    "q": lambda t: _attention(t) and (_ends(t, "to_q", "q_proj", "add_q_proj") or t.label.endswith(_FUSED)),
    "k": lambda t: _attention(t) and (_ends(t, "to_k", "k_proj", "add_k_proj") or t.label.endswith(_FUSED)),
    "v": lambda t: _attention(t) and (_ends(t, "to_v", "v_proj", "add_v_proj") or t.label.endswith(_FUSED)),
    "out": lambda t: _attention(t) and (_has(t, ".to_out.0.", ".to_add_out.") or _ends(t, "out_proj", "proj")),
    "ff": lambda t: _has(t, ".ff.", ".ff_context.", ".mlp.", ".img_mlp.", ".txt_mlp.", ".proj_mlp."),
    "proj": lambda t: _ends(t, "proj_in", "proj_out"),
    "resnet": lambda t: _has(t, ".resnets."),
    "sampler": lambda t: _has(t, ".downsamplers.", ".upsamplers."),
    "conv": lambda t: len(t.shape) > 2,
    "linear": lambda t: len(t.shape) == 2,
    "norm": lambda t: len(t.shape) == 1,
}


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
        for rule in self.rules:
            if not math.isfinite(rule.factor):
                raise InvalidInputError(f"the factor of {rule.where!r} is {rule.factor}, which is not a finite number")
            _tests(rule.where)

    def factor(self, target: Target) -> float:
        """Factor of one layer."""
        return self.factors((target,))[0]

    def factors(self, targets: Iterable[Target]) -> list[float]:
        """Factors of many layers, in their order."""
        compiled = [(_tests(rule.where), rule.factor) for rule in reversed(self.rules)]
        return [
            next((factor for tests, factor in compiled if all(test(target) for test in tests)), 1.0)
            for target in targets
        ]

    def chosen(self, targets: Iterable[Target]) -> list[Target]:
        """Those with a factor other than 0: what a training with this selector trains."""
        listed = list(targets)
        return [t for t, factor in zip(listed, self.factors(listed), strict=True) if factor != 0]

    def unmatched(self, targets: Iterable[Target]) -> list[str]:
        """Rules that match no layer, for a warning: most often a block that this model does not have."""
        listed = list(targets)
        return [r.where for r in self.rules if not any(all(test(t) for test in _tests(r.where)) for t in listed)]

    def table(self, targets: Iterable[Target]) -> str:
        """What it resolves to: one line per block, with the layers of every factor counted."""
        listed = list(targets)
        blocks: dict[str, dict[float, int]] = {}
        for target, factor in zip(listed, self.factors(listed), strict=True):
            counts = blocks.setdefault(target.block, {})
            counts[factor] = counts.get(factor, 0) + 1
        lines = [f"  {'block':<10} factor × layers"]
        for block in sorted(blocks, key=_block_order):
            cells = ", ".join(f"{factor:g} × {count}" for factor, count in sorted(blocks[block].items(), reverse=True))
            lines.append(f"  {block:<10} {cells}")
        return "\n".join(lines)


def parse_selector(text: str) -> Selector:
    """Read ``all: 0, out3-5: 0.8`` (commas or lines, ``:`` or ``=``, ``#`` comments). A bare entry counts as 1."""
    rules: list[Rule] = []
    for line in text.splitlines():
        for entry in line.split("#")[0].split(","):
            if not entry.strip():
                continue
            where, factor = _entry(entry.strip())
            rules.append(Rule(where, factor))
    return Selector(tuple(rules))


def _entry(entry: str) -> tuple[str, float]:
    match = re.match(r"^(?P<where>.*?)\s*(?:[:=]\s*(?P<factor>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))?\s*$", entry)
    where = match["where"].strip() if match else ""
    if not where:
        raise InvalidInputError(
            f"cannot read {entry!r} in the selector; write entries such as 'all: 0', 'in4: 0.5', 'attn2 k: 1.2'"
        )
    return where, 1.0 if match is None or match["factor"] is None else float(match["factor"])


def _tests(where: str) -> list[Test]:
    return [_test(word, where) for word in where.split()]


def _test(word: str, where: str) -> Test:
    if word.startswith("re:"):
        try:
            pattern = re.compile(word[3:])
        except re.error as error:
            raise InvalidInputError(f"{word[3:]!r} is not a regular expression: {error}") from None
        return lambda t: pattern.search(t.label) is not None or pattern.search(t.path) is not None
    name = word.lower()
    # "out" alone is the attention's output projection; the output blocks are out* or out0-11
    if name in TYPES:
        return TYPES[name]
    match = _BLOCK.match(name)
    if match is None:
        raise InvalidInputError(
            f"unknown word {word!r} in the selector entry {where!r}; use blocks (in4, mid, out3-5, double*, single7, "
            f"joint0), types ({', '.join(TYPES)}) or re:<regular expression>"
        )
    kind, first, last = match[1], match[3], match[4]
    numbers = None if first is None else range(int(first), int(last or first) + 1)

    def in_block(target: Target) -> bool:
        found = re.fullmatch(r"([a-z]+)(\d+)", target.block) if target.component == "unet" else None
        return found is not None and found[1] == kind and (numbers is None or int(found[2]) in numbers)

    return in_block


def _block_order(block: str) -> tuple[int, int]:
    order = ["base", "te1", "te2", "te3", "in", "mid", "out", "joint", "double", "single", "block"]
    match = re.fullmatch(r"([a-z]+?)(\d*)", block)
    kind, number = (match[1], match[2]) if match and block not in order else (block, "")
    return (order.index(kind) if kind in order else len(order), int(number or 0))
