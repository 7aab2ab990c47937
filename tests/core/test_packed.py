"""Two encoders that look at one picture at two sizes: InstantCharacter's feature, written once more as its authors do."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core.checkpoints import AdapterWeights, load_adapter
from ipadapter_core.checkpoints.plus import Plus
from ipadapter_core.errors import IncompatibleEncoderError, InvalidInputError
from ipadapter_core.features import CHARACTER, ENCODERS, PENULTIMATE, EncoderSpec, Feature, Look
from ipadapter_core.generate import load_image_encoders
from ipadapter_core.images.encoder import TowerEncoder, load_image_encoder
from ipadapter_core.images.packed import PackedEncoder
from ipadapter_core.images.preprocess import preprocess
from ipadapter_core.prompt.combine import combine_prompts
from ipadapter_core.prompt.encode import encode_image_prompt
from ipadapter_core.prompt.file import load_prompt, save_prompt
from ipadapter_core.prompt.image_prompt import ImagePrompt
from ipadapter_core.prompt.needs import check_encoder, encoder_for
from tiny import tiny_state
from tiny_towers import dinov2, siglip

SIDE, LAYERS = 56, (1, 2, 3)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
exact = {"rtol": 0.0, "atol": 0.0}
TINY: Feature = replace(
    CHARACTER, looks=(Look("SigLIP so400m/14-384", LAYERS, SIDE), Look("DINOv2 giant/14", LAYERS, SIDE, skip=1))
)


@cache
def towers() -> dict[str, Any]:
    """The two tiny encoders as ours and as transformers'."""
    from tempfile import TemporaryDirectory

    found: dict[str, Any] = {}
    for name, make in (("siglip", siglip), ("dino", dinov2)):
        with TemporaryDirectory() as folder:
            found[f"{name} model"] = make(Path(folder))
            found[name] = load_image_encoder(folder)
    return found


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> tuple[TowerEncoder, TowerEncoder]:
    """With the published ones' widths those of the tiny ones."""
    ours = towers()["siglip"], towers()["dino"]
    for look, encoder in zip(TINY.looks, ours, strict=True):
        known: EncoderSpec = ENCODERS[look.encoder]
        monkeypatch.setitem(
            ENCODERS, look.encoder, replace(known, hidden_size=encoder.hidden_size, image_size=encoder.image_size)
        )
    return ours


def as_the_authors(picture: Tensor) -> Tensor:
    """pipeline.py's encode_image_emb, with the pixels as ours: low, its layers, and four crops of twice the size."""
    parts: dict[str, list[Tensor]] = {"low": [], "shallow": [], "high": []}
    for name, skip in (("siglip", 0), ("dino", 1)):
        model, encoder = towers()[f"{name} model"], towers()[name]
        low = preprocess(picture, encoder_at(encoder, SIDE), crop="subject")
        big = preprocess(picture, encoder_at(encoder, 2 * SIDE), crop="subject")
        seen = model(low, output_hidden_states=True)
        parts["low"].append(seen.last_hidden_state[:, skip:])
        parts["shallow"].append(torch.cat([seen.hidden_states[i][:, skip:] for i in LAYERS], 1))
        crops = [big[..., :SIDE, :SIDE], big[..., :SIDE, SIDE:], big[..., SIDE:, :SIDE], big[..., SIDE:, SIDE:]]
        parts["high"].append(torch.cat([model(crop).last_hidden_state[:, skip:] for crop in crops], 1))
    return torch.cat([torch.cat(parts[name], -1) for name in ("low", "shallow", "high")], 1)


def encoder_at(encoder: TowerEncoder, side: int) -> Any:
    return SimpleNamespace(image_size=side, mean=encoder.mean, std=encoder.std)


def photos(count: int, h: int = 90, w: int = 70) -> Tensor:
    coarse = torch.rand((count, 3, 6, 6), generator=torch.Generator().manual_seed(4))
    return nn.functional.interpolate(coarse, (h, w), mode="bilinear").permute(0, 2, 3, 1)


def adapter(encoders: tuple[TowerEncoder, TowerEncoder]) -> AdapterWeights:
    """A plus adapter that reads both."""
    family = Plus()
    for name, value in {"feature": TINY, "framing": "subject", "unconditional": "same"}.items():
        setattr(family, name, value)
    loaded = load_adapter(tiny_state("plus", feature_dim=sum(e.hidden_size for e in encoders)))
    return replace(loaded, spec=replace(loaded.spec, format=family, unconditional="same"))


def test_the_packed_feature_is_the_authors(encoders: tuple[TowerEncoder, TowerEncoder]) -> None:
    packed = PackedEncoder(TINY, encoders)
    for image in photos(2).split(1):
        seen = packed.encode(packed.pixels(image, "subject", None)).get("packed")
        assert seen.shape == (1, 16 * (1 + len(LAYERS) + 4), packed.hidden_size)
        assert_close(seen, as_the_authors(image), **TOLERANCE)


def test_the_published_one_is_as_large_as_its_adapter_reads() -> None:
    tokens = sum(1 + len(look.layers) + 4 for look in CHARACTER.looks[:1]) * 729
    widths = [ENCODERS[look.encoder].hidden_size for look in CHARACTER.looks]
    assert (tokens, sum(widths)) == (5832, 2688)


