"""Pictures of a region as layers see it: the grids of a model, and every token's share of the mask."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ipadapter_core.attention.masks import RegionMask
from ipadapter_core.attention.region_pictures import GAP, PANEL, draw_region, grids_of
from ipadapter_core.models.grids import Patches, Pyramid


def test_grids_are_those_of_the_models_layers() -> None:
    assert [grid[:2] for grid in grids_of(Pyramid(), (64, 48))] == [(64, 48), (32, 24), (16, 12), (8, 6)]
    assert [grid[:2] for grid in grids_of(Pyramid(), (5, 3))] == [(5, 3), (3, 2), (2, 1), (1, 1)]
    assert [grid[:2] for grid in grids_of(Patches(), (64, 47))] == [(32, 24)]


def test_tokens_inside_are_coloured_and_those_outside_are_not() -> None:
    values = torch.zeros(2, 32, 32)
    values[0, :, :16] = 1
    values[1, :, 16:] = 1
    grids = grids_of(Patches(), (8, 8))
    left, right = (
        np.asarray(
            draw_region(RegionMask.from_tensor(values), (8, 8), grids, Image.new("RGB", (9, 9), "white"), number)
        )
        for number in (0, 1)
    )
    assert left.shape[1] == PANEL + 2 * GAP
    inside, outside = left[GAP + 10, GAP + 10], left[GAP + 10, GAP + PANEL - 10]
    assert inside[2] > inside[0]
    assert outside[0] == outside[1] == outside[2]
    np.testing.assert_array_equal(right[GAP + 10, GAP + PANEL - 10], inside)


def test_a_token_on_the_edge_takes_its_share() -> None:
    values = torch.zeros(8, 8)
    values[:, :3] = 1  # of four tokens of two latents each, the second is half inside
    sheet = np.asarray(draw_region(RegionMask.from_tensor(values), (8, 8), grids_of(Patches(), (8, 8)))).astype(int)
    colours = [sheet[GAP + 20, GAP + x, 2] for x in (20, 92, 164)]
    assert colours[0] > colours[1] > colours[2]
    assert abs(colours[1] - (colours[0] + colours[2]) / 2) <= 1
