"""Pictures of what was recorded: heat maps over the result, and bars for every site."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..models.sites import Site
from .recording import AttentionMaps, Reference

Colour = tuple[int, int, int]
Floats = NDArray[np.float64]

BACK: Colour = (22, 22, 26)
INK: Colour = (236, 236, 240)
FAINT: Colour = (150, 150, 160)
LINE: Colour = (58, 58, 66)
INFERNO: tuple[Colour, ...] = (
    (0, 0, 4), (11, 7, 36), (33, 12, 74), (61, 9, 101), (87, 16, 110), (113, 25, 110), (138, 34, 106), (163, 44, 97),
    (188, 55, 84), (210, 70, 68), (228, 90, 49), (241, 115, 29), (249, 142, 9), (252, 172, 17), (249, 203, 53),
    (242, 234, 105), (252, 255, 164),
)  # fmt: skip
"""Every sixteenth colour of matplotlib's map of that name (CC0): equal steps of a value are equal steps to the eye."""
PALETTE: tuple[Colour, ...] = (
    (86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0), (0, 114, 178), (160, 160, 160),
)  # fmt: skip
"""Of references in bars: Okabe and Ito's, told apart by most who see colours otherwise."""

PANEL = 256
"""Longer side of a panel, in pixels."""
GAP, MARGIN, LABELS, BAR = 16, 24, 200, 110
MOST_ROWS, MOST_BARS = 16, 400


def coloured(values: Floats) -> Floats:
    """Values 0..1 ``y x`` as colours ``y x 3`` in 0..255."""
    table = np.array(INFERNO, dtype=np.float64)
    place = np.clip(np.nan_to_num(values), 0, 1) * (len(table) - 1)
    low = np.minimum(place.astype(np.int64), len(table) - 2)
    part = (place - low)[..., None]
    return table[low] * (1 - part) + table[low + 1] * part


def draw_maps(
    maps: AttentionMaps,
    picture: Image.Image | None = None,
    references: Sequence[Image.Image] = (),
    latent: int = 0,
    *,
    smooth: bool = True,
) -> Image.Image:
    """One row for each reference and one column for the run and each of its stages, over the picture that was made.

    Panels of references share one scale from the least to the most, those of all together have another; bars beside them say which.
    ``references`` are shown in front of their rows where there are as many. Without ``smooth`` every latent stays a square.
    """
    named = [(_name(reference), i) for i, reference in enumerate(maps.references)][:MOST_ROWS]
    rows: list[tuple[str, int | None]] = [*named, ("all references", None)] if len(named) > 1 else [*named]
    stages = [i for i, stage in enumerate(maps.stages) if stage.calls]
    columns: list[int | None] = [None, *stages] if len(stages) > 1 else [None]
    latent = min(latent, maps.latents - 1)
    values = [[_numbers(maps, row, column, latent) for column in columns] for _, row in rows]
    each = len(rows) - (len(rows) > 1)
    ranges = [_range(values[:each])] * each + [_range(values[each:])] * (len(rows) - each)
    height, width = maps.latent
    size = _fitted(picture.size if picture is not None else (width, height), PANEL)
    under = np.full((size[1], size[0], 3), 90.0) if picture is None else _underlay(picture, size)
    left, top, step = MARGIN + LABELS, MARGIN + 78, (size[0] + GAP, size[1] + 44)
    sheet_size = (left + len(columns) * step[0] + BAR, top + max(len(rows), 1) * step[1] + MARGIN - 10)
    sheet = Image.new("RGB", sheet_size, BACK)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 4), "Where did the image act?", fill=INK, font=_font(24))
    pen.text((MARGIN, MARGIN + 28), _subtitle(maps), fill=FAINT, font=_font(13))
    if not rows:
        pen.text((MARGIN, top + 20), "No image prompt acted in this run.", fill=INK, font=_font(16))
        return sheet
    for c, column in enumerate(columns):
        label = "whole run" if column is None else f"progress {maps.stages[column]}"
        pen.text((left + c * step[0] + size[0] / 2, top - 8), label, fill=INK, font=_font(15), anchor="ms")
    for r, (name, number) in enumerate(rows):
        y, (low, high) = top + r * step[1], ranges[r]
        shown = picture if number is None else references[number] if len(references) == len(maps.references) else None
        _label(sheet, pen, name, (MARGIN, y), size[1], shown)
        for c in range(len(columns)):
            share = values[r][c]
            place = (left + c * step[0], y)
            sheet.paste(_overlaid(under, (share - low) / (high - low), size, smooth), place)
            numbers = f"mean {_percent(share.mean())}   most {_percent(share.max())}"
            pen.text((place[0] + size[0] / 2, y + size[1] + 18), numbers, fill=FAINT, font=_font(13), anchor="ms")
    right = left + len(columns) * step[0] + 8
    _scale(sheet, pen, (right, top), (each - 1) * step[1] + size[1], ranges[0])
    if each < len(rows):
        _scale(sheet, pen, (right, top + each * step[1]), size[1], ranges[-1])
    return sheet


