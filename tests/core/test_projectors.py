"""The projectors against diffusers' own and against the formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import ImageProjection, IPAdapterFullImageProjection, IPAdapterPlusImageProjection
from torch import Tensor

from ipadapter_core.checkpoints import load_adapter
from ipadapter_core.checkpoints.projectors import ImageProjModel, Resampler, head_count
from tiny import tiny_state

# Two float32 networks of a few layers whose outputs are LayerNorm-ed (unit size): rounding only.
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def projector_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("image_proj."): t for key, t in state.items() if key.startswith("image_proj.")}


def test_base_equals_diffusers() -> None:
    state = tiny_state("base", num_tokens=7, token_dim=32, feature_dim=24)
    theirs = ImageProjection(image_embed_dim=24, cross_attention_dim=32, num_image_text_embeds=7)
    theirs.load_state_dict(
        {key.replace("proj.", "image_embeds."): t for key, t in projector_state(state).items()}, strict=True
    )
    features = randn(3, 24)
    torch.testing.assert_close(load_adapter(state).tokens(features), theirs(features).detach(), **TOLERANCE)


def test_full_face_equals_diffusers() -> None:
    # diffusers' hidden width is the feature's: as in the one released file
    state = tiny_state("full-face", token_dim=32, feature_dim=24, hidden_dim=24)
    theirs = IPAdapterFullImageProjection(image_embed_dim=24, cross_attention_dim=32)
    names = {"proj.0.": "ff.net.0.proj.", "proj.2.": "ff.net.2.", "proj.3.": "norm."}
    renamed = {names[key[:7]] + key[7:]: t for key, t in projector_state(state).items()}
    theirs.load_state_dict(renamed, strict=True)
    features = randn(2, 9, 24)
    torch.testing.assert_close(load_adapter(state).tokens(features), theirs(features).detach(), **TOLERANCE)


@pytest.mark.parametrize(("hidden", "inner", "queries", "depth"), [(64, 128, 16, 4), (48, 64, 7, 2), (128, 192, 5, 1)])
def test_plus_equals_diffusers(hidden: int, inner: int, queries: int, depth: int) -> None:
    sizes = {"token_dim": 32, "feature_dim": 24, "hidden_dim": hidden, "inner_dim": inner, "depth": depth}
    state = tiny_state("plus", num_tokens=queries, **sizes)
    theirs = IPAdapterPlusImageProjection(
        embed_dims=24, output_dims=32, hidden_dims=hidden, depth=depth, heads=inner // 64, num_queries=queries
    )
    names = {"0.norm1.": "ln0.", "0.norm2.": "ln1.", "0.to_q.": "attn.to_q.", "0.to_out.": "attn.to_out.0."}
    names |= {"1.0.": "ff.0.", "1.1.": "ff.1.net.0.proj.", "1.3.": "ff.1.net.2."}
    renamed: dict[str, Tensor] = {}
    for key, tensor in projector_state(state).items():
        head, layer, rest = key.split(".", 2) if key.startswith("layers.") else ("", "", key)
        if rest == "0.to_kv.weight":
            k, v = tensor.chunk(2)
            renamed |= {f"layers.{layer}.attn.to_k.weight": k, f"layers.{layer}.attn.to_v.weight": v}
            continue
        for ours, their in names.items():
            if head and rest.startswith(ours):
                rest = their + rest.removeprefix(ours)
                break
        renamed[f"{head}.{layer}.{rest}" if head else rest] = tensor
    theirs.load_state_dict(renamed, strict=True)
    features = randn(2, 9, 24)
    torch.testing.assert_close(load_adapter(state).tokens(features), theirs(features).detach(), **TOLERANCE)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def plain_resampler(w: dict[str, Tensor], x: Tensor, heads: int, depth: int) -> Tensor:
    """The resampler head by head, image by image, as one would write it on a blackboard."""
    outputs: list[Tensor] = []
    for image in x:
        tokens = image @ w["proj_in.weight"].T + w["proj_in.bias"]
        latents = w["latents"][0]
        for n in range(depth):
            p = f"layers.{n}."
            a = layer_norm(tokens, w[p + "0.norm1.weight"], w[p + "0.norm1.bias"])
            b = layer_norm(latents, w[p + "0.norm2.weight"], w[p + "0.norm2.bias"])
            both = torch.cat([a, b])
            inner = w[p + "0.to_q.weight"].shape[0]
            width = inner // heads
            heard: list[Tensor] = []
            for h in range(heads):
                rows = slice(h * width, (h + 1) * width)
                q = b @ w[p + "0.to_q.weight"][rows].T
                k = both @ w[p + "0.to_kv.weight"][:inner][rows].T
                v = both @ w[p + "0.to_kv.weight"][inner:][rows].T
                scores = torch.exp(q @ k.T / width**0.5)
                heard.append(scores / scores.sum(1, keepdim=True) @ v)
            latents = torch.cat(heard, dim=1) @ w[p + "0.to_out.weight"].T + latents
            y = layer_norm(latents, w[p + "1.0.weight"], w[p + "1.0.bias"])
            latents = gelu(y @ w[p + "1.1.weight"].T) @ w[p + "1.3.weight"].T + latents
        outputs.append(
            layer_norm(latents @ w["proj_out.weight"].T + w["proj_out.bias"], w["norm_out.weight"], w["norm_out.bias"])
        )
    return torch.stack(outputs)


@pytest.mark.parametrize(("inner", "heads", "ff"), [(128, 2, 256), (64, 1, 80), (40, 1, 48)])
def test_plus_equals_the_formula_in_float64(inner: int, heads: int, ff: int) -> None:
    state = tiny_state("plus", inner_dim=inner, ff_dim=ff, hidden_dim=56, num_tokens=6, depth=3, dtype=torch.float64)
    features = randn(2, 9, 24).double()
    expected = plain_resampler(projector_state(state), features, heads, depth=3)
    torch.testing.assert_close(load_adapter(state).tokens(features), expected, rtol=0, atol=1e-6)  # softmax is float32
    single = {key: tensor.float() for key, tensor in state.items()}
    torch.testing.assert_close(load_adapter(single).tokens(features.float()).double(), expected, **TOLERANCE)


def test_half_precision_survives_scores_beyond_its_range() -> None:
    # q·k of 64 channels: about 90² · √64 = 64800 before and an eighth of it after scaling; float16 ends at 65504
    state = tiny_state("plus", hidden_dim=64, inner_dim=64, depth=1, seed=3)
    state["image_proj.layers.0.0.to_q.weight"] *= 90
    state["image_proj.layers.0.0.to_kv.weight"][:64] *= 90
    features = randn(1, 9, 24)
    half = load_adapter(state, dtype=torch.float16).tokens(features.half())
    assert half.dtype == torch.float16
    assert half.isfinite().all()
    exact = load_adapter(state).tokens(features)
    # a saturated softmax picks one token; the picked values agree to float16's three digits for nearly all of them
    assert (half.float() - exact).abs().median() < 0.02


def test_a_batch_of_two_is_two_batches_of_one() -> None:
    for family in ("base", "plus", "full-face"):
        adapter = load_adapter(tiny_state(family))
        features = randn(2, 24) if family == "base" else randn(2, 9, 24)
        singles = torch.cat([adapter.tokens(one) for one in features.split(1)])
        torch.testing.assert_close(adapter.tokens(features), singles, **TOLERANCE)


def test_heads_are_64_wide_or_one() -> None:
    assert [head_count(inner) for inner in (768, 1280, 64, 128, 32, 96)] == [12, 20, 1, 2, 1, 1]


def test_modules_for_training_start_at_random() -> None:
    torch.manual_seed(0)
    resampler = Resampler(24, 64, 32, queries=5, depth=1)
    assert resampler(randn(2, 9, 24)).shape == (2, 5, 32)
    assert resampler.latents.std().item() == pytest.approx(64**-0.5, rel=0.2)
    assert ImageProjModel(24, 32, 7)(randn(2, 24)).shape == (2, 7, 32)
