"""Patterns of module names in PEFT's configs, matched as PEFT does and in a time that the file cannot stretch.

PEFT takes the first pattern of a table for which ``re.match(r"(.*\\.)?(PATTERN)$", name)`` finds something. Expressions of
strangers' files never reach ``re``, whose time can grow exponentially with a few characters: they become an automaton that
is in all its states at once (Thompson, Regular expression search algorithm, CACM 11, 1968), so a name takes at most its
length times the states. Names written as they are, the usual case, are found without it.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from ..errors import CorruptFileError, quoted

MAX_PATTERNS = 5_000
MAX_LENGTH = 500
MAX_STATES = 1_000
MAX_WORK = 10_000_000
"""Patterns of a table, characters of one, states of its automaton, and steps taken for a file: a state made counts as 100."""

Test = Callable[[str], bool]

_CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_PLAIN = frozenset(string.ascii_letters + string.digits + "_-")


@dataclass(slots=True)
class _State:
    """What leads on: a test of one character, or ways without one (``^`` only at the start, ``$`` only at the end)."""

    test: Test | None = None
    out: list[int] = field(default_factory=list[int])
    anchor: str = ""


class NamePatterns:
    """A table of patterns, such as ``alpha_pattern``; ``first`` finds the place of the one that PEFT would take."""

    def __init__(self, patterns: Sequence[str], file: str) -> None:
        self._file = file
        self._work = 0
        if len(patterns) > MAX_PATTERNS:
            raise CorruptFileError(
                f"{file}: its PEFT config has {len(patterns):,} patterns in one table; at most {MAX_PATTERNS:,} can be used"
            )
        # by length, and by the places of dots, which stand for any character and are written as \0
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._automata: list[tuple[int, _Automaton]] = []
        for place, pattern in enumerate(patterns):
            if len(pattern) > MAX_LENGTH:
                raise CorruptFileError(
                    f"{file}: the pattern {quoted(pattern)} of its PEFT config has {len(pattern):,} characters; at most "
                    f"{MAX_LENGTH} can be used"
                )
            plain = _as_written(pattern)
            if plain is None:
                automaton = _Automaton(pattern, file)
                self._automata.append((place, automaton))
                self._count(100 * automaton.size)
            else:
                dots = tuple(i for i, c in enumerate(plain) if c == "\0")
                self._plain.setdefault(len(plain), {}).setdefault(dots, {}).setdefault(plain, place)

    def first(self, name: str) -> int | None:
        """Place of the first pattern that matches a module's name, None if none does."""
        best = self._first_plain(name)
        for place, automaton in self._automata:
            if best is not None and place > best:
                break
            self._count(len(name) * automaton.size)
            if automaton.matches(name):
                return place
        return best

    def _first_plain(self, name: str) -> int | None:
        found: list[int] = []
        starts = [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
        for tail in (name[start:] for start in starts):
            for dots, texts in self._plain.get(len(tail), {}).items():
                self._count(len(tail))
                masked = list(tail)
                for i in dots:
                    masked[i] = "\0" if masked[i] != "\n" else "\n"
                place = texts.get("".join(masked))
                if place is not None:
                    found.append(place)
        return min(found, default=None)

    def _count(self, steps: int) -> None:
        self._work += steps
        if self._work > MAX_WORK:
            raise CorruptFileError(
                f"{self._file}: the patterns of its PEFT config take too long to match with its modules; write module names"
            )


def full_match(pattern: str, name: str, file: str) -> bool:
    """``re.fullmatch`` of one pattern of a config."""
    if len(pattern) > MAX_LENGTH:
        raise CorruptFileError(f"{file}: a pattern of its PEFT config has {len(pattern):,} characters")
    return _Automaton(pattern, file, whole=True).matches(name)


def _as_written(pattern: str) -> str | None:
    """A name, a dot (which stands for any character) as ``\\0``; None if there is more in it than a name."""
    found: list[str] = []
    escaped = False
    for c in pattern:
        if escaped:
            if c in _PLAIN and c not in "-_":
                return None
            found.append(c)
            escaped = False
        elif c == "\\":
            escaped = True
        elif c == ".":
            found.append("\0")
        elif c in _PLAIN:
            found.append(c)
        else:
            return None
    return None if escaped else "".join(found)


class _Automaton:
    """``(.*\\.)?(PATTERN)$`` for one pattern; ``whole``: just ``PATTERN$``."""

    def __init__(self, pattern: str, file: str, *, whole: bool = False) -> None:
        self._pattern, self._file = pattern, file
        self._states: list[_State] = []
        self._at = 0
        self._depth = 0
        body = self._alternatives()
        if self._at < len(pattern):
            self._refuse("a bracket is closed that was not opened")
        begin, end = body
        self._end = self._add(_State())
        self._states[end].out.append(self._end)
        self._begin = begin
        if not whole:  # any characters, then a dot, or nothing
            loop, dot = self._add(_State(test=_any)), self._add(_State(test=lambda c: c == "."))
            way = self._add(_State(out=[loop, dot]))
            self._states[loop].out.append(way)
            self._states[dot].out.append(begin)
            self._begin = self._add(_State(out=[begin, way]))

    @property
    def size(self) -> int:
        return len(self._states)

    def matches(self, name: str) -> bool:
        """Whether it matches all of the name."""
        current = self._reached([self._begin], name, 0)
        for i, c in enumerate(name):
            taken = [state.out[0] for n in current if (state := self._states[n]).test is not None and state.test(c)]
            if not taken:
                return False
            current = self._reached(taken, name, i + 1)
        return self._end in current

    def _reached(self, begin: list[int], name: str, place: int) -> set[int]:
        found: set[int] = set()
        stack = begin
        while stack:
            n = stack.pop()
            if n in found:
                continue
            state = self._states[n]
            if (state.anchor == "^" and place > 0) or (state.anchor == "$" and place < len(name)):
                continue
            found.add(n)
            if state.test is None:
                stack.extend(state.out)
        return found

    # --- parsing: every part is a state where it begins and one where it ends ----------------------------------------

    def _alternatives(self) -> tuple[int, int]:
        parts = [self._sequence()]
        while self._next("|"):
            parts.append(self._sequence())
        begin, end = self._add(_State(out=[first for first, _ in parts])), self._add(_State())
        for _, last in parts:
            self._states[last].out.append(end)
        return begin, end

    def _sequence(self) -> tuple[int, int]:
        begin = end = self._add(_State())
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            start = self._at
            first, last = self._atom()
            first, last = self._repeated(first, last, start)
            self._states[end].out.append(first)
            end = last
        return begin, end

    def _atom(self) -> tuple[int, int]:
        c = self._pattern[self._at]
        self._at += 1
        if c == "(":
            return self._group()
        if c in "^$":
            return self._single(_State(anchor=c))
        if c in "*+?{":
            self._refuse("a repetition has nothing before it")
        if c == "[":
            return self._single(_State(test=self._set()))
        if c == ".":
            return self._single(_State(test=_any))
        if c == "\\":
            test = self._escape()
            return self._single(_State(test=test))
        return self._single(_State(test=_just(c)))

    def _group(self) -> tuple[int, int]:
        if self._next("?") and not self._next(":"):
            self._refuse("of the groups that begin with (? only (?: can be used")
        self._depth += 1
        if self._depth > 20:
            self._refuse("its groups are nested too deep")
        found = self._alternatives()
        self._depth -= 1
        if not self._next(")"):
            self._refuse("a bracket is not closed")
        return found

    def _escape(self) -> Test:
        if self._at >= len(self._pattern):
            self._refuse("it ends in a backslash")
        c = self._pattern[self._at]
        self._at += 1
        if c.lower() in _CLASSES:
            test = _CLASSES[c.lower()]
            return test if c.islower() else (lambda x: not test(x))
        if c.isalnum():
            self._refuse(f"\\{c} cannot be used")
        return _just(c)

    def _set(self) -> Test:
        negated = self._next("^")
        tests: list[Test] = []
        first = True
        while first or not self._next("]"):
            first = False
            if self._at >= len(self._pattern):
                self._refuse("a [ is not closed")
            c = self._pattern[self._at]
            self._at += 1
            if c == "\\":
                tests.append(self._escape())
                continue
            if self._pattern[self._at : self._at + 1] == "-" and self._pattern[self._at + 1 : self._at + 2] not in (
                "]",
                "",
            ):
                last = self._pattern[self._at + 1]
                self._at += 2
                if last == "\\" or last < c:
                    self._refuse("a range of characters cannot be read")
                tests.append(_range(c, last))
            else:
                tests.append(_just(c))
        return lambda x: any(test(x) for test in tests) != negated

    def _repeated(self, first: int, last: int, start: int) -> tuple[int, int]:
        c = self._pattern[self._at : self._at + 1]
        if c not in ("*", "+", "?", "{"):
            return first, last
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(c, (0, None))
        stop = self._at
        self._at += 1
        if c == "{":
            low, high = self._counts()
        self._next("?")  # fewest first: which names match is the same
        if self._pattern[self._at : self._at + 1] in ("*", "+", "?", "{") and self._at > stop:
            self._refuse("a repetition is repeated")
        after = self._at
        copies = [(first, last)]
        for _ in range(max(low, high or 0, 1) - 1):  # a state machine cannot count: it has the part that often
            self._at = start
            copies.append(self._atom())
        self._at = after
        begin, end = self._add(_State()), self._add(_State())
        before = begin
        for i, (head, tail) in enumerate(copies):
            self._states[before].out.append(head)
            if i >= low:
                self._states[before].out.append(end)
            before = tail
        if high is None:
            self._states[before].out.append(copies[-1][0])
        self._states[before].out.append(end)
        if high == 0:
            return (empty := self._add(_State())), empty
        return begin, end

    def _counts(self) -> tuple[int, int | None]:
        close = self._pattern.find("}", self._at)
        low, comma, high = self._pattern[self._at : close].partition(",") if close > 0 else ("", "", "")
        numbers = [part for part in (low, high) if part]
        if not numbers or any(not (p.isascii() and p.isdigit() and len(p) < 4) for p in numbers):
            self._refuse("a {…} cannot be read")
        self._at = close + 1
        least = int(low or 0)
        most = least if not comma else (int(high) if high else None)
        if most is not None and most < least:
            self._refuse("a {…} cannot be read")
        return least, most

    def _single(self, state: _State) -> tuple[int, int]:
        end = self._add(_State())
        state.out.append(end)
        return self._add(state), end

    def _add(self, state: _State) -> int:
        if len(self._states) >= MAX_STATES:
            self._refuse(f"it has more than {MAX_STATES:,} states")
        self._states.append(state)
        return len(self._states) - 1

    def _next(self, c: str) -> bool:
        found = self._pattern[self._at : self._at + 1] == c
        self._at += found
        return found

    def _refuse(self, why: str) -> NoReturn:
        raise CorruptFileError(
            f"{self._file}: the pattern {quoted(self._pattern)} of its PEFT config cannot be used ({why}); write a module's "
            "name, or an expression of letters, dots, sets, groups and repetitions"
        )


def _any(c: str) -> bool:
    return c != "\n"


def _just(c: str) -> Test:
    return lambda x: x == c


def _range(first: str, last: str) -> Test:
    return lambda x: first <= x <= last