def _name(reference: Reference) -> str:
    """Without the ending of the adapter's file, which has no room."""
    return str(reference).replace(".safetensors", "").replace(".bin", "")


def _numbers(maps: AttentionMaps, reference: int | None, stage: int | None, latent: int) -> Floats:
    return maps.map(reference, stage)[latent].double().numpy()


def _range(values: Sequence[Sequence[Floats]]) -> tuple[float, float]:
    """The ends of the scale; the same value everywhere is the middle of one."""
    every = [v for row in values for v in row]
    low, high = min((float(v.min()) for v in every), default=0.0), max((float(v.max()) for v in every), default=1.0)
    return (low, high) if high - low > 1e-4 else (max(low - 0.005, 0.0), high + 0.005)


def _subtitle(maps: AttentionMaps) -> str:
    calls = sum(stage.calls for stage in maps.stages)
    where = f"mean of {len(maps.sites)} attentions, " if maps.sites else ""
    return (
        f"Share of what attention gives to each place that comes from a reference: {where}{calls:g} calls of the model"
    )


def _fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    factor = longest / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _underlay(picture: Image.Image, size: tuple[int, int]) -> Floats:
    """The picture in grey, so that the only colours are the map's."""
    grey = picture.convert("L").resize(size, Image.Resampling.LANCZOS)
    return np.repeat(np.asarray(grey, dtype=np.float64)[..., None], 3, 2)


def _overlaid(under: Floats, share: Floats, size: tuple[int, int], smooth: bool) -> Image.Image:
    """A map 0..1 over a grey picture: its colours lit by the picture, so that both are seen."""
    kind = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    fine = np.asarray(Image.fromarray(share.astype(np.float32)).resize(size, kind), dtype=np.float64)
    light = 0.62 + 0.38 * under / 255
    mixed = 0.2 * under + 0.8 * coloured(fine) * light
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


