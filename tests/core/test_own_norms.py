"""What adapters of transformers do besides attention: norms of their own, the picture's own keys, gates, silent branches.

Every formula is written plainly in fp64; queries and keys come as doors give them, after the model's norm, and before it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ipadapter_core.attention.call import COND, UNCOND, ModelCall, SiteCall
from ipadapter_core.attention.kv import Baked, Norms
from ipadapter_core.attention.masks import RegionMask
from ipadapter_core.attention.patch import AdapterPatch, resolve_weights
from ipadapter_core.attention.schedule import SCALINGS, Scaling, WeightSchedule
from ipadapter_core.compatibility import CORRECT
from ipadapter_core.models.grids import Patches
from ipadapter_core.models.reach import Reach, every
from ipadapter_core.models.sites import BaseModel, ModelLayout, Site

HEADS, WIDTH, N, ROWS, COLUMNS = 3, 8, 5, 3, 4
LENGTH, C = ROWS * COLUMNS, HEADS * WIDTH
LATENT = 2 * ROWS, 2 * COLUMNS
LAYOUT = ModelLayout(
    BaseModel(name="Small", tokens=Patches(2), reference_width=2 * C), 16, (Site("x", "block", 0, 0, 0, C, HEADS),)
)
EXACT = {"rtol": 0.0, "atol": 1e-5}  # eps inside one norm, and outside of it where the model's is undone


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W_MODEL, W_ADAPTER, W_MODEL_K, W_OWN = (rand(WIDTH, seed=20 + i) + 2.5 * (-1) ** i for i in range(4))


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """``weight · x / √(mean(x²) + 1e-6)`` over each head's numbers, ``b h l d``."""
    out = x / (x**2).mean(-1, keepdim=True).add(1e-6).sqrt()
    return out if weight is None else out * weight


def heads_of(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], HEADS, WIDTH).movedim(-2, 1)


def joined(x: Tensor) -> Tensor:
    return x.movedim(1, -2).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) / WIDTH**0.5).softmax(-1)
    return joined(scores @ v)


def patch_of(baked: Baked, mask: Tensor | None = None, **schedule: Any) -> AdapterPatch:
    steering = WeightSchedule(**schedule)
    region = None if mask is None else RegionMask.from_tensor(mask)
    weights, per_latent = resolve_weights(steering, LAYOUT, CORRECT)
    reach = Reach(every, query="raw")
    return AdapterPatch("a", LAYOUT, (baked,), steering, region, weights, CORRECT, per_latent, reach)


def site(q: Tensor, *branches: int, **extra: Any) -> SiteCall:
    call = ModelCall(branches or (COND,), latent=LATENT, size=LATENT)
    return SiteCall(call, q, HEADS, **extra)


def image_kv(branches: int = 2, latents: int = 1) -> tuple[Tensor, Tensor]:
    return tuple(rand(branches, latents, HEADS, N, WIDTH, seed=seed) for seed in (1, 2))  # type: ignore[return-value]


BASE, RAW_Q, RAW_K, V = (rand(2, LENGTH, C, seed=10 + i) for i in range(4))


def as_door(raw: Tensor, weight: Tensor) -> Tensor:
    """What a door gives: after the model's norm."""
    return joined(rms(heads_of(raw), weight))


# --- queries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("undone", [True, False], ids=["model's norm undone", "raw query"])
def test_queries_are_normed_by_the_adapter_and_not_by_the_model(undone: bool, weighted: bool) -> None:
    own = W_ADAPTER if weighted else None
    k, v = image_kv()
    patch = patch_of(Baked(k, v, norms=Norms(own)), strength=0.7)
    q = as_door(RAW_Q, W_MODEL) if undone else RAW_Q
    got = patch.add_to(BASE, 0, site(q, UNCOND, COND, query_norm=W_MODEL if undone else None))
    expected = BASE + 0.7 * attention(rms(heads_of(RAW_Q), own), k[:, 0], v[:, 0])
    assert_close(got, expected, **EXACT)
    wrong = BASE + 0.7 * attention(rms(heads_of(RAW_Q), W_MODEL), k[:, 0], v[:, 0])
    assert (got - wrong).abs().max() > 1e-2, "the model's norm and the adapter's are too alike to tell"


