"""The maths against the published formulas, written plainly in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ipadapter_core.attention.maths import KeyValue, add_image_attention, attend, scale_for, split_heads
from ipadapter_core.attention.schedule import SCALINGS, Scaling

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
EXACT = {"rtol": 0.0, "atol": 1e-12}


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v for one head after another, ``b l c``."""
    d = q.shape[-1] // heads
    out = []
    for i in range(heads):
        cut = slice(i * d, (i + 1) * d)
        scores = q[..., cut] @ k[..., cut].transpose(1, 2) / math.sqrt(d)
        out.append(torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True) @ v[..., cut])
    return torch.cat(out, -1)


def formula(scaling: Scaling, w: float, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """B.3 of the reference, with scaled copies of K and V as they are written there."""
    penalised = w * q.shape[-1] / 1280
    match scaling:
        case "V only":
            return w * plain_attention(q, k, v, heads)
        case "K+V":
            return plain_attention(q, k * w, v * w, heads)
        case "K+V w/ C penalty":
            return plain_attention(q, k * penalised, v * penalised, heads)
        case "K+mean(V) w/ C penalty":
            mean = v.mean(1, keepdim=True)
            return plain_attention(q, k * penalised, (v - mean) + mean * penalised, heads)


def run(
    scaling: Scaling, w: float, base: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    kv = KeyValue(split_heads(k, heads), split_heads(v, heads))
    return add_image_attention(base, q, kv, heads, scale_for(scaling, w, q.shape[-1]), mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
@pytest.mark.parametrize("weight", [1.0, 0.35, -0.8, 3.0, 0.01])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scalings_equal_their_formulas(scaling: Scaling, weight: float, masked: bool, dtype: torch.dtype) -> None:
    b, length, tokens, heads, c = 2, 11, 5, 4, 64
    base, q = rand(b, length, c, seed=1), rand(b, length, c, seed=2)
    k, v = rand(b, tokens, c, seed=3), rand(b, tokens, c, seed=4) + 0.7  # a mean that matters
    mask = torch.rand(b, length, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64) if masked else None
    expected = base + (1 if mask is None else mask) * formula(scaling, weight, q, k, v, heads)
    got = run(scaling, weight, *(t.to(dtype) for t in (base, q, k, v)), heads, None if mask is None else mask.to(dtype))
    assert got.dtype == dtype
    assert_close(got.double(), expected, **(EXACT if dtype == torch.float64 else TOLERANCE))


def test_the_four_scalings_differ() -> None:
    q, k, v = rand(1, 6, 64, seed=1), rand(1, 5, 64, seed=2), rand(1, 5, 64, seed=3) + 0.7
    results = [run(scaling, 0.5, torch.zeros_like(q), q, k, v, 4) for scaling in SCALINGS]
    for i, a in enumerate(results):
        assert all((a - b).abs().max() > 1e-3 for b in results[:i])


@pytest.mark.parametrize("scaling", SCALINGS)
def test_at_1280_channels_weight_one_is_plain(scaling: Scaling) -> None:
    q, k, v = rand(1, 3, 1280, seed=1), rand(1, 4, 1280, seed=2), rand(1, 4, 1280, seed=3)
    assert_close(run(scaling, 1.0, torch.zeros_like(q), q, k, v, 8), plain_attention(q, k, v, 8), **EXACT)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attend_equals_plain_attention(heads: int) -> None:
    q, k, v = rand(3, 7, 16, seed=1), rand(3, 4, 16, seed=2), rand(3, 4, 16, seed=3)
    got = attend(q, KeyValue(split_heads(k, heads), split_heads(v, heads)), heads)
    assert_close(got, plain_attention(q, k, v, heads), **EXACT)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_members_that_share_image_tokens_are_folded(groups: int) -> None:
    """A batch of 6 in groups, in order: the same as repeating the tokens for each member."""
    q, k, v = rand(6, 7, 16, seed=1), rand(groups, 4, 16, seed=2), rand(groups, 4, 16, seed=3)
    got = attend(q, KeyValue(split_heads(k, 2), split_heads(v, 2)), 2)
    repeated = (t.repeat_interleave(6 // groups, 0) for t in (k, v))
    assert_close(got, plain_attention(q, *repeated, 2), **EXACT)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_groups_keep_their_means(scaling: Scaling) -> None:
    q, base = rand(4, 7, 16, seed=1), rand(4, 7, 16, seed=5)
    k, v = rand(2, 4, 16, seed=2), rand(2, 4, 16, seed=3) + 0.5
    repeated = [t.repeat_interleave(2, 0) for t in (k, v)]
    assert_close(run(scaling, 0.6, base, q, k, v, 2), base + formula(scaling, 0.6, q, *repeated, 2), **EXACT)


def test_v_only_is_linear_in_the_weight_and_a_negative_one_subtracts() -> None:
    q, k, v = rand(2, 5, 16, seed=1), rand(2, 3, 16, seed=2), rand(2, 3, 16, seed=3)
    base = rand(2, 5, 16, seed=4)
    plus, minus = (run("V only", w, base, q, k, v, 2) - base for w in (0.7, -0.7))
    assert_close(plus, -minus, **EXACT)


def test_large_negative_key_scales_stay_finite() -> None:
    """Fused kernels subtract the row maximum before they scale: the sign has to move to the queries."""
    q, k, v = (rand(1, 5, 16, seed=i, dtype=torch.float32) * 30 for i in range(3))
    for scaling in SCALINGS:
        got = run(scaling, -5.0, torch.zeros_like(q), q, k, v, 2)
        assert bool(torch.isfinite(got).all())
        expected = formula(scaling, -5.0, q.double(), k.double(), v.double(), 2)
        if bool(torch.isfinite(expected).all()):
            assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)


def test_a_mask_of_zero_leaves_the_base() -> None:
    q, k, v, base = (rand(2, 5, 16, seed=i) for i in range(4))
    assert torch.equal(run("V only", 0.7, base, q, k, v, 2, torch.zeros(1, 5, 1, dtype=torch.float64)), base)


def test_inputs_are_not_changed() -> None:
    q, k, v, base = (rand(2, 5, 16, seed=i) for i in range(4))
    copies = [t.clone() for t in (q, k, v, base)]
    for scaling in SCALINGS:
        run(scaling, -0.7, base, q, k, v, 2)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, base), copies, strict=True))


def test_gradients_equal_those_of_the_formula() -> None:
    leaves = [rand(2, 5, 16, seed=i).requires_grad_() for i in range(4)]
    base, q, k, v = leaves
    run("V only", 0.7, base, q, k, v, 2).square().sum().backward()
    got = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    for leaf in leaves:
        leaf.grad = None
    (base + formula("V only", 0.7, q, k, v, 2)).square().sum().backward()
    for a, leaf in zip(got, leaves, strict=True):
        assert leaf.grad is not None
        assert_close(a, leaf.grad, rtol=0, atol=1e-10)