def _label(sheet: Image.Image, pen: ImageDraw.ImageDraw, name: str, at: tuple[int, int], height: int, picture: Image.Image | None) -> None:  # fmt: skip
    """A reference's name, and its picture where there is one."""
    y = at[1]
    if picture is not None:
        small = picture.convert("RGB").resize(_fitted(picture.size, LABELS - 60), Image.Resampling.LANCZOS)
        sheet.paste(small, (at[0], y))
        y += small.height + 8
    for line in _wrapped(name, _font(14), LABELS - 20)[: max(1, (at[1] + height - y) // 18)]:
        pen.text((at[0], y), line, fill=INK, font=_font(14))
        y += 18


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than ``width``; names of files have no spaces to break at."""
    lines = [""]
    for char in text.encode("latin-1", "replace").decode("latin-1")[:200]:
        if font.getlength(lines[-1] + char) > width:
            words, last, rest = lines[-1].rpartition(" ")
            lines[-1:] = [words, rest] if last else [lines[-1], ""]
        lines[-1] += char
    return lines


def _scale(sheet: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], height: int, ends: tuple[float, float]) -> None:  # fmt: skip
    """The legend: what a colour stands for."""
    low, high = ends
    bar = np.linspace(1, 0, height)[:, None].repeat(18, 1)
    sheet.paste(Image.fromarray(coloured(bar).astype(np.uint8)), at)
    for i in range(5):
        y = at[1] + round((height - 1) * (1 - i / 4))
        pen.line((at[0] + 18, y, at[0] + 23, y), fill=FAINT)
        pen.text((at[0] + 28, y), _percent(low + (high - low) * i / 4), fill=INK, font=_font(13), anchor="lm")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2f} %"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


# --- bars -------------------------------------------------------------------------------------------------------------


def draw_sites(maps: AttentionMaps, latent: int = 0) -> Image.Image:
    """A bar for every site in execution order, stacked of the references' shares; groups stand apart."""
    shares = maps.by_site()[..., min(latent, maps.latents - 1)].double().numpy()[:, :MOST_BARS]
    sites = maps.sites[:MOST_BARS]
    wide = min(72, max(14, 1000 // max(len(sites), 1)))
    legend = 22 * min(len(maps.references), len(PALETTE))
    left, top, height, below = MARGIN + 56, MARGIN + 66 + legend, 280, 96
    breaks = sum(a.group != b.group for a, b in pairwise(sites))
    size = (max(640, left + len(sites) * wide + breaks * 12 + MARGIN), top + height + below)
    sheet = Image.new("RGB", size, BACK)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 4), "Share of every attention that comes from the image", fill=INK, font=_font(22))
    if not maps.references:
        pen.text((MARGIN, top), "No image prompt acted in this run.", fill=INK, font=_font(16))
        return sheet
    for i, name in enumerate(map(_name, maps.references[: len(PALETTE)])):
        y = MARGIN + 34 + 22 * i
        pen.rectangle((MARGIN, y, MARGIN + 14, y + 14), fill=PALETTE[i])
        text = _wrapped(name, _font(14), size[0] - 2 * MARGIN - 120)[0]
        pen.text((MARGIN + 24, y + 7), f"{text}   mean {_percent(float(shares[i].mean()))}", fill=INK, font=_font(14), anchor="lm")  # fmt: skip
    most = _round_up(float(shares.sum(0).max()))
    for i in range(5):
        y = top + height - round(height * i / 4)
        pen.line((left, y, size[0] - MARGIN, y), fill=LINE)
        pen.text((left - 8, y), f"{100 * most * i / 4:g} %", fill=FAINT, font=_font(13), anchor="rm")
    for i, x in enumerate(_places(sites, left, wide)):
        y = float(top + height)
        for r in range(len(shares)):
            tall = height * float(shares[r, i]) / most
            if tall > 0:
                pen.rectangle((x + 2, y - tall, x + wide - 3, y - 1), fill=PALETTE[min(r, len(PALETTE) - 1)])
            y -= tall
        _turned(sheet, maps.labels[i], (x + wide // 2, top + height + 8))
    return sheet


def _places(sites: Sequence[Site], left: int, wide: int) -> Iterator[int]:
    """Left ends of the bars."""
    x = left
    for i, site in enumerate(sites):
        x += 12 if i and site.group != sites[i - 1].group else 0
        yield x
        x += wide


def _round_up(share: float) -> float:
    """A round number not below it, for the axis: quarters of it have few digits."""
    if share <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(share))
    return min((step * unit for step in (1, 2, 4, 6, 8, 10) if step * unit >= share - 1e-12), default=share)


def _turned(sheet: Image.Image, text: str, at: tuple[int, int]) -> None:
    """A label under a bar, upwards."""
    font = _font(12)
    mask = Image.new("L", (math.ceil(font.getlength(text)) + 2, 16))
    ImageDraw.Draw(mask).text((0, 8), text, fill=255, font=font, anchor="lm")
    mask = mask.rotate(90, expand=True)
    sheet.paste(FAINT, (at[0] - mask.width // 2, at[1]), mask)
