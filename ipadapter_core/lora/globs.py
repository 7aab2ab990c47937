"""Globs of layer names, matched in time linear in the name: no backtracking whatever the pattern is.

The states are the bits of one integer (the shift-and algorithm of Baeza-Yates and Gonnet, CACM 35(10), 1992).
"""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_ALTERNATIVES = 16
"""Globs that one regular expression of an older graph may stand for."""

LONGEST_EXPRESSION = 200
"""Characters of such an expression; names of layers have about 70."""


@dataclass(frozen=True, slots=True)
class _One:
    """One character: of a set or, negated, of none of it. Ranges are inclusive."""

    ranges: tuple[tuple[str, str], ...]
    negated: bool = False

    def accepts(self, c: str) -> bool:
        return any(low <= c <= high for low, high in self.ranges) != self.negated


_ANY = _One((), negated=True)


@dataclass(frozen=True, slots=True)
class Glob:
    """A pattern for a whole name: ``*`` any characters, ``?`` one, ``[abc]``, ``[0-9]`` one of these, ``[!abc]`` of no these.

    As Python's ``fnmatchcase`` reads it (a range from high to low is empty).
    """

    text: str
    items: tuple[_One, ...]
    stars: int
    """Bit i: any characters may stand before item i."""
    literal: str
    """The longest run of plain characters, for names that cannot match."""
    _accepting: dict[str, int] = field(default_factory=dict[str, int], compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> Glob:
        """Read a pattern. Every text is one."""
        items: list[_One] = []
        stars, run, literal, at = 0, "", "", 0
        while at < len(text):
            c, at = text[at], at + 1
            end = _class_end(text, at) if c == "[" else -1
            if c == "*":
                stars |= 1 << len(items)
            elif c == "?":
                items.append(_ANY)
            elif end >= 0:
                items.append(_class(text[at:end]))
                at = end + 1
            else:
                items.append(_One(((c, c),)))
                run += c
                literal = max(literal, run, key=len)
                continue
            run = ""
        return cls(text, tuple(items), stars, literal)

    def matches(self, name: str) -> bool:
        """Whether the whole name is of this pattern."""
        if len(self.items) > len(name) or self.literal not in name:
            return False
        state = 1  # bit i: the name so far is of the pattern's first i items
        for c in name:
            state = (state & self._items_for(c)) << 1 | state & self.stars
            if not state:
                return False
        return bool(state >> len(self.items) & 1)

    def _items_for(self, c: str) -> int:
        """Bit i: item i accepts the character. Kept: names have few different ones."""
        if c not in self._accepting:
            self._accepting[c] = sum(1 << i for i, item in enumerate(self.items) if item.accepts(c))
        return self._accepting[c]


def _class_end(text: str, at: int) -> int:
    """Where the ``]`` of a set that begins at ``at`` stands; -1 if none does: then ``[`` is a character."""
    at += text[at : at + 1] == "!"
    return text.find("]", at + (text[at : at + 1] == "]"))


def _class(content: str) -> _One:
    negated = content.startswith("!")
    content = content[negated:]
    ranges: list[tuple[str, str]] = []
    at = 0
    while at < len(content):
        wide = content[at + 1 : at + 2] == "-" and at + 2 < len(content)
        ranges.append((content[at], content[at + 2 * wide]))
        at += 3 if wide else 1
    return _One(tuple(ranges), negated)


# --- regular expressions of older graphs ---------------------------------------------------------------------------------


def globs_of(expression: str) -> tuple[Glob, ...] | None:
    """The globs that together match the names in which ``re.search(expression, name)`` finds something.

    None where that takes more than globs: repeated characters, nested groups, look-around. Exact for names of ASCII
    characters on one line, as those of layers are.
    """
    if len(expression) > LONGEST_EXPRESSION:
        return None
    found: list[str] = []
    for branch in _alternatives(expression):
        start, end = branch.startswith("^"), branch.endswith("$") and not branch.endswith("\\$")
        texts = _sequence(branch[start : len(branch) - end])
        if texts is None or len(found) + len(texts) > MOST_ALTERNATIVES:
            return None
        found += [("" if start else "*") + text + ("" if end else "*") for text in texts]
    return tuple(map(Glob.parse, found))


def _alternatives(expression: str) -> list[str]:
    """What stands between the ``|`` outside of groups and sets."""
    parts, depth, escaped = [""], 0, False
    for c in expression:
        if c == "|" and not depth and not escaped:
            parts.append("")
            continue
        parts[-1] += c
        depth += 0 if escaped else (c in "([") - (c in ")]")
        escaped = c == "\\" and not escaped
    return parts


def _sequence(expression: str, within_group: bool = False) -> list[str] | None:
    """Globs, not anchored, for an expression without ``|`` and anchors."""
    texts, at = [""], 0
    while at < len(expression):
        c, rest = expression[at], expression[at + 1 :]
        options: list[str] | None
        if c == "." and rest[:1] in ("*", "+"):
            options, taken = ["*" if rest[0] == "*" else "?*"], 3 if rest[1:2] == "?" else 2
        elif c == ".":
            options, taken = ["?"], 1
        elif c == "\\":
            options, taken = _escaped(rest[:1]), 2
        elif c == "[":
            options, taken = _set(rest)
        elif c == "(" and not within_group:
            options, taken = _group(rest)
        else:
            options, taken = None if c in "*+?{}()|^$]" else [c], 1
        at += taken
        if options is None or len(texts) * len(options) > MOST_ALTERNATIVES or expression[at : at + 1] in tuple("*+?{"):
            return None
        texts = [text + option for text in texts for option in options]
    return texts


def _escaped(c: str) -> list[str] | None:
    if c == "d":
        return ["[0-9]"]
    if not c or c.isalnum() or not c.isascii():
        return None
    return [f"[{c}]" if c in "*?[" else c]


def _set(rest: str) -> tuple[list[str] | None, int]:
    """A set of letters, digits, ``_`` and ``.``, the only ones that names have."""
    content, closed, _ = rest.partition("]")
    plain = content.removeprefix("^")
    ranges = _class(plain).ranges
    known = closed and plain and all(c.isascii() and (c.isalnum() or c in "_.-") for c in plain)
    if not known or plain[0] == "-" or plain[-1] == "-" or any(a > b or a == "-" for a, b in ranges):
        return None, 1
    return [f"[{'!' if plain != content else ''}{plain}]"], len(content) + 2


def _group(rest: str) -> tuple[list[str] | None, int]:
    content, closed, _ = rest.partition(")")
    found: list[str] = []
    for branch in _alternatives(content.removeprefix("?:")):
        texts = _sequence(branch, within_group=True) if closed else None
        if texts is None:
            return None, 1
        found += texts
    return found, len(content) + 2
