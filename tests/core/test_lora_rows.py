"""LoRAs in rows: what a widget writes, what rgthree's node had, what other packs send."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipadapter_core import InvalidInputError
from ipadapter_core.lora.rows import LoRARow, parse_rows, parse_stack, stack_of


def test_rows_are_read_with_what_they_leave_out() -> None:
    text = '[{"file": "a"}, {"file": "b", "on": false, "strength": -0.5, "text_strength": 0, "selector": "in4: 0"}, {"file": ""}]'
    assert parse_rows(text) == (LoRARow("a"), LoRARow("b", -0.5, 0.0, "in4: 0", False))
    assert parse_rows("") == parse_rows("  []\n") == ()


def test_rows_of_rgthrees_loader_are_read() -> None:
    rows = [
        {"on": True, "lora": "x.safetensors", "strength": 0.7, "strengthTwo": None},
        {"on": True, "lora": "None", "strength": 1},
    ]
    assert parse_rows(json.dumps(rows)) == (LoRARow("x.safetensors", 0.7),)
    rows[0]["strengthTwo"] = 0.2
    assert parse_rows(json.dumps(rows))[0].strengths == (0.7, 0.2)


def test_rows_that_change_nothing_do_not_act() -> None:
    assert [row.acts for row in (LoRARow("a"), LoRARow("a", on=False), LoRARow("a", 0), LoRARow("a", 0, 1.0))] == [
        True,
        False,
        False,
        True,
    ]


def test_stacks_go_out_as_they_come_in() -> None:
    stack = [("a.safetensors", 0.5, 0.25), ["b", 1, 1.0]]
    rows = parse_stack(stack)
    assert rows == (LoRARow("a.safetensors", 0.5, 0.25), LoRARow("b", 1.0, 1.0))
    assert stack_of((*rows, LoRARow("off", on=False), LoRARow("c", 0.3))) == [
        ("a.safetensors", 0.5, 0.25),
        ("b", 1.0, 1.0),
        ("c", 0.3, 0.3),
    ]
    assert parse_stack(()) == parse_stack([("None", 1.0, 1.0)]) == ()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{}", "list"),
        ("[1]", "row 1"),
        ("[", "JSON"),
        ('[{"file": "a"}, {"file": 3}]', "row 2"),
        ('[{"file": "a", "strength": "1"}]', "strength"),
        ('[{"file": "a", "strength": 21}]', "-20..20"),
        ('[{"file": "a", "strength": true}]', "strength"),
        ('[{"file": "a", "text_strength": NaN}]', "JSON"),
        ('[{"file": "a", "on": 1}]', "on"),
        ('[{"file": "a", "selector": []}]', "selector"),
        ("[" * 100_000, "nested"),
        (json.dumps([{"file": "a"}] * 201), "201"),
        (" " * 100_001, "100,001"),
    ],
)
def test_other_texts_are_refused_in_one_sentence(text: str, word: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_rows(text)
    assert word in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "stack", ["text", 3, {"a": 1}, ["a"], [("a", 1.0)], [("a", 1.0, "x")], [(3, 1.0, 1.0)], [("a", 1, float("nan"))]]
)
def test_other_stacks_are_refused(stack: object) -> None:
    with pytest.raises(InvalidInputError):
        parse_stack(stack)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["file", "lora", "strength", "on", "selector"]), inner)
        ),
    )
)
def test_any_value_is_read_or_refused(value: object) -> None:
    for read in (lambda: parse_rows(json.dumps(value)), lambda: parse_stack(value)):
        with contextlib.suppress(InvalidInputError):
            assert all(isinstance(row, LoRARow) for row in read())
