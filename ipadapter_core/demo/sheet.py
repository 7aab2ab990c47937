"""``ipadapter demo``: one labelled sheet of what an image prompt does, and the figures behind it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..attention.schedule import WeightSchedule
from ..backends.diffusers import lora as diffusers_lora
from ..backends.diffusers.pipelines import model_of
from ..console import progress_bar
from ..generate import save_picture, to_pillow
from ..lora import load_lora
from ..models import layout_of
from .halves import right_half_mask
from .measure import NAMED, STYLE, STYLE_STRENGTH, STYLED, contradicting_backgrounds, measure
from .pictures import SIZE
from .world import FOLDER, References, World, load_world

ROWS, STYLE_ROWS = 6, 4
ZOOM = 2
GAP = 8
HEADER = 74
LABELS = 128
LEANING = 0.3
"""A strength at which the picture shows both what the text names and the image."""
STYLE_STRENGTHS = (0.0, 0.6, STYLE_STRENGTH)
SEEDS = range(100, 100 + ROWS)


def run(
    out: Path, *, family: str, steps: int, figures: bool = True, as_json: bool = False, folder: Path = FOLDER
) -> None:
    """Draw ``demo.png`` with an adapter of the world in ``folder``, measure, write ``demo.json`` and print the figures."""
    started = time.perf_counter()
    world, style = load_world(folder), folder / "loras" / STYLE.name
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar("sheet", 7) as progress:
        sheet = draw_sheet(world, family, steps, progress)
    if style.is_file():
        save_picture(draw_style(world, family, steps, style), out / "style.png", {"lora": style.name, "steps": steps})
    facts: dict[str, object] = {"adapter": family, "steps": steps}
    if figures:
        with progress_bar("figures", 5) as progress:
            found = measure(world, family, steps=steps, style=style, progress=progress)
        facts |= found.as_dict()
        if not as_json:
            print(found.table())
    facts["seconds"] = round(time.perf_counter() - started, 1)
    save_picture(sheet, out / "demo.png", facts)
    (out / "demo.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts) if as_json else f"sheet: {out / 'demo.png'} ({facts['seconds']} s)")


def shown(references: References, rows: int = ROWS) -> tuple[References, list[str], list[str]]:
    """The first ``rows`` of ROWS references, evenly spaced, and for each what the text names beside it: subject and background."""
    chosen = [round(i * (len(references.names) - 1) / (ROWS - 1)) for i in range(rows)]
    some = References(
        references.images[chosen],
        tuple(references.names[i] for i in chosen),
        tuple(references.backgrounds[i] for i in chosen),
    )
    return some, [NAMED[i] for i in chosen], contradicting_backgrounds(some.backgrounds)


def draw_sheet(world: World, family: str, steps: int, progress: object = None) -> Image.Image:
    """One row per reference, one column per way of using it; all pictures of a row share their text and their noise."""
    references, named, colours = shown(world.references)
    texts = [f"{word} on {colour} background" for word, colour in zip(named, colours, strict=True)]
    right_half = right_half_mask(SIZE)
    columns: list[tuple[str, WeightSchedule, list[str], Tensor | None]] = [
        ("strength 0\n(text only)", WeightSchedule(strength=0.0), texts, None),
        (f"strength {LEANING}", WeightSchedule(strength=LEANING), texts, None),
        ("strength 1", WeightSchedule(), texts, None),
        ("strength 1,\ntext: emoji", WeightSchedule(), ["emoji"] * ROWS, None),
        ("mask: right\nhalf only", WeightSchedule(), texts, right_half),
    ]
    if layout_of(model_of(world.pipeline)).model.roles is not None:
        columns += [
            ("style only", WeightSchedule(preset="style transfer"), texts, None),
            ("composition\nonly", WeightSchedule(preset="composition"), texts, None),
        ]
    drawn: list[tuple[str, Tensor]] = [("reference\n(never trained)", references.images)]
    for i, (label, schedule, prompts, mask) in enumerate(columns):
        drawn.append(
            (label, world.draw(family, references.images, schedule, prompts, seeds=SEEDS, steps=steps, mask=mask))
        )
        if callable(progress):
            progress(i + 1, len(columns))
    return compose(drawn, labels(references, texts))


def draw_style(world: World, family: str, steps: int, file: Path = STYLE) -> Image.Image:
    """One row per reference: a live LoRA at several strengths, alone and together with the image prompt, from the same noise.

    Only the number changes from column to column; no weight is written.
    """
    references, named, colours = shown(world.references, STYLE_ROWS)
    texts = [f"{word} on {colour} background" for word, colour in zip(named, colours, strict=True)]
    drawn: list[tuple[str, Tensor]] = [("reference\n(never trained)", references.images)]
    patch = diffusers_lora.place(world.pipeline, load_lora(file))
    for images, label, prompts, schedule in (
        (None, "text only", texts, WeightSchedule()),
        (references.images, "image: layout", ["emoji"] * STYLE_ROWS, STYLED),
    ):
        with diffusers_lora.apply(world.pipeline, patch, branches=("uncond", "cond")) as lora:
            for strength in STYLE_STRENGTHS:
                lora.set_strength(strength)
                pictures = world.draw(family, images, schedule, prompts, seeds=SEEDS[:STYLE_ROWS], steps=steps)
                drawn.append((f"{label},\nstyle LoRA {strength:g}", pictures))
    return compose(drawn, labels(references, texts))


def labels(references: References, texts: Sequence[str]) -> list[str]:
    """What stands before each row: the reference's name and what the text asks for."""
    names = (name.rsplit(".", 1)[0].replace("-", " ") for name in references.names)
    asked = (text.removesuffix(" background").replace(" on ", "\non ") for text in texts)
    return [f"{name}\ntext: {words}" for name, words in zip(names, asked, strict=True)]


def compose(columns: list[tuple[str, Tensor]], rows: Sequence[str]) -> Image.Image:
    """Pictures in labelled columns and rows."""
    side = columns[0][1].shape[-1] * ZOOM
    sheet = Image.new("RGB", (LABELS + len(columns) * (side + GAP), HEADER + len(rows) * (side + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for c, (label, pictures) in enumerate(columns):
        left = LABELS + c * (side + GAP)
        pen.multiline_text((left + side / 2, HEADER - 6), label, fill="black", font=font, anchor="md", align="center")
        for r in range(len(rows)):
            picture = to_pillow(pictures[r].permute(1, 2, 0)).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left, HEADER + r * (side + GAP)))
    for r, words in enumerate(rows):
        top = HEADER + r * (side + GAP) + side / 2
        pen.multiline_text((LABELS - 10, top), words, fill="black", font=font, anchor="rm", align="right")
    return sheet
