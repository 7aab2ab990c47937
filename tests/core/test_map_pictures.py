"""Pictures of what was recorded: what is bright, on which scale, and how much room there is."""

# pyright: basic, reportPrivateImportUsage=false

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ipadapter_core import ModelCall, SiteCall, WeightSchedule, bake
from ipadapter_core.attention.call import COND
from ipadapter_core.attention.map_pictures import BACK, INFERNO, PALETTE, coloured, draw_maps, draw_sites
from ipadapter_core.attention.recording import AttentionMaps, Recorder
from ipadapter_core.backends.comfy import doors as comfy
from tiny_models import SDXL, noise, tiny_adapter, tiny_host, tiny_prompt

LATENT = (8, 16)
LEFT, TOP = 224, 102
"""Where the first panel begins."""


def recorded(*strengths: float, kind: str = "small", mask: Tensor | None = None, stages: int = 2) -> AttentionMaps:
    """A call in each stage; prompts of one adapter, each with one reference."""
    layout = comfy.comfy_layout(tiny_host(kind))
    adapter, recorder = tiny_adapter(layout), Recorder(stages)
    patches = [
        bake(adapter, tiny_prompt(adapter, seed=i), layout, WeightSchedule(s), mask) for i, s in enumerate(strengths)
    ]
    for percent in (0.1, 0.9):
        call = recorder.begin(ModelCall((COND,), lambda percent=percent: percent, latent=LATENT))
        for i, site in enumerate(layout.sites):
            q = noise(1, 128 if kind == "small" else 32, site.channels, seed=i)
            base = q
            for patch in patches:
                base = patch.add_to(base, i, SiteCall(call, q, site.heads))
    return recorder.maps()


def panel(sheet: Image.Image, row: int = 0, column: int = 0, size: tuple[int, int] = (256, 128)) -> np.ndarray:
    left, top = LEFT + column * (size[0] + 16), TOP + row * (size[1] + 44)
    return np.asarray(sheet.crop((left, top, left + size[0], top + size[1])), dtype=float)


def test_a_masked_half_is_dark_and_the_other_bright() -> None:
    mask = torch.zeros(LATENT)
    mask[:, 8:] = 1
    sheet = draw_maps(recorded(1.0, mask=mask), Image.new("RGB", (512, 256), "white"), smooth=False)
    for column in range(3):  # the run and both of its stages
        seen = panel(sheet, column=column)
        assert seen[:, :120].mean() < 60
        assert seen[:, 136:].mean() > 100
    assert sheet.size == (LEFT + 3 * 272 + 110, TOP + 172 + 14)


def test_one_row_for_each_reference_and_one_for_all() -> None:
    maps = recorded(1.0, 0.3, 0.1)
    assert draw_maps(maps).size == (LEFT + 3 * 272 + 110, TOP + 4 * 172 + 14)
    few = recorded(1.0, stages=1)
    assert draw_maps(few).size == (LEFT + 272 + 110, TOP + 172 + 14)
    sheet = draw_maps(maps, Image.new("RGB", (512, 256), (90, 90, 90)))
    means = [panel(sheet, row=row).mean() for row in range(3)]
    assert means == sorted(means, reverse=True), "references share one scale, so the stronger is brighter"


def test_the_pictures_stand_beside_their_maps() -> None:
    maps = recorded(1.0, 0.5)
    red, blue = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 255))
    sheet = draw_maps(maps, None, [red, blue])
    assert sheet.getpixel((30, TOP + 5)) == (255, 0, 0)
    assert sheet.getpixel((30, TOP + 172 + 5)) == (0, 0, 255)
    assert draw_maps(maps, None, [red]).getpixel((30, TOP + 100)) == BACK, "one picture for two references is nobody's"


def test_nothing_recorded_is_said_and_names_are_strangers() -> None:
    nothing = recorded(0.0)
    assert draw_maps(nothing).size[0] > LEFT
    assert draw_sites(nothing).size[0] == 640
    odd = recorded(1.0)
    object.__setattr__(odd.references[0], "name", "x" * 5000 + "\n\0 漢字")
    assert draw_maps(odd).size == draw_maps(recorded(1.0)).size
    assert draw_sites(odd).size == draw_sites(recorded(1.0)).size


@pytest.mark.parametrize("kind", ["small", SDXL])
def test_a_bar_for_every_site_as_tall_as_its_share(kind: str) -> None:
    maps = recorded(1.0, 0.4, kind=kind)
    picture = np.asarray(draw_sites(maps))
    shares = maps.by_site().mean(-1)
    counts = [(picture == np.array(colour)).all(-1) for colour in PALETTE[:2]]
    chart = [count[120:].sum(0) for count in counts]  # below the legend, in pixels a column
    tallest = [max(map(int, column)) for column in chart]
    most = shares.sum(0).max()
    for r in range(2):
        assert tallest[r] > 0
    scale = tallest[0] / float(shares[0].max())
    assert tallest[1] == pytest.approx(scale * float(shares[1].max()), abs=3)
    assert scale * float(most) <= 281
    bars = int(((chart[0] > 0)[1:] & ~(chart[0] > 0)[:-1]).sum())
    assert bars == int((shares[0] > 0).sum())


def test_equal_steps_have_rising_light() -> None:
    """A perceptual map: brightness rises with the value, and the ends are the table's."""
    values = np.linspace(0, 1, 101)[None]
    light = coloured(values)[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert bool((np.diff(light) > 0).all())
    assert coloured(np.array([[-1.0, 2.0, np.nan]]))[0].tolist() == [list(INFERNO[0]), list(INFERNO[-1]), list(INFERNO[0])]  # fmt: skip
