from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ipadapter_core.checkpoints import AdapterWeights, format_named, load_adapter, trainable_families
from ipadapter_core.checkpoints.format import TrainedUnconditional
from ipadapter_core.checkpoints.plus import Plus
from ipadapter_core.compatibility import IPADAPTER_PLUS
from ipadapter_core.errors import IncompatibleEncoderError, InvalidInputError
from ipadapter_core.features import LAST, ImageFeatures
from ipadapter_core.images.encoder import TowerEncoder, TransformersImageEncoder, load_image_encoder
from ipadapter_core.images.preprocess import nearest_shape, preprocess
from ipadapter_core.images.tiles import square_tiles
from ipadapter_core.prompt.combine import Combine, at_strength, combine_features, combine_prompts
from ipadapter_core.prompt.encode import encode_image_prompt
from ipadapter_core.prompt.image_prompt import ImagePrompt
from ipadapter_core.prompt.options import EncodeOptions
from tiny import tiny_state
from tiny_towers import pe_core

SIZE, HIDDEN, EMBED, TOKENS = 28, 32, 24, 4
COMBINES = get_args(Combine)
FAMILIES = trainable_families()
exact = {"rtol": 0.0, "atol": 0.0}


@cache
def encoder() -> TransformersImageEncoder:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=EMBED,
        image_size=SIZE,
        patch_size=14,
    )
    return TransformersImageEncoder(CLIPVisionModelWithProjection(config), name="tiny clip")


def pooled(family: str) -> bool:
    return format_named(family).feature.encoded == "image_embeds"


@cache
def adapter(family: str = "plus") -> AdapterWeights:
    width = EMBED if pooled(family) else HIDDEN
    return load_adapter(tiny_state(family, feature_dim=width), name=f"tiny {family}")


