"""Region masks on the grid of every level: tokens cover exactly the latents that the UNet's strides give them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ipadapter_core.attention.batch import Frames
from ipadapter_core.attention.masks import RegionMask
from ipadapter_core.device_cache import LIMIT
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.models.grids import Patches, Pyramid, TokenGrid

LIKE = torch.zeros(1)


def grid_of(
    mask: Tensor,
    latent: tuple[int, int],
    grid: tuple[int, int],
    *,
    area: tuple[int, int, int, int] | None = None,
    batch: int = 1,
) -> Tensor:
    seen = latent if area is None else area[:2]
    found = Pyramid().grid(seen, grid[0] * grid[1], grid)
    assert found is not None
    return RegionMask.from_tensor(mask).grid(latent, area, found, LIKE, batch)


def levels(latent: tuple[int, int], count: int = 4) -> list[tuple[int, int]]:
    """The sizes that stride-2, padding-1 convolutions give: taken from torch, not from a formula."""
    sizes, x = [latent], torch.zeros(1, 1, *latent)
    convolution = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1)
    for _ in range(count - 1):
        x = convolution(x)
        sizes.append((x.shape[-2], x.shape[-1]))
    return sizes


LATENTS = [(64, 64), (97, 96), (97, 127), (45, 128), (13, 11), (9, 24), (1, 1), (1, 7)]
"""In latents; (97, 96) are 776 x 768 pixels and (45, 128) the 128 x 45 of issue #130, both sheared by the old pack."""


def covered(latent: int, level: int) -> list[range]:
    """Latents under each token of one axis: 2^level of them, the last token what is left."""
    step = 2**level
    return [range(start, min(start + step, latent)) for start in range(0, latent, step)]


@pytest.mark.parametrize("latent", LATENTS)
def test_the_level_is_found_by_its_token_count(latent: tuple[int, int]) -> None:
    for level, size in enumerate(levels(latent)):
        grid = Pyramid().grid(latent, size[0] * size[1])
        assert grid is not None
        assert grid[:2] == size
        assert Pyramid().grid(latent, size[0] * size[1], size) == grid
        assert grid.cell == 2**level or size in levels(latent)[:level]


def test_the_map_of_776_x_768_pixels() -> None:
    """Level 2 of SD1.5 is 25 x 24 (rows first), where the old pack computes 24 x 25."""
    assert Pyramid().grid((97, 96), 25 * 24) == (25, 24, 4)
    assert Pyramid().grid((45, 128), 12 * 32) == (12, 32, 4)


@pytest.mark.parametrize("tokens", [1025, 100, 3, 0])
def test_counts_that_are_no_level(tokens: int) -> None:
    assert Pyramid().grid((32, 32), tokens) is None
    assert Pyramid().grid((32, 32), tokens, (16, 16)) is None


@pytest.mark.parametrize(("shape", "cell"), [((20, 24), 1), ((12, 12), 2), ((8, 4), 4), ((40, 40), 1)])
def test_a_shape_between_levels_starts_from_the_level_above(shape: tuple[int, int], cell: int) -> None:
    """Deep shrink: the mask is averaged down as far as levels go and then resampled."""
    assert Pyramid().grid((32, 32), shape[0] * shape[1], shape) == (*shape, cell)


