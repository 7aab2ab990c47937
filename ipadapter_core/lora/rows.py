"""LoRAs in rows, as a widget and API users write them: a JSON list with a table for each row.

```python
from ipadapter_core.lora.rows import parse_rows

rows = parse_rows('[{"file": "style.safetensors", "strength": 0.8}, {"file": "cat.safetensors", "on": false}]')
print(rows[0].strength, rows[1].on)
```

Rows of rgthree's Power Lora Loader are read too, with its words ``lora`` and ``strengthTwo``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import CorruptFileError, InvalidInputError, quoted
from ..files.text import check_length, parse_json
from ..narrowing import is_list, is_row, is_table

MOST_ROWS = 200
"""Rows of one node; artists have some ten."""

LONGEST = 100_000
"""Characters of the text of all rows."""

STRONGEST = 20.0
"""Most strength of a row, as of every LoRA node."""

EXAMPLE = '[{"file": "style.safetensors", "strength": 0.8}]'

_WORDS = {"lora": "file", "strengthTwo": "text_strength"}
"""rgthree's words and ours."""


@dataclass(frozen=True, slots=True)
class LoRARow:
    """One LoRA: its name in the list, strengths on the model and on the text encoders (None: the same), where, and whether."""

    file: str
    strength: float = 1.0
    text_strength: float | None = None
    selector: str = ""
    on: bool = True

    @property
    def strengths(self) -> tuple[float, float]:
        """On the model and on the text encoders."""
        return self.strength, self.strength if self.text_strength is None else self.text_strength

    @property
    def acts(self) -> bool:
        """Whether the row changes anything."""
        return self.on and any(self.strengths)


def parse_rows(text: str) -> tuple[LoRARow, ...]:
    """Read rows from a JSON list such as the module's example; an empty text has none, rows without a file are left out.

    Raises InvalidInputError in one sentence for anything else, with the number of the row.
    """
    if not check_length(text, "the rows", LONGEST).strip():
        return ()
    try:
        found = parse_json(text, "rows")
    except CorruptFileError as error:
        raise InvalidInputError(f"the rows are no JSON list ({error}); write {EXAMPLE}") from None
    if not is_list(found):
        raise InvalidInputError(f"the rows are {quoted(text)}; a JSON list was expected, such as {EXAMPLE}")
    rows = (_row(number, value) for number, value in enumerate(_few(found), 1))
    return tuple(row for row in rows if row is not None)


def parse_stack(stack: object) -> tuple[LoRARow, ...]:
    """Rows of a ``LORA_STACK`` of other packs: (name or path, strength on the model, on the text encoders) each.

    Raises InvalidInputError for anything else.
    """
    if not is_row(stack):
        raise InvalidInputError(
            f"lora_stack is a {type(stack).__name__}; a list of (name, strength, text strength) was expected"
        )
    rows: list[LoRARow] = []
    for number, entry in enumerate(_few(stack), 1):
        values = entry if is_row(entry) else ()
        if len(values) != 3 or not isinstance(values[0], str):
            raise InvalidInputError(
                f"entry {number} of lora_stack is {quoted(entry)}; (name, strength, text strength) was expected"
            )
        if values[0] not in ("", "None", "none"):
            what = f"entry {number} of lora_stack"
            strength, on_text = (_number(what, "strength", value) for value in values[1:])
            rows.append(LoRARow(values[0], strength, on_text))
    return tuple(rows)


def stack_of(rows: Iterable[LoRARow]) -> list[tuple[str, float, float]]:
    """The rows that act as a ``LORA_STACK`` for other packs; it has no place for selectors."""
    return [(row.file, *row.strengths) for row in rows if row.acts]


def _few(found: object) -> list[object]:
    entries = list(found) if is_row(found) else []
    if len(entries) > MOST_ROWS:
        raise InvalidInputError(f"there are {len(entries):,} rows; at most {MOST_ROWS:,} can be used")
    return entries


def _row(number: int, value: object) -> LoRARow | None:
    """A row; None for one without a file."""
    what = f"row {number}"
    if not is_table(value):
        raise InvalidInputError(f"{what} is {quoted(value)}; a table such as {EXAMPLE[1:-1]} was expected")
    given = {_WORDS.get(name, name): entry for name, entry in value.items()}
    file, selector, on = given.get("file"), given.get("selector", ""), given.get("on", True)
    if file in (None, "", "None", "none"):
        return None
    if not isinstance(file, str) or not isinstance(selector, str):
        raise InvalidInputError(
            f"{what} has {quoted(file)} for its file and {quoted(selector)} for its selector; texts were expected"
        )
    if not isinstance(on, bool):
        raise InvalidInputError(f"{what} has on: {quoted(on)}; true or false was expected")
    text_strength = given.get("text_strength")
    return LoRARow(
        file,
        _number(what, "strength", given.get("strength", 1.0)),
        None if text_strength is None else _number(what, "text_strength", text_strength),
        selector,
        on,
    )


def _number(what: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= STRONGEST:
        raise InvalidInputError(
            f"{what} has {name}: {quoted(value)}; a number in -{STRONGEST:g}..{STRONGEST:g} was expected"
        )
    return float(value)