def test_norms_are_folded_once_and_anew_for_other_weights() -> None:
    k, v = image_kv()
    baked = Baked(k, v, norms=Norms(W_ADAPTER))
    q = as_door(RAW_Q, W_MODEL)
    first = site(q, UNCOND, COND, query_norm=W_MODEL)
    kept = baked.at(first, (UNCOND, COND), False)
    assert baked.at(site(q, UNCOND, COND, query_norm=W_MODEL), (UNCOND, COND), False) is kept
    assert_close(kept.k, k[:, 0] * W_ADAPTER / W_MODEL, rtol=0, atol=1e-6)
    patch = patch_of(baked)
    patch.add_to(BASE, 0, first)
    other = W_MODEL.flip(0)
    got = patch.add_to(BASE, 0, site(as_door(RAW_Q, other), UNCOND, COND, query_norm=other))
    assert_close(got, BASE + attention(rms(heads_of(RAW_Q), W_ADAPTER), k[:, 0], v[:, 0]), **EXACT)


# --- own keys ----------------------------------------------------------------------------------------------------------


def own_keys_formula(q: Tensor, own_k: Tensor, own_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SD3.5: one softmax over the picture's own keys and the image's, each normed by the adapter."""
    keys = torch.cat([rms(heads_of(own_k), W_OWN), k], 2)
    return attention(rms(heads_of(q), W_ADAPTER), keys, torch.cat([heads_of(own_v), v], 2))


@pytest.mark.parametrize("undone", [True, False], ids=["model's norms undone", "raw"])
@pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
def test_own_keys_join_the_images(undone: bool, masked: bool) -> None:
    k, v = image_kv()
    mask = torch.rand(*LATENT, generator=torch.Generator().manual_seed(4)) if masked else None
    patch = patch_of(Baked(k, v, norms=Norms(W_ADAPTER, W_OWN, own_keys=True)), mask, strength=0.6)
    if undone:
        at = site(as_door(RAW_Q, W_MODEL), UNCOND, COND, query_norm=W_MODEL, k=as_door(RAW_K, W_MODEL_K), key_norm=W_MODEL_K, v=V)  # fmt: skip
    else:
        at = site(RAW_Q, UNCOND, COND, k=RAW_K, v=V)
    rows = 1.0 if mask is None else torch.nn.functional.avg_pool2d(mask[None], 2).flatten()[:, None].double()
    expected = BASE + 0.6 * rows * own_keys_formula(RAW_Q, RAW_K, V, k[:, 0], v[:, 0])
    assert_close(patch.add_to(BASE, 0, at), expected, **EXACT)


def test_own_keys_with_a_reference_per_latent_and_with_one_for_all() -> None:
    base, q, own_k, own_v = (rand(4, LENGTH, C, seed=30 + i) for i in range(4))
    for latents in (1, 2):
        k, v = image_kv(latents=latents)
        patch = patch_of(Baked(k, v, norms=Norms(W_ADAPTER, W_OWN, own_keys=True)))
        got = patch.add_to(base, 0, site(q, UNCOND, COND, k=own_k, v=own_v))
        for row in range(4):
            member, reference = slice(row, row + 1), (row // 2, slice(row % 2 % latents, row % 2 % latents + 1))
            expected = base[member] + own_keys_formula(
                q[member], own_k[member], own_v[member], k[reference], v[reference]
            )
            assert_close(got[member], expected, **EXACT)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scalings_act_on_joined_keys(scaling: Scaling) -> None:
    """Keys' factors flatten the one softmax; what is shifted is the mean of the image's values."""
    k, v = image_kv()
    v = v + 0.7
    patch = patch_of(Baked(k, v, norms=Norms(W_ADAPTER, W_OWN, own_keys=True)), strength=-0.8, scaling=scaling)
    at = site(RAW_Q, UNCOND, COND, k=RAW_K, v=V)
    penalised = -0.8 if scaling in ("V only", "K+V") else -0.8 * C / (2 * C)
    key = 1.0 if scaling == "V only" else penalised
    keys = torch.cat([rms(heads_of(RAW_K), W_OWN), k[:, 0]], 2)
    image = attention(rms(heads_of(RAW_Q), W_ADAPTER) * key, keys, torch.cat([heads_of(V), v[:, 0]], 2))
    if scaling == "K+mean(V) w/ C penalty":
        image = image + (penalised - 1) * joined(v[:, 0].mean(2, keepdim=True))
        penalised = 1.0
    assert_close(patch.add_to(BASE, 0, at), BASE + penalised * image, **EXACT)


# --- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3])
def test_a_gate_multiplies_the_result(frames: int) -> None:
    k, v = image_kv()
    weight, emb = rand(C, 6, seed=5), rand(2, frames, 6, seed=6)
    asked: list[Tensor] = []

    def gate(conditioning: Tensor) -> Tensor:
        asked.append(conditioning)
        return conditioning @ weight.T

    patch = patch_of(Baked(k, v, gate=gate), strength=0.9)
    q = as_door(RAW_Q, W_MODEL)
    got = patch.add_to(BASE, 0, site(q, UNCOND, COND, query_norm=W_MODEL, emb=emb))
    factors = (emb @ weight.T).repeat_interleave(LENGTH // frames, 1)
    assert_close(got, BASE + 0.9 * factors * attention(heads_of(q), k[:, 0], v[:, 0]), rtol=0, atol=1e-10)
    assert len(asked) == 1
    off = patch.with_schedule(WeightSchedule(0.0))
    assert off.add_to(BASE, 0, site(q, UNCOND, COND, emb=emb)) is BASE
    assert len(asked) == 1, "a gate of a site without weight was computed"


# --- branches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latents", [1, 2])
@pytest.mark.parametrize("branches", [(0, 1), (1, 0), (1,), (1, 0, 1), (0, 0, 1), (1, 1)])
def test_a_silent_branch_changes_no_bit_and_costs_nothing(branches: tuple[int, ...], latents: int) -> None:
    """``off``: the image exists for the positive prompt alone. Masks, strengths per latent, own keys and gates follow."""
    k, v = image_kv(1, latents)
    weight, mask = rand(C, 6, seed=5), torch.rand(2, *LATENT, generator=torch.Generator().manual_seed(4))
    seen: list[int] = []

    def gate(conditioning: Tensor) -> Tensor:
        seen.append(len(conditioning))
        return conditioning @ weight.T

    baked = Baked(k, v, silent=(UNCOND,), norms=Norms(W_ADAPTER, W_OWN, own_keys=True), gate=gate)
    patch = patch_of(baked, mask, latent_strengths=(0.4, -0.8))
    b = 2 * len(branches)
    base, q, own_k, own_v = (rand(b, LENGTH, C, seed=30 + i) for i in range(4))
    emb = rand(b, 1, 6, seed=7)
    got = patch.add_to(base, 0, site(q, *branches, k=own_k, v=own_v, emb=emb))
    rows = torch.nn.functional.avg_pool2d(mask, 2).flatten(1)[..., None].double()
    assert seen == [2 * branches.count(COND)]
    for row in range(b):
        member, latent = slice(row, row + 1), row % 2
        if branches[row // 2] == UNCOND:
            assert torch.equal(got[member], base[member])
            continue
        reference = (0, slice(latent % latents, latent % latents + 1))
        image = own_keys_formula(q[member], own_k[member], own_v[member], k[reference], v[reference])
        image = image * (emb[member] @ weight.T) * rows[latent] * (0.4, -0.8)[latent]
        assert_close(got[member], base[member] + image, **EXACT)


def test_a_call_of_silent_branches_alone_returns_the_very_tensor() -> None:
    k, v = image_kv(1)
    patch = patch_of(Baked(k, v, silent=(UNCOND,)))
    assert patch.add_to(BASE, 0, site(RAW_Q, UNCOND)) is BASE


@pytest.mark.parametrize("branches", [(0, 1), (1, 0), (1,), (0,), (1, 0, 1)])
@pytest.mark.parametrize("latents", [1, 2])
def test_branches_that_see_the_same_share_their_keys(branches: tuple[int, ...], latents: int) -> None:
    k, v = image_kv(1, latents)
    b = 2 * len(branches)
    base, q = (rand(b, LENGTH, C, seed=30 + i) for i in range(2))
    one = patch_of(Baked(k, v)).add_to(base, 0, site(q, *branches, query_norm=W_MODEL))
    two = patch_of(Baked(k.repeat(2, 1, 1, 1, 1), v.repeat(2, 1, 1, 1, 1)))
    assert_close(one, two.add_to(base, 0, site(q, *branches, query_norm=W_MODEL)), rtol=0, atol=1e-12)