def photos(count: int, *, seed: int = 0, h: int = 40, w: int = 36) -> Tensor:
    """Smooth pictures unlike each other: 5 x 5 random colours, enlarged."""
    coarse = torch.rand((count, 3, 5, 5), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear").permute(0, 2, 3, 1)


def feature(family: str, pixels: Tensor) -> Tensor:
    return encoder().encode(pixels).get(adapter(family).spec.feature)


def tokens_of(family: str, images: Tensor) -> Tensor:
    return adapter(family).tokens(feature(family, preprocess(images, encoder())))


def encode(family: str, images: Tensor | Sequence[Tensor], **options: object) -> ImagePrompt:
    return encode_image_prompt(adapter(family), encoder(), images, **options)  # pyright: ignore[reportArgumentType]


def same(a: ImagePrompt, b: ImagePrompt, **tolerance: float) -> None:
    for name in ("cond", "uncond", "features", "uncond_features"):
        assert_close(getattr(a, name), getattr(b, name), **tolerance)


# --- one image ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_image_is_encoder_then_projector(family: str) -> None:
    images = photos(1)
    prompt = encode(family, images)
    expected = tokens_of(family, images)
    assert_close(prompt.cond, expected)
    assert prompt.uncond.shape == prompt.cond.shape == (1, {"full-face": 5}.get(family, TOKENS), 32)
    assert (prompt.cond - prompt.uncond).abs().max() > 0.1
    assert (prompt.adapter, prompt.encoder, prompt.token_dim) == (f"tiny {family}", "tiny clip", 32)
    assert prompt.features.shape == ((1, 1, EMBED) if pooled(family) else (1, 1, 5, HIDDEN))
    assert not prompt.cond.requires_grad


def test_base_unconditional_is_the_projector_of_zeros() -> None:
    prompt = encode("base", photos(1))
    assert_close(prompt.uncond, adapter("base").tokens(torch.zeros(1, EMBED)), **exact)
    assert_close(encode("base", photos(1), unconditional="zero_embeds").uncond, prompt.uncond, **exact)


@pytest.mark.parametrize("family", ["plus", "full-face"])
def test_plus_unconditional_is_an_encoded_picture_of_zeros(family: str) -> None:
    expected = adapter(family).tokens(feature(family, torch.zeros(1, 3, SIZE, SIZE)))
    assert_close(encode(family, photos(1)).uncond, expected)
    assert_close(encode(family, photos(1), unconditional="zero_pixels").uncond, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_named_unconditionals_differ(family: str) -> None:
    uncond = {
        rule: encode(family, photos(1), unconditional=rule).uncond for rule in ("zero_pixels", "zero_embeds", "black")
    }
    for a, b in itertools.combinations(uncond.values(), 2):
        assert (a - b).abs().max() > 1e-2
    black = adapter(family).tokens(feature(family, preprocess(torch.zeros(1, 50, 50, 3), encoder())))
    assert_close(uncond["black"], black)


def trained_so(family: str, rule: TrainedUnconditional) -> AdapterWeights:
    return replace(adapter(family), spec=replace(adapter(family).spec, unconditional=rule))


@pytest.mark.parametrize(
    ("trained", "chosen"),
    [("black_picture", "black"), ("zero_embeds", "zero_embeds"), ("same", "same"), ("off", "off")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_was_trained_with_can_be_chosen_for_another(
    family: str, trained: TrainedUnconditional, chosen: str
) -> None:
    images = photos(2)
    alone = encode_image_prompt(trained_so(family, trained), encoder(), images, strengths=[1, 0.4])
    same(alone, encode(family, images, strengths=[1, 0.4], unconditional=chosen), **exact)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_image_in_both_branches(family: str, combine: str) -> None:
    """Also where strengths change it and pictures are joined afterwards; weak images fade to the zero feature."""
    prompt = encode(family, photos(3), combine=combine, strengths=[0.5, 1, -2], unconditional="same")
    assert prompt.negative_branch == "same"
    assert_close(prompt.uncond, prompt.cond, **exact)
    assert_close(prompt.uncond_features, prompt.features, **exact)
    assert prompt.neutral_features is not None
    assert not prompt.neutral_features.any()
    apart = [encode(family, photos(3)[i : i + 1], unconditional="same") for i in range(3)]
    joined = combine_prompts(adapter(family), apart, combine=combine, strengths=[0.5, 1, -2])  # pyright: ignore[reportArgumentType]
    same(joined, prompt)
    assert joined.negative_branch == "same"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_that_is_off_has_no_tokens(family: str) -> None:
    prompt = encode(family, photos(2), unconditional="off")
    assert prompt.negative_branch == "off"
    assert not prompt.uncond.any()
    assert prompt.uncond.shape == prompt.cond.shape
    assert_close(prompt.cond, encode(family, photos(2)).cond, **exact)
    joined = combine_prompts(adapter(family), [prompt, prompt], combine="concat")
    assert joined.negative_branch == "off"


@pytest.mark.parametrize("rule", ["same", "off", "black"])
def test_a_negative_image_comes_before_every_rule(rule: str) -> None:
    images, negative = photos(2), photos(1, seed=9)
    prompt = encode("plus", images, negative=negative, unconditional=rule)
    assert prompt.negative_branch == "tokens"
    assert_close(prompt.uncond, tokens_of("plus", negative).repeat(1, 2, 1))
    mixed = combine_prompts(adapter(), [prompt, encode("plus", images[:1], unconditional=rule)], combine="concat")
    assert mixed.negative_branch == "tokens"
    own = {"same": images[:1], "black": torch.zeros_like(images[:1])}
    last = tokens_of("plus", own[rule]) if rule in own else adapter().tokens(torch.zeros(1, 5, HIDDEN))
    assert_close(mixed.uncond, torch.cat([prompt.uncond, last], 1))


def test_unconditional_does_not_touch_the_image() -> None:
    rules = ("auto", "zero_pixels", "zero_embeds", "black", "same", "off")
    conds = [encode("plus", photos(1), unconditional=rule).cond for rule in rules]
    for cond in conds[1:]:
        assert_close(cond, conds[0])


def test_negative_image_replaces_the_unconditional() -> None:
    images, negative = photos(2), photos(1, seed=9)
    for family in FAMILIES:
        prompt = encode(family, images[:1], negative=negative)
        assert_close(prompt.uncond, tokens_of(family, negative))
        assert_close(prompt.cond, encode(family, images[:1]).cond)
        assert_close(encode(family, images[:1], negative=negative[0]).uncond, prompt.uncond)
        pair = encode(family, images, negative=negative)
        assert_close(pair.uncond, prompt.uncond.repeat(1, 2, 1))


# --- several images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_image_is_the_same_under_every_combine(family: str, combine: str) -> None:
    same(encode(family, photos(1), combine=combine), encode(family, photos(1)), **exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_concat_keeps_each_images_tokens_in_order(family: str) -> None:
    images = photos(3)
    prompt = encode(family, images)
    assert_close(prompt.cond, torch.cat([tokens_of(family, image[None]) for image in images], 1))
    assert_close(prompt.uncond, encode(family, images[:1]).uncond.repeat(1, 3, 1))
    assert prompt.features.shape[:2] == (1, 3)
    assert prompt.uncond_features.shape == prompt.features.shape
    swapped = encode(family, images.flip(0))
    n = prompt.cond.shape[1] // 3
    assert_close(swapped.cond, torch.cat(prompt.cond.split(n, 1)[::-1], 1))


def mix_plainly(combine: str, features: Tensor) -> Tensor:
    """The formulas of the reference, in double precision, over ``i ...`` features."""
    e = features.double()
    if combine == "norm average":
        norms = e.square().sum(-1, keepdim=True).sqrt()
        return sum(x / n for x, n in zip(e, norms, strict=True)) / len(e) * (sum(norms) / len(e))
    return {
        "add": lambda: e[0] + e[1] + e[2],
        "subtract": lambda: e[0] - (e[1] + e[2]) / 2,
        "average": lambda: (e[0] + e[1] + e[2]) / 3,
        "max": lambda: e[0].maximum(e[1]).maximum(e[2]),
        "min": lambda: e[0].minimum(e[1]).minimum(e[2]),
    }[combine]()


@pytest.mark.parametrize("combine", [c for c in COMBINES if c != "concat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixing_happens_in_the_encoders_space(family: str, combine: str) -> None:
    images = photos(3)
    prompt = encode(family, images, combine=combine)
    mixed = mix_plainly(combine, feature(family, preprocess(images, encoder()))).float()
    assert_close(prompt.features[0, 0], mixed, atol=1e-4, rtol=1e-4)
    assert_close(prompt.cond, adapter(family).tokens(mixed[None]), atol=1e-4, rtol=1e-4)
    assert_close(prompt.uncond, encode(family, images[:1]).uncond)


def test_the_combines_differ() -> None:
    prompts = [encode("plus", photos(3), combine=combine) for combine in COMBINES if combine != "concat"]
    for a, b in itertools.combinations(prompts, 2):
        assert (a.cond - b.cond).abs().max() > 1e-3


@pytest.mark.parametrize("combine", ["average", "norm average", "max", "min"])
def test_mixing_equal_images_gives_the_image(combine: str) -> None:
    image = photos(1)
    mixed = encode("plus", image.repeat(3, 1, 1, 1), combine=combine)
    assert_close(mixed.cond, encode("plus", image).cond, atol=1e-4, rtol=1e-4)


def test_subtracting_an_image_from_itself_leaves_zero() -> None:
    prompt = encode("base", photos(1).repeat(2, 1, 1, 1), combine="subtract")
    assert_close(prompt.features, torch.zeros(1, 1, EMBED), atol=1e-5, rtol=0)


@pytest.mark.parametrize("combine", ["add", "average", "norm average", "max", "min"])
def test_order_does_not_matter_where_it_should_not(combine: str) -> None:
    images = photos(3)
    same(encode("plus", images, combine=combine), encode("plus", images.flip(0), combine=combine), atol=1e-4, rtol=1e-4)


def test_norm_average_does_not_let_a_long_feature_win() -> None:
    a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 9.0]]])
    assert_close(combine_features([a, b], "norm average"), torch.tensor([[[2.5, 2.5]]]))
    assert_close(combine_features([a, 0 * b], "norm average"), torch.tensor([[[0.25, 0.0]]]))


# --- strengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINES)
def test_strength_1_changes_no_bit(combine: str) -> None:
    images = photos(2)
    for family in FAMILIES:
        plain = encode(family, images, combine=combine)
        same(encode(family, images, combine=combine, strengths=[1, 1.0]), plain, **exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_0_is_no_image(family: str) -> None:
    prompt = encode(family, photos(1), strengths=[0])
    assert_close(prompt.cond, prompt.uncond)


def test_strength_multiplies_base_embeds() -> None:
    images = photos(2)
    embeds = feature("base", preprocess(images, encoder()))
    prompt = encode("base", images, strengths=[0.4, 1.7])
    assert_close(prompt.features[0], embeds * torch.tensor([[0.4], [1.7]]))


@pytest.mark.parametrize("strength", [0.3, 1.5, -1.0])
def test_strength_moves_plus_features_on_the_line_from_nothing(strength: float) -> None:
    image = photos(1)
    f = feature("plus", preprocess(image, encoder()))
    u = feature("plus", torch.zeros(1, 3, SIZE, SIZE))
    prompt = encode("plus", image, strengths=[strength])
    assert_close(prompt.features[0], u + strength * (f - u), atol=1e-4, rtol=1e-4)


def test_strength_belongs_to_its_image() -> None:
    images = photos(2)
    n = TOKENS
    plain, prompt = encode("plus", images), encode("plus", images, strengths=[1, 0.5])
    assert_close(prompt.cond[:, :n], plain.cond[:, :n])
    assert (prompt.cond[:, n:] - plain.cond[:, n:]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_weak_images_fade_to_nothing_not_to_the_negative(family: str) -> None:
    neutral = encode(family, photos(1)).uncond
    negative = photos(1, seed=9)
    prompt = encode(family, photos(1), strengths=[0], negative=negative)
    assert_close(prompt.cond, neutral)
    assert_close(prompt.uncond, tokens_of(family, negative))
    later = combine_prompts(
        adapter(family), [encode(family, photos(1), negative=negative)], combine="add", strengths=[0]
    )
    same(later, prompt)


def test_strength_under_the_old_packs_rule_scales_the_feature() -> None:
    features, neutral = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    assert_close(at_strength(features, neutral, 0.5), torch.tensor([[2.0, 0.0]]))
    assert_close(at_strength(features, neutral, 0.5, IPADAPTER_PLUS), torch.tensor([[1.5, -0.5]]))
    assert at_strength(features, neutral, 1.0) is features


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"crop": "tiles", "strengths": [0.5, 2]}, {"combine": "add"}, {"per_latent": True, "unconditional": "black"}],
)
def test_options_are_one_value_or_keywords(changes: dict[str, Any]) -> None:
    images = photos(2, h=80)
    same(
        encode_image_prompt(adapter(), encoder(), images, EncodeOptions(**changes)),
        encode("plus", images, **changes),
        **exact,
    )
    mixed = encode_image_prompt(adapter(), encoder(), images, EncodeOptions(**changes), chunk=1)
    same(mixed, encode("plus", images, chunk=1, **changes), **exact)


def test_an_option_that_there_is_not_is_an_error_of_python() -> None:
    with pytest.raises(TypeError, match="strenghts"):
        encode("plus", photos(1), strenghts=[1.0])


# --- sizes, masks, crops, chunks ------------------------------------------------------------------------------------


def test_a_list_of_sizes_equals_each_alone() -> None:
    images = [photos(1, seed=i, h=h, w=w) for i, (h, w) in enumerate([(40, 36), (28, 28), (30, 90)])]
    expected = torch.cat([encode("plus", image).cond for image in images], 1)
    assert_close(encode("plus", images).cond, expected)
    assert_close(encode("plus", [image[0] for image in images]).cond, expected)
    assert_close(encode("plus", [photos(2), images[2]]).cond[:, : 2 * TOKENS], encode("plus", photos(2)).cond)


@cache
def shaped() -> tuple[AdapterWeights, TowerEncoder]:
    """A plus adapter of a family that reads PE-Core's last hidden states, with the picture in both branches."""
    with TemporaryDirectory() as folder:
        pe_core(Path(folder) / "pe.safetensors", layers=1, side=24)
        tower = load_image_encoder(Path(folder) / "pe.safetensors")
    assert isinstance(tower, TowerEncoder)
    family = Plus()
    family.feature, family.framing = LAST, "shapes"  # pyright: ignore[reportAttributeAccessIssue]
    loaded = load_adapter(tiny_state("plus", feature_dim=tower.hidden_size))
    return replace(loaded, spec=replace(loaded.spec, format=family, unconditional="same")), tower


def test_pictures_are_seen_as_the_family_was_trained_unless_the_user_chooses() -> None:
    ours, tower = shaped()
    tall = photos(1, h=80, w=40)
    prompt = encode_image_prompt(ours, tower, tall)
    assert prompt.features.shape == (1, 1, 34 * 17 + 1, 384)
    pixels = preprocess(tall, tower, crop="shapes")
    assert_close(prompt.features[0], tower.encode(pixels).get("last"))
    squares = {
        crop: encode_image_prompt(ours, tower, tall, crop=crop).features for crop in ("center", "pad", "stretch")
    }
    assert {features.shape[2] for features in squares.values()} == {577}
    assert_close(squares["pad"][0], tower.encode(preprocess(tall, tower, crop="pad")).get("last"))
    old = encode_image_prompt(ours, tower, tall, rules=IPADAPTER_PLUS)  # which knows no such family
    assert_close(old.cond, prompt.cond, **exact)
    assert encode_image_prompt(ours, tower, tall, rules=IPADAPTER_PLUS, crop="center").features.shape[2] == 577
    cut = encode_image_prompt(ours, tower, tall, crop="tiles")
    assert cut.features.shape[1:3] == (2, 577)


def test_pictures_of_one_prompt_have_as_many_tokens_each() -> None:
    ours, tower = shaped()
    images = [photos(1, h=80, w=40), photos(1, seed=1, h=60, w=50)]
    prompt = encode_image_prompt(ours, tower, images, negative=photos(1, seed=2, h=50, w=50))
    shape = nearest_shape([(80, 40), (60, 50), (50, 50)])
    for image, features in zip(images, prompt.features[0], strict=True):
        seen = tower.encode(preprocess(image, tower, crop="shapes", shape=shape)).get("last")
        assert_close(features, seen[0])
    for rule in ("zero_pixels", "black"):
        beside = encode_image_prompt(ours, tower, images[0], unconditional=rule)
        assert beside.uncond_features.shape == beside.features.shape
    apart = [encode_image_prompt(ours, tower, image) for image in images]
    with pytest.raises(InvalidInputError, match=r"of 579 and 589 tokens.*in one node"):
        combine_prompts(ours, apart, combine="concat")


def test_crop_reaches_the_encoder() -> None:
    image = photos(1, h=90, w=30)
    assert_close(encode("plus", image, crop="top").cond, encode("plus", image[:, :30]).cond, atol=0.02, rtol=0)
    assert (encode("plus", image, crop="top").cond - encode("plus", image).cond).abs().max() > 0.05


@pytest.mark.parametrize(
    ("size", "squares"),
    [
        ((40, 40), [(0, 0)]), ((40, 44), [(0, 2)]), ((40, 60), [(0, 0), (0, 20)]),
        ((100, 40), [(0, 0), (30, 0), (60, 0)]), ((40, 120), [(0, 0), (0, 40), (0, 80)]),
    ],
)  # fmt: skip
def test_tiles_cover_a_picture_with_squares(size: tuple[int, int], squares: list[tuple[int, int]]) -> None:
    cut = square_tiles(torch.zeros(1, *size, 3))
    assert [(rows.start, columns.start) for rows, columns in cut] == squares
    assert {span.stop - span.start for pair in cut for span in pair} == {40}


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_are_references_of_their_own_unless_images_are_mixed(family: str) -> None:
    image, other = photos(1, h=40, w=100), photos(1, seed=4, h=40, w=40)
    parts = [image[:, :, x : x + 40] for x in (0, 30, 60)]
    tiled = encode(family, [image, other], crop="tiles", strengths=[0.5, 1.0])
    same(tiled, encode(family, [*parts, other], strengths=[0.5, 0.5, 0.5, 1.0]))
    mixed = encode(family, [image, other], crop="tiles", combine="subtract")
    mean = torch.stack([encode(family, part).features for part in parts]).mean(0)
    assert_close(mixed.features, mean - encode(family, other).features)
    same(encode(family, other, crop="tiles"), encode(family, other), **exact)


def test_tiles_per_latent_and_under_masks() -> None:
    images = photos(2, h=80, w=40)
    apart = encode("plus", images, crop="tiles", per_latent=True)
    assert apart.features.shape[:2] == (2, 2)
    for i in range(2):
        assert_close(apart.cond[i : i + 1], encode("plus", images[i : i + 1], crop="tiles").cond)
    top = torch.zeros(80, 40)
    top[:30] = 1
    masked = encode("plus", images[:1], crop="tiles", masks=top)
    same(masked, encode("plus", images[:1, :40], masks=top[:40]))  # the lower tile has nothing to see
    assert encode("plus", images, crop="tiles", masks=top, per_latent=True).features.shape[:2] == (2, 2)
    with pytest.raises(InvalidInputError, match="become 2, 1 tiles"):
        encode("plus", [images[0], images[1, :40]], crop="tiles", per_latent=True)
    with pytest.raises(InvalidInputError, match="40x1000 would become 25 tiles"):
        encode("plus", photos(1, h=1000, w=40), crop="tiles")


def test_masks_belong_to_their_images() -> None:
    images = photos(2)
    half = torch.ones(40, 36)
    half[:20] = 0
    plain = encode("plus", images)
    same(encode("plus", images, masks=torch.ones(2, 40, 36)), plain, **exact)
    same(encode("plus", images, masks=torch.ones(1, 40, 36)), plain, **exact)
    same(encode("plus", images, masks=[None, None]), plain, **exact)
    second = encode("plus", images, masks=[None, half])
    assert_close(second.cond[:, :TOKENS], plain.cond[:, :TOKENS])
    assert (second.cond[:, TOKENS:] - plain.cond[:, TOKENS:]).abs().max() > 1e-2
    same(encode("plus", images, masks=torch.stack([torch.ones(40, 36), half])), second, **exact)
    alone = encode("plus", images[1:], masks=half)
    assert_close(alone.cond, second.cond[:, TOKENS:])


def test_an_empty_mask_is_no_image() -> None:
    prompt = encode("plus", photos(1), masks=torch.zeros(1, 40, 36))
    assert_close(prompt.cond, prompt.uncond, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_chunks_bound_the_encoder_and_report_progress(chunk: int) -> None:
    sizes: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(encoder(), name)

        def encode(self, pixel_values: Tensor) -> ImageFeatures:
            sizes.append(len(pixel_values))
            return encoder().encode(pixel_values)

    calls: list[tuple[int, int]] = []
    prompt = encode_image_prompt(
        adapter(),
        Counting(),
        photos(5),
        chunk=chunk,
        progress=lambda *done: calls.append(done),  # pyright: ignore
    )
    same(prompt, encode("plus", photos(5)), atol=1e-4, rtol=1e-4)
    assert sum(sizes) == 6  # five images and the unconditional one
    assert max(sizes) == min(chunk, 6)
    assert calls == [(min(i + chunk, 6), 6) for i in range(0, 6, chunk)]


def test_base_needs_no_unconditional_picture() -> None:
    calls: list[tuple[int, int]] = []
    encode("base", photos(2), progress=lambda *done: calls.append(done))
    assert calls == [(2, 2)]


# --- one image per latent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_per_latent_gives_every_latent_its_image(family: str, combine: str) -> None:
    images = photos(3)
    prompt = encode(family, images, per_latent=True, combine=combine, strengths=[1, 0.5, 1])
    assert prompt.cond.shape[0] == prompt.uncond.shape[0] == 3
    for i, strength in enumerate([1, 0.5, 1]):
        alone = encode(family, images[i : i + 1], strengths=[strength])
        assert_close(prompt.cond[i : i + 1], alone.cond)
        assert_close(prompt.uncond[i : i + 1], alone.uncond)


def test_per_latent_negatives() -> None:
    negatives = photos(2, seed=9)
    prompt = encode("plus", photos(2), per_latent=True, negative=negatives)
    assert_close(prompt.uncond, tokens_of("plus", negatives))
    shared = encode("plus", photos(2), per_latent=True, negative=negatives[:1])
    assert_close(shared.uncond, tokens_of("plus", negatives[:1]).repeat(2, 1, 1))


# --- combining prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_combining_prompts_is_encoding_together(family: str, combine: str) -> None:
    images = photos(3)
    alone = [encode(family, image[None]) for image in images]
    together = combine_prompts(adapter(family), alone, combine=combine, strengths=[1, 0.5, 2])
    expected = encode(family, images, combine=combine, strengths=[1, 0.5, 2])
    same(together, expected, atol=1e-4, rtol=1e-4)
    assert together.encoder == "tiny clip"
    assert together.adapter == f"tiny {family}"


@pytest.mark.parametrize("combine", COMBINES)
def test_combining_one_prompt_changes_nothing(combine: str) -> None:
    prompt = encode("plus", photos(2))
    again = combine_prompts(adapter(), [prompt], combine=combine)
    assert_close(again.features, prompt.features, **exact)
    assert_close(again.uncond_features, prompt.uncond_features, **exact)
    same(again, prompt)  # tokens up to the rounding of another batch size


def test_concat_of_prompts_keeps_each_ones_unconditional() -> None:
    negative = photos(1, seed=9)
    a, b = encode("plus", photos(1), negative=negative), encode("plus", photos(1, seed=3))
    both = combine_prompts(adapter(), [a, b], combine="concat")
    assert_close(both.cond, torch.cat([a.cond, b.cond], 1))
    assert_close(both.uncond, torch.cat([a.uncond, b.uncond], 1))
    faded = combine_prompts(adapter(), [both], combine="concat", strengths=[0])
    assert_close(faded.cond, torch.cat([b.uncond, b.uncond], 1))


def test_concat_of_prompts_with_many_images() -> None:
    images = photos(3)
    a, b = encode("plus", images[:2]), encode("plus", images[2:])
    same(combine_prompts(adapter(), [a, b], combine="concat"), encode("plus", images), atol=1e-4, rtol=1e-4)


def test_shared_and_per_latent_prompts_join() -> None:
    images = photos(3)
    own, shared = encode("plus", images[:2], per_latent=True), encode("plus", images[2:])
    for prompts in ([own, shared], [shared, own]):
        both = combine_prompts(adapter(), prompts, combine="concat")
        expected = torch.cat([p.cond.expand(2, -1, -1) for p in prompts], 1)
        assert_close(both.cond, expected)
        assert both.uncond.shape == expected.shape


def test_features_may_be_projected_by_another_adapter() -> None:
    other = load_adapter(tiny_state("plus", feature_dim=HIDDEN, num_tokens=7, token_dim=48, seed=5), name="other")
    prompt = combine_prompts(other, [encode("plus", photos(1))], combine="concat")
    assert_close(prompt.cond, encode_image_prompt(other, encoder(), photos(1)).cond)
    assert (prompt.adapter, prompt.token_dim, prompt.cond.shape) == ("other", 48, (1, 7, 48))


def test_prompts_that_do_not_fit_together() -> None:
    plus = encode("plus", photos(1))
    with pytest.raises(InvalidInputError, match="no image prompts"):
        combine_prompts(adapter(), [], combine="concat")
    with pytest.raises(IncompatibleEncoderError, match="tiny clip and another"):
        combine_prompts(adapter(), [plus, replace(plus, encoder="another")], combine="concat")
    with pytest.raises(IncompatibleEncoderError, match=r"image_embeds of width 24.*tiny plus.*\(1, 1, 5, 32\)"):
        combine_prompts(adapter("base"), [plus], combine="concat")
    two, three = (encode("plus", photos(n), per_latent=True) for n in (2, 3))
    with pytest.raises(InvalidInputError, match="2, 3 latents"):
        combine_prompts(adapter(), [two, three], combine="concat")
    two, three = (encode("plus", photos(n)) for n in (2, 3))
    with pytest.raises(InvalidInputError, match=r"2, 3 images.*concat"):
        combine_prompts(adapter(), [two, three], combine="average")
    with pytest.raises(InvalidInputError, match="1 strengths for 2"):
        combine_prompts(adapter(), [two, three], combine="concat", strengths=[1])


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"combine": "sum"}, "'sum'.*concat"),
        ({"unconditional": "grey"}, "'grey'.*zero_pixels"),
        ({"crop": "middle"}, "'middle'"),
        ({"chunk": 0}, "chunk is 0"),
        ({"strengths": [1.0]}, "1 strengths for 2"),
        ({"strengths": [1.0, float("nan")]}, "finite"),
        ({"masks": torch.ones(3, 40, 36)}, "3 masks for 2"),
        ({"masks": [None]}, "1 masks for 2"),
        ({"masks": torch.ones(2, 64, 64)}, "64x64.*36x40"),
        ({"negative": torch.zeros(2, 40, 36, 3)}, "2 negative images; one"),
        ({"negative": torch.zeros(3, 40, 36, 3), "per_latent": True}, "3 negative images; one or 2"),
        ({"negative": torch.zeros(1, 0, 36, 3)}, "no pixels"),
        ({"negative": torch.zeros(0, 40, 36, 3)}, "empty"),
    ],
)
def test_bad_options_are_refused_before_the_encoder_runs(options: dict[str, object], words: str) -> None:
    def never(done: int, total: int) -> None:
        raise AssertionError("the encoder ran")

    with pytest.raises(InvalidInputError, match=words):
        encode("plus", photos(2), progress=never, **options)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], "empty"),
        (torch.zeros(0, 40, 36, 3), "empty"),
        ([torch.rand(40, 36, 3), torch.rand(0, 36, 3)], "no pixels"),
        ([torch.rand(40, 36)], r"\(b, h, w, c\)"),
        ([torch.rand(40, 36, 3), torch.rand(40, 36, 3) * float("nan")], "NaN"),
        (torch.zeros(1, 40, 36, 3, dtype=torch.uint8), "uint8"),
    ],
)
def test_bad_images_are_refused_before_the_encoder_runs(images: object, words: str) -> None:
    def never(done: int, total: int) -> None:
        raise AssertionError("the encoder ran")

    with pytest.raises(InvalidInputError, match=words):
        encode("plus", images, progress=never)  # pyright: ignore[reportArgumentType]