@pytest.mark.parametrize("latent", LATENTS)
def test_a_transformer_has_one_token_for_a_patch(latent: tuple[int, int]) -> None:
    """Rounded up, as its embedding pads; more tokens than that belong to reference pictures."""
    rows, columns = (latent[0] + 1) // 2, (latent[1] + 1) // 2
    for more in (0, 7):
        assert Patches(2).grid(latent, rows * columns + more) == (rows, columns, 2)
    assert Patches(2).grid(latent, rows * columns - 1) is None
    mask = torch.rand(latent, generator=torch.Generator().manual_seed(0))
    got = RegionMask.from_tensor(mask).grid(latent, None, TokenGrid(rows, columns, 2), LIKE, 1).reshape(rows, columns)
    for row, column in ((0, 0), (rows - 1, columns - 1)):
        assert_close(got[row, column], mask[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean())


def test_patches_of_an_odd_side() -> None:
    mask = torch.rand(9, 12, generator=torch.Generator().manual_seed(0))
    grid = Patches(3).grid((9, 12), 12)
    assert grid == (3, 4, 3)
    got = RegionMask.from_tensor(mask).grid((9, 12), None, grid, LIKE, 1)
    assert_close(got.reshape(3, 4), mask.reshape(3, 3, 4, 3).mean((1, 3)))


@pytest.mark.parametrize("latent", LATENTS)
def test_a_binary_mask_lights_exactly_the_tokens_over_it(latent: tuple[int, int]) -> None:
    """One lit latent: one token, with the share of its latents that are lit; computed by counting latents."""
    y, x = latent[0] * 2 // 3, latent[1] // 2
    mask = torch.zeros(latent)
    mask[y, x] = 1
    for level, size in enumerate(levels(latent)):
        rows, columns = covered(latent[0], level), covered(latent[1], level)
        assert (len(rows), len(columns)) == size
        got = grid_of(mask, latent, size).reshape(size)
        assert got.count_nonzero() == 1
        expected = [[float(y in r and x in c) for c in columns] for r in rows]
        assert torch.equal(got > 0, torch.tensor(expected) > 0)


@pytest.mark.parametrize("latent", [(64, 64), (32, 48), (16, 8)])
def test_soft_masks_are_averages_over_their_latents(latent: tuple[int, int]) -> None:
    mask = torch.rand(8 * latent[0], 8 * latent[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for level, size in enumerate(levels(latent)):
        step = 8 * 2**level
        expected = mask.reshape(size[0], step, size[1], step).mean((1, 3)).float()
        got = grid_of(mask, latent, size).reshape(size)
        assert_close(got, expected, rtol=0, atol=1e-6)
        assert_close(got.mean(), mask.mean().float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (333, 200)])
def test_constant_masks_stay_constant(latent: tuple[int, int], shape: tuple[int, int]) -> None:
    for value in (0.0, 0.3, 1.0):
        for size in levels(latent):
            got = grid_of(torch.full(shape, value), latent, size)
            assert got.shape == (1, size[0] * size[1], 1)
            assert_close(got, torch.full_like(got, value), rtol=0, atol=1e-4)  # fp32 sums of up to 10^4 pixels


def test_the_halves_of_an_odd_size_do_not_shear() -> None:
    """The left half of 97 x 96 latents is the left half of every row at every level: the old pack's rows drift."""
    mask = torch.zeros(97, 96)
    mask[:, :48] = 1
    for size in levels((97, 96)):
        got = grid_of(mask, (97, 96), size).reshape(size)
        assert torch.equal(got, got[:1].expand_as(got))
        assert torch.equal(got[0, : size[1] // 2], torch.ones(size[1] // 2))
        assert torch.equal(got[0, size[1] // 2 :], torch.zeros(size[1] - size[1] // 2))


# --- areas -------------------------------------------------------------------------------------------------------------


def test_an_area_sees_its_part() -> None:
    mask = torch.rand(32, 48, generator=torch.Generator().manual_seed(0))
    height, width, top, left = 16, 24, 8, 4
    got = grid_of(mask, (32, 48), (16, 24), area=(height, width, top, left))
    assert_close(got.reshape(16, 24), mask[8:24, 4:28], rtol=0, atol=1e-6)
    coarse = grid_of(mask, (32, 48), (8, 12), area=(height, width, top, left))
    assert_close(coarse.reshape(8, 12), mask[8:24, 4:28].reshape(8, 2, 12, 2).mean((1, 3)), rtol=0, atol=1e-6)


def test_an_area_of_an_odd_size_has_levels_of_its_own() -> None:
    mask = torch.zeros(32, 32)
    mask[10:23, 5:16] = 1  # the area exactly
    for size in levels((13, 11)):
        got = grid_of(mask, (32, 32), size, area=(13, 11, 10, 5))
        assert_close(got, torch.ones_like(got), rtol=0, atol=1e-6)


# --- one per latent ------------------------------------------------------------------------------------------------------


def test_one_mask_serves_the_batch() -> None:
    assert grid_of(torch.ones(8, 8), (8, 8), (8, 8), batch=5).shape == (1, 64, 1)


@pytest.mark.parametrize(
    ("masks", "batch", "expected"), [(3, 3, [0, 1, 2]), (3, 2, [0, 1]), (2, 4, [0, 1, 1, 1]), (3, 1, [0])]
)
def test_surplus_masks_are_dropped_and_missing_ones_repeat_the_last(
    masks: int, batch: int, expected: list[int]
) -> None:
    values = torch.arange(masks, dtype=torch.float32) / 4
    got = grid_of(values[:, None, None].expand(-1, 8, 8), (8, 8), (4, 4), batch=batch)
    assert got.shape == (batch, 16, 1)
    assert_close(got[:, 0, 0], values[expected], rtol=0, atol=1e-6)


def test_grids_are_computed_once_per_resolution() -> None:
    mask = RegionMask.from_tensor(torch.rand(16, 16))
    first = mask.grid((16, 16), None, TokenGrid(8, 8, 2), LIKE, 1)
    assert mask.grid((16, 16), None, TokenGrid(8, 8, 2), LIKE, 1) is first
    assert mask.grid((16, 16), None, TokenGrid(4, 4, 4), LIKE, 1) is not first
    assert mask.grid((16, 16), None, TokenGrid(8, 8, 2), LIKE.half(), 1).dtype == torch.float16


def test_grids_of_an_animations_windows_are_forgotten() -> None:
    """A long animation has a window for every few frames; the last ones are kept."""
    mask = RegionMask.from_tensor(torch.rand(1000, 8, 8))
    grids = [mask.grid((8, 8), None, TokenGrid(8, 8, 1), LIKE, 2, Frames((i, i + 1), 1000)) for i in range(300)]
    kept = mask._grids  # pyright: ignore[reportPrivateUsage]
    assert len(kept) == LIMIT
    assert mask.grid((8, 8), None, TokenGrid(8, 8, 1), LIKE, 2, Frames((299, 300), 1000)) is grids[-1]
    again = mask.grid((8, 8), None, TokenGrid(8, 8, 1), LIKE, 2, Frames((0, 1), 1000))
    assert again is not grids[0]
    assert torch.equal(again, grids[0])
    assert len(kept) == LIMIT


def test_a_grid_of_no_level_is_resized() -> None:
    """A patched UNet may shrink by other factors; the mean stays."""
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1
    got = grid_of(mask, (32, 32), (24, 24)).reshape(24, 24)
    assert_close(got.mean(), torch.tensor(0.5), rtol=0, atol=1e-6)
    assert got[0, 0] == 1.0
    assert got[0, -1] == 0.0
    larger = grid_of(mask, (32, 32), (64, 64)).reshape(64, 64)
    assert_close(larger.mean(), torch.tensor(0.5), rtol=0, atol=1e-6)


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8), (3, 1, 8, 8)])
def test_shapes_that_are_masks(shape: tuple[int, ...]) -> None:
    assert RegionMask.from_tensor(torch.ones(shape)).values.shape == (3 if shape[0] == 3 else 1, 8, 8)


@pytest.mark.parametrize("shape", [(8,), (), (1, 3, 8, 8), (0, 8, 8), (8, 0), (1, 1, 1, 8, 8)])
def test_shapes_that_are_none(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="region mask"):
        RegionMask.from_tensor(torch.ones(shape))


def test_values_are_clamped_and_must_be_finite() -> None:
    assert RegionMask.from_tensor(torch.tensor([[-1.0, 0.5, 7.0]])).values.tolist() == [[[0.0, 0.5, 1.0]]]
    assert RegionMask.from_tensor(torch.ones(2, 2, dtype=torch.bool)).values.dtype == torch.float32
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InvalidInputError, match="NaN"):
            RegionMask.from_tensor(torch.tensor([[bad]]))


def test_a_mask_is_checked_and_clamped_with_one_copy_of_it() -> None:
    """Masks of 16,384² took four times their own memory."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Outputs(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    mask = torch.rand(1, 64, 64)
    with Outputs():
        RegionMask.from_tensor(mask)
    assert sum(size >= mask.numel() for size in sizes) <= 3, (
        "detach, which copies nothing (two calls before torch 2.9), and clamp"
    )