@pytest.mark.parametrize("order", [1, -1])
def test_encoders_are_told_apart_in_any_order(encoders: tuple[TowerEncoder, TowerEncoder], order: int) -> None:
    images, ours = photos(2), adapter(encoders)
    prompt = encode_image_prompt(ours, encoders[::order], images)
    assert prompt.encoder == " + ".join(encoder.name for encoder in encoders)
    expected = torch.cat([as_the_authors(image) for image in images.split(1)])
    assert_close(prompt.features[0], expected, **TOLERANCE)
    assert_close(prompt.cond, ours.tokens(expected).flatten(0, 1)[None], **TOLERANCE)
    assert_close(prompt.uncond, prompt.cond, **exact)


def tokens_of(
    ours: AdapterWeights, encoders: tuple[TowerEncoder, TowerEncoder], images: Tensor, **options: Any
) -> ImagePrompt:
    return encode_image_prompt(ours, encoders, images, **options)


def test_what_is_said_of_prompts_holds_for_two_encoders(
    encoders: tuple[TowerEncoder, TowerEncoder], tmp_path: Path
) -> None:
    ours, images = adapter(encoders), photos(2)
    each = [tokens_of(ours, encoders, image) for image in images.split(1)]
    apart = tokens_of(ours, encoders, images, per_latent=True)
    assert_close(apart.cond, torch.cat([one.cond for one in each]), **TOLERANCE)
    mean = tokens_of(ours, encoders, images, combine="average")
    assert_close(mean.features[0], torch.stack([one.features[0] for one in each]).mean(0), **TOLERANCE)
    together = combine_prompts(ours, each, combine="concat")
    assert_close(together.cond, tokens_of(ours, encoders, images).cond, **TOLERANCE)
    negative = tokens_of(ours, encoders, images[:1], negative=images[1:])
    assert_close(negative.uncond, each[1].cond, **TOLERANCE)
    tiles = tokens_of(ours, encoders, photos(1, 60, 160), crop="tiles")
    assert tiles.features.shape[1] > 1
    centred = tokens_of(ours, encoders, images[:1], crop="center")
    assert (centred.features - each[0].features).abs().max() > 1e-2
    weak = tokens_of(ours, encoders, images[:1], strengths=[0.5])
    assert_close(weak.features, each[0].features * 0.5, **TOLERANCE)
    assert_close(weak.uncond, weak.cond, **exact)
    path = save_prompt(tmp_path / "a.safetensors", weak)
    assert_close(load_prompt(path, ours, encoders[0]).cond, weak.cond, **TOLERANCE)  # one that happens to be connected
    saved = load_prompt(path, ours)
    assert_close(saved.cond, weak.cond, **TOLERANCE)
    assert saved.negative_branch == "same"
    black, grey = (tokens_of(ours, encoders, images[:1], unconditional=rule) for rule in ("black", "zero_pixels"))
    assert_close(black.uncond_features[0], as_the_authors(torch.zeros(1, 20, 20, 3)), **TOLERANCE)
    assert_close(grey.uncond_features[0], as_the_authors(torch.full((1, 20, 20, 3), 0.5)), **TOLERANCE)


def test_a_missing_encoder_is_named_with_its_file(encoders: tuple[TowerEncoder, TowerEncoder]) -> None:
    ours = adapter(encoders)
    with pytest.raises(IncompatibleEncoderError, match=r"DINOv2 giant/14 there is none.*facebook/dinov2-giant"):
        encode_image_prompt(ours, encoders[0], photos(1))
    with pytest.raises(IncompatibleEncoderError, match=r"DINOv2 giant/14 there is none.*facebook/dinov2-giant"):
        check_encoder(ours.spec, encoders[0])
    with pytest.raises(IncompatibleEncoderError, match=r"SigLIP.*and DINOv2.*sigclip_vision_patch14_384"):
        encoder_for(ours.spec, [SimpleNamespace(name="ViT-H", hidden_size=1280, projection_dim=1024, image_size=224)])  # pyright: ignore[reportArgumentType]


def test_both_are_loaded_for_headless_use(tmp_path: Path) -> None:
    siglip(tmp_path / "siglip")
    dinov2(tmp_path / "dino")
    ours = load_adapter(tiny_state("plus"))
    files = [tmp_path / "dino" / "model.safetensors", tmp_path / "siglip"]
    assert [encoder.hidden_size for encoder in load_image_encoders(tmp_path, files, ours)] == [64, 32]
    with pytest.raises(InvalidInputError, match="--image-encoder"):
        load_image_encoders(tmp_path, [], ours)


def test_an_adapter_of_one_encoder_takes_the_one_that_fits(encoders: tuple[TowerEncoder, TowerEncoder]) -> None:
    loaded = load_adapter(tiny_state("plus", feature_dim=encoders[1].hidden_size))
    assert loaded.spec.format.feature is PENULTIMATE
    assert encoder_for(loaded.spec, encoders) is encoders[1]
    with pytest.raises(IncompatibleEncoderError, match=r"needs|of its own"):
        encoder_for(loaded.spec, encoders[:1])
