"""The switch between correct pictures and those of ComfyUI_IPAdapter_plus, difference by difference.

The old pack's formulas are written out here from its behaviour; tests/host/test_side_by_side.py compares with the pack itself.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import ipadapter_core.backends.comfy.doors as backend
from ipadapter_core.attention.batch import Frames, fit_batch
from ipadapter_core.attention.call import COND, UNCOND, ModelCall, SiteCall
from ipadapter_core.attention.masks import RegionMask
from ipadapter_core.attention.presets import parse_layers
from ipadapter_core.attention.schedule import SCALINGS, WeightSchedule
from ipadapter_core.bake import bake
from ipadapter_core.compatibility import CORRECT, IPADAPTER_FLUX, IPADAPTER_PLUS, IPADAPTER_PLUS_V1, Rules, rules_for
from ipadapter_core.errors import IncompatibleEncoderError, InvalidInputError
from ipadapter_core.images.preprocess import preprocess, preprocess_as_host
from ipadapter_core.images.tiles import split_tiles
from ipadapter_core.prompt.combine import combine_features
from ipadapter_core.prompt.encode import prompt_from_features
from ipadapter_core.prompt.tiles import merge_tiles
from tiny_models import SD15, SDXL, FakePatcher, noise, tiny_adapter, tiny_host, tiny_prompt


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_switch_has_three_positions_and_an_old_one_differs_in_every_rule() -> None:
    assert rules_for("correct") is CORRECT
    assert rules_for("IPAdapter_plus") is IPADAPTER_PLUS
    assert rules_for("IPAdapter_plus", v1=True) is IPADAPTER_PLUS_V1
    assert rules_for("IPAdapter-Flux") is rules_for("IPAdapter-Flux", v1=True) is IPADAPTER_FLUX
    old = (IPADAPTER_PLUS, IPADAPTER_FLUX)
    assert {f.name for f in fields(Rules) if any(getattr(rules, f.name) != f.default for rules in old)} == {
        f.name for f in fields(Rules)
    }
    assert replace(IPADAPTER_FLUX, normed_values=False) == CORRECT  # nothing of UNets differs
    with pytest.raises(InvalidInputError, match="choose one of: correct, IPAdapter_plus"):
        rules_for("plus")


# --- sites and branches -----------------------------------------------------------------------------------------------


def site_call(
    q: Tensor,
    heads: int,
    branches: tuple[int, ...] = (COND, UNCOND),
    shape: tuple[int, int] | None = None,
    **more: object,
) -> SiteCall:
    return SiteCall(ModelCall(branches, lambda: 0.5, **more), q, heads, shape)  # pyright: ignore[reportArgumentType]


def patch(model: FakePatcher, rules: Rules = CORRECT, *, latents: int = 1, images: int = 1, mask: Tensor | None = None, **options: object):  # fmt: skip
    layout = backend.comfy_layout(model)
    adapter = tiny_adapter(layout)
    prompt = tiny_prompt(adapter, latents=latents)
    if images > 1:
        features = noise(images, adapter.spec.feature_dim, seed=4)
        prompt = prompt_from_features(adapter, features, torch.zeros_like(features))
    return bake(adapter, prompt, layout, WeightSchedule(**options), mask, rules=rules)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [SD15, SDXL])
def test_the_old_pack_leaves_the_middle_block_alone(kind: str) -> None:
    model = tiny_host(kind)
    old, new = patch(model, IPADAPTER_PLUS), patch(model)
    for index, site in enumerate(new.layout.sites):
        assert new.active(index)
        assert old.active(index) == (site.group != "middle")
    assert all(patch(model, IPADAPTER_PLUS_V1).active(i) for i in range(len(new.layout.sites)))


def test_by_index_only_the_second_chunk_is_negative() -> None:
    model = tiny_host()
    q = noise(3, 6, 32, seed=1)
    heads = backend.comfy_layout(model).sites[0].heads
    q = noise(3, 6, backend.comfy_layout(model).sites[0].channels, seed=1)
    dual = site_call(q, heads, (UNCOND, COND, COND), order=(0, 1, 2))  # DualCFG: negative, middle, positive
    base = torch.zeros_like(q)
    correct, old = (patch(model, rules).add_to(base, 0, dual) for rules in (CORRECT, IPADAPTER_PLUS))
    swapped = patch(model).add_to(base, 0, replace(dual, call=replace(dual.call, branches=(COND, UNCOND, COND))))
    assert_close(old, swapped)
    assert not torch.allclose(old, correct)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_mean_of_v_is_taken_per_image(scaling: str) -> None:
    """Σ_j a_j (V_j + (w-1) mean of the image that token j belongs to), written out."""
    model = tiny_host()
    made = patch(model, IPADAPTER_PLUS, images=3, strength=0.6, scaling=scaling)
    site = made.layout.sites[0]
    q = noise(2, 5, site.channels, seed=2)
    got = made.add_to(torch.zeros_like(q), 0, site_call(q, site.heads))
    weight = 0.6 * (site.channels / 1280 if "penalty" in scaling else 1.0)
    baked = made.sites[0]
    rows: list[Tensor] = []
    for i, branch in enumerate((COND, UNCOND)):
        k, v = (t[branch].flatten(0, 0)[0] for t in (baked.k, baked.v))  # h n d
        if scaling != "V only":
            k = k * weight
        if scaling in ("K+V", "K+V w/ C penalty"):
            v = v * weight
        if scaling == "K+mean(V) w/ C penalty":
            parts = v.unflatten(1, (3, -1))
            mean = parts.mean(2, keepdim=True)
            v = ((parts - mean) + mean * weight).flatten(1, 2)
        heads = q[i].unflatten(-1, (site.heads, -1)).transpose(0, 1)
        out = F.scaled_dot_product_attention(heads, k, v).transpose(0, 1).flatten(1)
        rows.append(out * weight if scaling == "V only" else out)
    assert_close(got, torch.stack(rows), rtol=1e-5, atol=1e-6)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_values_fit_a_batch_and_a_window_of_an_animation() -> None:
    rows = torch.arange(3)
    assert fit_batch(rows, 2).tolist() == [0, 1]
    assert fit_batch(rows, 5).tolist() == [0, 1, 2, 2, 2]
    assert fit_batch(rows, 2, Frames((1, 4), 6)).tolist() == [1, 2]
    assert fit_batch(torch.arange(8), 2, Frames((5, 0), 6)).tolist() == [5, 0]
    assert fit_batch(torch.arange(6).view(2, 3), 4, dim=1).tolist() == [[0, 1, 2, 2], [3, 4, 5, 5]]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_batch_of_strengths_equals_one_call_per_latent(scaling: str) -> None:
    model = tiny_host()
    strengths = (0.4, -0.7, 0.0, 1.3)
    made = patch(model, latents=3, latent_strengths=strengths, scaling=scaling)
    site = made.layout.sites[1]
    q = noise(8, 6, site.channels, seed=5)
    got = made.add_to(torch.zeros_like(q), 1, site_call(q, site.heads))
    for i in range(8):
        single = patch(model, latents=3, strength=strengths[i % 4], scaling=scaling)
        alone = q[i : i + 1]
        # a window of one frame picks this latent's own reference
        call = site_call(alone, site.heads, ((COND, UNCOND)[i // 4],), frames=Frames((i % 4,), 4))
        assert_close(got[i : i + 1], single.add_to(torch.zeros_like(alone), 1, call), rtol=1e-5, atol=1e-6)


def test_a_window_of_an_animation_gets_its_own_references_strengths_and_masks() -> None:
    model = tiny_host()
    layout = backend.comfy_layout(model)
    mask = torch.rand(5, 32, 48, generator=torch.Generator().manual_seed(0))
    site = layout.sites[0]
    q = noise(6, 12 * 16, site.channels, seed=5)
    size = {"latent": (12, 16), "shape": (12, 16), "size": (12, 16), "order": (0,)}
    for rules in (CORRECT, IPADAPTER_PLUS):
        made = patch(model, rules, latents=6, latent_strengths=tuple(0.2 * i + 0.1 for i in range(6)), mask=mask)
        whole = made.add_to(torch.zeros_like(q), 0, site_call(q, site.heads, (COND,), **size))
        window = site_call(q[2:5], site.heads, (COND,), frames=Frames((2, 3, 4), 6), **size)
        assert_close(made.add_to(torch.zeros_like(q[2:5]), 0, window), whole[2:5])


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (97, 96), (45, 128), (96, 97), (17, 90)])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_stretched_masks_follow_the_old_geometry(size: tuple[int, int], level: int) -> None:
    grid = size
    for _ in range(level):
        grid = (-(-grid[0] // 2), -(-grid[1] // 2))
    tokens = grid[0] * grid[1]
    values = torch.rand(2, 40, 56, generator=torch.Generator().manual_seed(1))
    rows = size[0] / math.sqrt(size[0] * size[1] / tokens)
    rows = int(rows) + int((tokens % int(rows)) != 0)
    flat = F.interpolate(values[:, None], size=(rows, tokens // rows), mode="bilinear").flatten(1)
    length = flat.shape[1]
    if length < tokens:
        front = (tokens - length) // 2
        flat = F.pad(flat, (front, tokens - length - front))
    elif length > tokens:
        front = (length - tokens) // 2
        flat = flat[:, front : front + tokens]
    like = torch.zeros(1, tokens, 8)
    got = RegionMask.from_tensor(values, clamp=False).stretched(size, "bilinear", like, 2)
    assert_close(got[..., 0], flat, rtol=0, atol=1e-6)


def test_stretched_masks_keep_values_beyond_one() -> None:
    """Bicubic resizing of a mask overshoots, and the old pack multiplies by what comes out."""
    mask = torch.tensor([[[1.2, -0.1]]])
    assert RegionMask.from_tensor(mask, clamp=False).values.tolist() == mask.tolist()
    assert RegionMask.from_tensor(mask).values.max() == 1


# --- features ---------------------------------------------------------------------------------------------------------


class Encoder:
    name, hidden_size, projection_dim, image_size = "tiny", 8, 16, 28
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.mark.parametrize("shape", [(28, 28), (60, 41), (33, 90)])
def test_host_pixels_equal_comfyuis_formula(shape: tuple[int, int]) -> None:
    image = torch.rand(2, *shape, 3, generator=torch.Generator().manual_seed(2))
    x = image.movedim(-1, 1)
    scale = 28 / min(shape)
    if shape != (28, 28):
        x = F.interpolate(x, (round(scale * shape[0]), round(scale * shape[1])), mode="bicubic", antialias=True)
        top, left = (x.shape[2] - 28) // 2, (x.shape[3] - 28) // 2
        x = x[:, :, top : top + 28, left : left + 28]
    x = torch.clip(255.0 * x, 0, 255).round() / 255.0
    expected = (x - torch.tensor(Encoder.mean).view(3, 1, 1)) / torch.tensor(Encoder.std).view(3, 1, 1)
    assert_close(preprocess_as_host(image, Encoder()), expected)  # pyright: ignore[reportArgumentType]


def test_pictures_and_masks_outside_their_range_are_clipped_as_the_old_node_did() -> None:
    """HDR references and masks with NaN ran there; the correct mode says what is wrong with them."""
    image = noise(1, 40, 40, 3, seed=5) * 100
    clipped = preprocess_as_host(image.clamp(0, 1), Encoder())  # pyright: ignore[reportArgumentType]
    at_size = noise(1, 28, 28, 3, seed=5) * 100
    assert torch.equal(preprocess_as_host(at_size, Encoder()), preprocess_as_host(at_size.clamp(0, 1), Encoder()))  # pyright: ignore[reportArgumentType]
    for factor in (1.0, 1e35):
        got = preprocess_as_host(image * factor, Encoder())  # pyright: ignore[reportArgumentType]
        assert got.isfinite().all()
        assert got.min() >= clipped.min() - 1
    with pytest.raises(InvalidInputError, match=r"must lie in 0\.\.1"):
        preprocess(image, Encoder())  # pyright: ignore[reportArgumentType]
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = image.clone()
        broken[0, 3, 3] = bad
        for read in (preprocess, preprocess_as_host):  # the old pack painted black
            with pytest.raises(InvalidInputError, match="NaN or infinite"):
                read(broken, Encoder())  # pyright: ignore[reportArgumentType]
        mask = torch.ones(1, 40, 40)
        mask[0, :20] = bad
        masked = preprocess_as_host(image.clamp(0, 1), Encoder(), mask=mask)  # pyright: ignore[reportArgumentType]
        assert masked.isfinite().all()
        model = tiny_host()
        q = noise(2, 256, backend.comfy_layout(model).sites[0].channels, seed=1)
        call = site_call(q, backend.comfy_layout(model).sites[0].heads, size=(16, 16))
        old = patch(model, IPADAPTER_PLUS, mask=mask).add_to(torch.zeros_like(q), 0, call)
        assert old.isfinite().all()
        with pytest.raises(InvalidInputError, match="NaN or infinite"):
            patch(model, mask=mask)


def test_a_mask_on_a_reference_multiplies_normalised_pixels() -> None:
    image = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 40, 60)
    mask[..., 30:] = 1
    plain = preprocess_as_host(image, Encoder())  # pyright: ignore[reportArgumentType]
    masked = preprocess_as_host(image, Encoder(), mask=mask)  # pyright: ignore[reportArgumentType]
    assert_close(masked[..., :10], torch.zeros_like(masked[..., :10]), rtol=0, atol=1e-5)
    assert_close(masked[..., -10:], plain[..., -10:], rtol=0, atol=1e-5)


def test_norm_average_of_the_old_pack_divides_over_the_images() -> None:
    entries = [noise(1, 1, 6, seed=i) for i in range(3)]
    stack = torch.cat(entries)
    expected = (stack / stack.norm(dim=0, keepdim=True)).mean(0, keepdim=True)
    assert_close(combine_features(entries, "norm average", IPADAPTER_PLUS), expected)
    assert not torch.allclose(combine_features(entries, "norm average"), expected)


def test_tiles_are_put_together_where_they_were() -> None:
    """An encoder whose tokens are the pixels themselves gives back the picture, averaged down."""
    image = torch.rand(1, 9, 9, 3, generator=torch.Generator().manual_seed(3))
    tiles = split_tiles(image, 2)  # 4 x 4 each; the last row and column are dropped
    tokens = torch.cat([F.pad(tile.flatten(1, 2), (0, 0, 1, 0), value=float(i)) for i, tile in enumerate(tiles)])
    merged = merge_tiles(tokens)
    assert merged.shape == (1, 17, 3)
    assert_close(merged[:, 0], torch.full((1, 3), 1.5))
    down = F.avg_pool2d(image[:, :8, :8].movedim(-1, 1), 2).flatten(2).mT
    assert_close(merged[:, 1:], down)
    assert_close(merge_tiles(tokens[:, 1:]), merged[:, 1:])  # of SigLIP, which has no class token


def test_pooled_tiles_are_stitched_as_squares_or_averaged() -> None:
    embeds = noise(4, 16, seed=1)
    grid = torch.cat([torch.cat([embeds[2 * y + x].view(4, 4) for x in range(2)], 1) for y in range(2)], 0)
    assert_close(merge_tiles(embeds), F.adaptive_avg_pool2d(grid[None], 4).flatten(1))
    assert_close(merge_tiles(noise(4, 10, seed=1)), noise(4, 10, seed=1).mean(0, keepdim=True))
    with pytest.raises(IncompatibleEncoderError, match="no square picture"):
        merge_tiles(noise(4, 12, 3, seed=1))


def test_embeds_of_another_encoder_are_refused_with_both_shapes() -> None:
    adapter = tiny_adapter(backend.comfy_layout(tiny_host()))
    wrong = noise(2, adapter.spec.feature_dim + 1, seed=0)
    with pytest.raises(IncompatibleEncoderError, match=f"\\(images, {adapter.spec.feature_dim}\\)"):
        prompt_from_features(adapter, wrong, wrong)


# --- layer weights ----------------------------------------------------------------------------------------------------


def test_layer_weights_replace_the_presets_factors_and_keep_its_flips() -> None:
    layout = backend.comfy_layout(tiny_host(SDXL))
    layers = parse_layers("3: 2, 6:0.5,\n0: -1")
    assert layers == ((3, 2.0), (6, 0.5), (0, -1.0))
    plain = WeightSchedule(0.5, layers=layers).site_weights(layout)
    flipped = WeightSchedule(0.5, preset="style transfer precise", layers=layers).site_weights(layout)
    for site, a, b in zip(layout.sites, plain, flipped, strict=True):
        expected = 0.5 * {3: 2.0, 6: 0.5, 0: -1.0}.get(site.order, 0.0)
        assert a.weight == b.weight == expected
        assert not a.flipped
    with pytest.raises(InvalidInputError, match=r"cannot read 'a:1'.*'3: 0.5, 6: 1'"):
        parse_layers("a:1")