def test_the_wrong_encoder_is_found_before_it_runs() -> None:
    wrong = load_adapter(tiny_state("plus", feature_dim=1280), name="made for ViT-H")

    class Never:
        name, hidden_size, projection_dim, image_size = "tiny clip", HIDDEN, EMBED, SIZE

        def encode(self, pixel_values: Tensor) -> ImageFeatures:
            raise AssertionError("the encoder ran")

    with pytest.raises(IncompatibleEncoderError, match=r"1280.*ViT-H.*tiny clip.*32"):
        encode_image_prompt(wrong, Never(), photos(1))  # pyright: ignore[reportArgumentType]


def test_an_encoder_that_overflows_is_told() -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            return getattr(encoder(), name)

        def encode(self, pixel_values: Tensor) -> ImageFeatures:
            features = encoder().encode(pixel_values)
            return ImageFeatures(features.image_embeds, features.penultimate / 0)

    with pytest.raises(InvalidInputError, match="tiny clip returned NaN or infinite"):
        encode_image_prompt(adapter(), Broken(), photos(1))  # pyright: ignore[reportArgumentType]


def test_prompt_is_in_the_adapters_dtype() -> None:
    half = load_adapter(tiny_state("plus", feature_dim=HIDDEN), dtype=torch.bfloat16)
    prompt = encode_image_prompt(half, encoder(), photos(1))
    assert prompt.cond.dtype == prompt.uncond.dtype == torch.bfloat16
    assert_close(prompt.cond.float(), encode("plus", photos(1)).cond, atol=0.1, rtol=0.05)
