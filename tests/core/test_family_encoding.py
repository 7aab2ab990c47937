"""Every family of transformer adapters from pictures to tokens: its feature, how it sees pictures, and its negative branch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core.checkpoints import AdapterWeights, load_adapter
from ipadapter_core.errors import IncompatibleEncoderError
from ipadapter_core.features import ENCODERS, ImageEncoder
from ipadapter_core.images.encoder import load_image_encoder
from ipadapter_core.images.preprocess import preprocess
from ipadapter_core.prompt.encode import encode_image_prompt
from ipadapter_core.prompt.image_prompt import ImagePrompt
from tiny import TRANSFORMERS, tiny_state
from tiny_towers import dinov2, pe_core, siglip

exact, TOLERANCE = {"rtol": 0.0, "atol": 0.0}, {"rtol": 0.0, "atol": 1e-5}
FRAMINGS = {
    "xlabs": "center", "xlabs-diffusers": "center", "instantx": "stretch", "instantx-resampler": "stretch", "instantcharacter": "subject",
    "sd3.5": "stretch", "anima-character": "fit", "anima-pe": "shapes",
}  # fmt: skip
NEGATIVE = {"instantcharacter": "same", "anima-pe": "same", "anima-character": "off"}


def clip(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=24, image_size=28, patch_size=14
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)


@cache
def encoders() -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        clip(root / "clip")
        siglip(root / "siglip", side=384, layers=26)
        dinov2(root / "dino", layers=29, side=518)
        pe_core(root / "pe.safetensors", side=24, layers=1)
        return {name: load_image_encoder(root / name) for name in ("clip", "siglip", "dino", "pe.safetensors")}


def encoder_of(family: str) -> list[ImageEncoder]:
    if family.startswith("xlabs"):
        return [encoders()["clip"]]
    if family == "instantcharacter":
        return [encoders()["siglip"], encoders()["dino"]]
    return [encoders()["pe.safetensors" if family == "anima-pe" else "siglip"]]


def width(family: str) -> int:
    if family.startswith("xlabs"):
        return 24
    return sum(encoder.hidden_size for encoder in encoder_of(family))


@cache
def adapter(family: str) -> AdapterWeights:
    loaded = load_adapter(tiny_state(family, feature_dim=width(family), channels=(16, 16)), name=family)
    # of tiny sizes, nothing tells the encoder
    return loaded if family == "instantcharacter" else replace(loaded, spec=replace(loaded.spec, encoder="custom"))


@pytest.fixture(autouse=True)
def tiny_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, encoder in (("SigLIP so400m/14-384", encoders()["siglip"]), ("DINOv2 giant/14", encoders()["dino"])):
        monkeypatch.setitem(ENCODERS, name, replace(ENCODERS[name], hidden_size=encoder.hidden_size))


def picture(seed: int = 0) -> Tensor:
    coarse = torch.rand((1, 3, 5, 5), generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (80, 44), mode="bilinear").permute(0, 2, 3, 1)


@cache
def encoded_prompt(family: str) -> ImagePrompt:
    return encode_image_prompt(adapter(family), encoder_of(family), picture())


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_picture_becomes_what_the_family_reads(family: str) -> None:
    ours, given = adapter(family), encoder_of(family)
    spec = ours.spec
    assert spec.format.framing == FRAMINGS[family]
    prompt = encoded_prompt(family)
    if spec.format.feature.looks:
        assert prompt.features.shape == (1, 1, 8 * 27 * 27, spec.feature_dim)
    else:
        pixels = preprocess(picture(), given[0], crop=spec.format.framing)
        encoded = spec.format.feature.encoded
        assert encoded is not None
        assert_close(prompt.features[0], given[0].encode(pixels).get(encoded), **TOLERANCE)
    assert prompt.negative_branch == NEGATIVE.get(family, "tokens")
    assert_close(prompt.cond, ours.tokens(prompt.features[0]).flatten(0, 1)[None], **TOLERANCE)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_negative_branch_is_the_familys(family: str) -> None:
    ours, given = adapter(family), encoder_of(family)
    prompt = encoded_prompt(family)
    match NEGATIVE.get(family, ours.spec.unconditional):
        case "same":
            assert_close(prompt.uncond, prompt.cond, **exact)
        case "off":
            assert not prompt.uncond.any()
        case "zero_embeds":
            assert_close(
                prompt.uncond, ours.tokens(torch.zeros_like(prompt.features[0])).flatten(0, 1)[None], **TOLERANCE
            )
        case "black_picture":
            black = preprocess(torch.zeros(1, 30, 30, 3), given[0])
            assert_close(prompt.uncond_features[0], given[0].encode(black).get("image_embeds"), **TOLERANCE)
        case "zero_pixels":
            grey = given[0].encode(torch.zeros(1, 3, 384, 384)).get("penultimate")
            assert_close(prompt.uncond_features[0], grey, **TOLERANCE)
        case rule:
            raise AssertionError(rule)
    away = encode_image_prompt(ours, given, picture(1), negative=picture())
    assert away.negative_branch == "tokens"
    assert_close(away.uncond_features, prompt.features, **TOLERANCE)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_wrong_encoder_is_named_before_it_runs(family: str) -> None:
    wrong = encoders()["siglip" if family in ("anima-pe", "instantcharacter") or family.startswith("xlabs") else "clip"]
    if family in ("anima-character", "sd3.5", "instantx-resampler", "instantx"):
        wrong = encoders()["pe.safetensors"]
    with pytest.raises(IncompatibleEncoderError):
        encode_image_prompt(adapter(family), wrong, picture())
