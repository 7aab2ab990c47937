"""Adapters of transformers: published files by keys and shapes alone, and their tokens, keys and values beside a reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import ImageProjection
from torch import Tensor
from torch.testing import assert_close

from ipadapter_core.checkpoints import FORMATS, claimants, describe_adapter, load_adapter
from ipadapter_core.files.state_dict import TensorFile
from tiny import adapter_shapes, tiny_state

# rounding of a few float32 layers whose results are of unit size
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def described(family: str, **sizes: Any) -> dict[str, Tensor]:
    shapes = adapter_shapes(family, **sizes)
    return {key: torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in shapes.items()}


DOUBLE, FLUX = (3072,) * 19, (3072,) * 57
XLABS = {"token_dim": 4096, "channels": DOUBLE, "feature_dim": 768}
INSTANTX = {"token_dim": 4096, "channels": FLUX, "num_tokens": 128, "feature_dim": 1152}
PLUS = {
    "token_dim": 4096,
    "channels": FLUX,
    "num_tokens": 64,
    "feature_dim": 1152,
    "hidden_dim": 1280,
    "inner_dim": 1280,
}

# name: family, sizes, its numbers in all (published or computed from its shapes), base model, tokens, encoder
PUBLISHED: dict[str, tuple[str, dict[str, Any], int, str, int, str]] = {
    "flux-ip-adapter": ("xlabs", {**XLABS, "num_tokens": 4}, 490_874_880, "FLUX", 4, "ViT-L/14"),
    "flux-ip-adapter-v2": ("xlabs", {**XLABS, "num_tokens": 16}, 528_672_768, "FLUX", 16, "ViT-L/14"),
    "flux-ip-adapter-v2-diffusers": (
        "xlabs-diffusers",
        {**XLABS, "num_tokens": 16},
        528_672_768,
        "FLUX",
        16,
        "ViT-L/14",
    ),
    "FLUX.1-dev-IP-Adapter": ("instantx", INSTANTX, 2_645_600_512, "FLUX", 128, "SigLIP so400m/14-384"),
    "the same with a resampler": (
        "instantx-resampler",
        {**PLUS, "depth": 4},
        1_519_938_816,
        "FLUX",
        64,
        "SigLIP so400m/14-384",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_by_their_shapes(name: str) -> None:
    family, sizes, numbers, base_model, tokens, encoder = PUBLISHED[name]
    state = described(family, **sizes)
    assert sum(t.numel() for t in state.values()) == numbers
    assert [format.name for format in claimants(TensorFile(state))] == [family]
    spec = describe_adapter(state)
    assert (spec.family, spec.base_model, spec.num_tokens, spec.encoder) == (family, base_model, tokens, encoder)
    assert spec.layer_channels == sizes["channels"]
    assert (spec.token_dim, spec.feature_dim) == (sizes["token_dim"], sizes["feature_dim"])
    module = load_adapter(state).module
    assert sum(p.numel() for p in module.parameters()) == numbers


def test_a_family_of_transformers_says_what_strength_is_usual() -> None:
    assert all(format.advice for format in FORMATS if format.reach.query != "projected")


# --- tokens, keys and values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["xlabs", "xlabs-diffusers"])
@pytest.mark.parametrize("tokens", [4, 7])
def test_xlabs(family: str, tokens: int) -> None:
    state = tiny_state(family, num_tokens=tokens, channels=(256, 256))
    adapter = load_adapter(state)
    projector = [t for key, t in state.items() if "_proj" in key.split(".")[0] or key.startswith("image_proj")]
    theirs = ImageProjection(image_embed_dim=24, cross_attention_dim=32, num_image_text_embeds=tokens)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), projector, strict=True)))
    features = noise(3, 24)
    found = adapter.tokens(features)
    assert found.shape == (3, tokens, 32)
    assert_close(found, theirs(features).detach(), **TOLERANCE)
    layers = [t for key, t in state.items() if "double_blocks" in key or key.startswith("ip_adapter.")]
    for layer in range(2):
        k_weight, k_bias, v_weight, v_bias = layers[4 * layer : 4 * layer + 4]
        k, v = adapter.key_value(layer, found)
        assert_close(k, F.linear(found, k_weight, k_bias), **TOLERANCE)
        assert_close(v, F.linear(found, v_weight, v_bias), **TOLERANCE)


def test_instantx() -> None:
    """The formula in float64: two layers with a GELU, tokens normed; keys normed over a head of 128, values plain."""
    state = {key: t.double() for key, t in tiny_state("instantx", num_tokens=5, channels=(256, 384)).items()}
    adapter, w = load_adapter(state), {key.removeprefix("image_proj."): t for key, t in state.items()}
    features = noise(2, 24).double()
    hidden = F.gelu(features @ w["proj.0.weight"].T + w["proj.0.bias"]) @ w["proj.2.weight"].T + w["proj.2.bias"]
    expected = F.layer_norm(hidden.reshape(2, 5, 32), (32,), w["norm.weight"], w["norm.bias"])
    found = adapter.tokens(features)
    assert_close(found, expected)
    for layer, heads in ((0, 2), (1, 3)):
        k, v = adapter.key_value(layer, found)
        plain = found @ state[f"ip_adapter.{layer}.to_k_ip.weight"].T
        parts = [part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in plain.chunk(heads, -1)]
        assert_close(k, torch.cat(parts, -1), **TOLERANCE)  # the norm computes in float32
        assert_close(v, found @ state[f"ip_adapter.{layer}.to_v_ip.weight"].T)
