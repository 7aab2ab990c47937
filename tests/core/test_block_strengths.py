"""Strengths of blocks as x-flux-comfyui has them: numbers worked out from its formulas by hand."""

from __future__ import annotations

import math

import pytest

from ipadapter_core.legacy.block_strengths import SMOOTHINGS, Smoothing, strengths_of_blocks


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("Linear", {0: 0.2, 9: 0.6, 18: 1.0}),
        ("First half", {0: 0.2, 4: 0.6, 8: 1.0, 9: 1.0, 18: 1.0}),
        ("Second half", {0: 0.2, 9: 0.2, 10: 0.2, 14: 0.6, 18: 1.0}),
        ("Sigmoid", {0: 0.2 + 0.8 * (1 / (1 + math.e**4) - 0.5), 18: 0.2 + 0.8 * (1 / (1 + math.e ** (-68 / 19)) - 0.5)}),
    ],
)  # fmt: skip
def test_two_strengths_become_nineteen(kind: Smoothing, known: dict[int, float]) -> None:
    found = strengths_of_blocks(kind, 0.2, 1.0)
    assert len(found) == 19
    assert {i: found[i] for i in known} == pytest.approx(known)
    assert found == sorted(found)


def test_equal_strengths_are_equal_everywhere() -> None:
    for kind in SMOOTHINGS:
        assert strengths_of_blocks(kind, 0.5, 0.5) == pytest.approx([0.5] * 19)
