"""Strengths of blocks and the schedule as x-flux-comfyui has them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ipadapter_core.legacy.block_strengths import SMOOTHINGS, Smoothing, strengths_of_blocks
from ipadapter_core.legacy.flux_schedule import flux_sigmas, sampled_sigmas


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


# --- its schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "side"), [(4, 512), (25, 1024), (50, 1536)])
def test_sigmas_are_those_of_diffusers_dynamic_shift(steps: int, side: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    tokens = (side // 16) ** 2
    mu = 0.5 + (tokens - 256) * 0.65 / 3840
    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
    assert flux_sigmas(steps, tokens) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_a_picture_to_start_from_and_noise_that_stays() -> None:
    whole = flux_sigmas(10, 1024)
    assert sampled_sigmas(10, 1024, 1.0, None) == sampled_sigmas(10, 1024, 1.0, 1.0) == whole
    assert sampled_sigmas(10, 1024, 0.5, None) == whole[:5]
    assert sampled_sigmas(10, 1024, 1.0, 0.5) == whole[5:]
    assert sampled_sigmas(10, 1024, 1.0, 0.0) == [0.0]
    assert sampled_sigmas(1, 1024, 0.0, None) == []
