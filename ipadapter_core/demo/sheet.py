"""``ipadapter demo``: one labelled sheet of what an image prompt does, and the figures behind it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..attention.schedule import WeightSchedule
from ..backends.diffusers import lora as diffusers_lora
from ..console import progress_bar
from ..generate import save_picture, to_pillow
from ..lora import load_lora
from .measure import contradicting_backgrounds, measure
from .world import FOLDER, References, World, load_world

ROWS = 6
ZOOM = 2
GAP = 8
HEADER = 74
LABELS = 128
TEXT_STRENGTH = 0.6
STYLE = FOLDER / "loras" / "style-lora.safetensors"
"""The shipped LoRA, a poster in blue ink, made by ``train_lora``."""
STYLE_STRENGTHS = (0.0, 0.5, 1.0)


def run(out: Path, *, family: str, steps: int, figures: bool, as_json: bool) -> None:
    """Draw ``demo.png``, measure, write ``demo.json`` and print the figures."""
    started = time.perf_counter()
    world = load_world()
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar("sheet", 7) as progress:
        sheet = draw_sheet(world, family, steps, progress)
    if STYLE.is_file():
        save_picture(draw_style(world, family, steps), out / "style.png", {"lora": STYLE.name, "steps": steps})
    facts: dict[str, object] = {"adapter": family, "steps": steps}
    if figures:
        with progress_bar("figures", 6) as progress:
            found = measure(world, family, steps=steps, progress=progress)
        facts |= found.as_dict()
        if not as_json:
            print(found.table())
    facts["seconds"] = round(time.perf_counter() - started, 1)
    save_picture(sheet, out / "demo.png", facts)
    (out / "demo.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts) if as_json else f"sheet: {out / 'demo.png'} ({facts['seconds']} s)")


def spread(references: References, count: int) -> References:
    """``count`` of the references, evenly spaced."""
    chosen = [round(i * (len(references.names) - 1) / (count - 1)) for i in range(count)]
    return References(
        references.images[chosen],
        tuple(references.names[i] for i in chosen),
        tuple(references.backgrounds[i] for i in chosen),
    )


def draw_sheet(world: World, family: str, steps: int, progress: object = None) -> Image.Image:
    """One row per reference, one column per way of using it; all pictures of a row share their noise."""
    references = spread(world.references, ROWS)
    plain = ["emoji"] * ROWS
    wanted = contradicting_backgrounds(references.backgrounds)
    texts = [f"emoji on {colour} background" for colour in wanted]
    right_half = torch.zeros(64, 64)
    right_half[:, 32:] = 1
    columns: list[tuple[str, WeightSchedule, list[str], Tensor | None]] = [
        ("strength 0\n(text only)", WeightSchedule(strength=0.0), plain, None),
        ("strength 0.5", WeightSchedule(strength=0.5), plain, None),
        ("strength 1", WeightSchedule(strength=1.0), plain, None),
        (f"strength {TEXT_STRENGTH},\ntext sets the\nbackground", WeightSchedule(strength=TEXT_STRENGTH), texts, None),
        ("mask: right\nhalf only", WeightSchedule(strength=1.0), plain, right_half),
        ("style only", WeightSchedule(strength=1.0, preset="style transfer"), plain, None),
        ("composition\nonly", WeightSchedule(strength=1.0, preset="composition"), plain, None),
    ]
    seeds = list(range(100, 100 + ROWS))
    drawn: list[tuple[str, Tensor]] = [("reference\n(never trained)", references.images)]
    for i, (label, schedule, prompts, mask) in enumerate(columns):
        drawn.append(
            (label, world.draw(family, references.images, schedule, prompts, seeds=seeds, steps=steps, mask=mask))
        )
        if callable(progress):
            progress(i + 1, len(columns))
    return compose(drawn, [name.rsplit(".", 1)[0] for name in references.names], wanted)


def draw_style(world: World, family: str, steps: int, file: Path = STYLE) -> Image.Image:
    """One row per reference: a live LoRA at several strengths, alone and together with the image prompt, from the same noise.

    Only the number changes from column to column; no weight is written.
    """
    references = spread(world.references, ROWS)
    prompts, seeds = ["emoji"] * ROWS, list(range(100, 100 + ROWS))
    drawn: list[tuple[str, Tensor]] = [("reference\n(never trained)", references.images)]
    patch = diffusers_lora.place(world.pipeline, load_lora(file))
    for images, label, schedule in (
        (None, "text only", WeightSchedule()),
        (references.images, "with the image", WeightSchedule(strength=1.0)),
    ):
        with diffusers_lora.apply(world.pipeline, patch, branches=("uncond", "cond")) as lora:
            for strength in STYLE_STRENGTHS:
                lora.set_strength(strength)
                pictures = world.draw(family, images, schedule, prompts, seeds=seeds, steps=steps)
                drawn.append((f"{label},\nstyle LoRA {strength:g}", pictures))
    return compose(drawn, [name.rsplit(".", 1)[0] for name in references.names], [""] * ROWS)


def compose(columns: list[tuple[str, Tensor]], names: list[str], wanted: list[str]) -> Image.Image:
    """Pictures in labelled columns and rows."""
    side = columns[0][1].shape[-1] * ZOOM
    rows = len(names)
    sheet = Image.new("RGB", (LABELS + len(columns) * (side + GAP), HEADER + rows * (side + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for c, (label, pictures) in enumerate(columns):
        left = LABELS + c * (side + GAP)
        pen.multiline_text((left + side / 2, HEADER - 6), label, fill="black", font=font, anchor="md", align="center")
        for r in range(rows):
            picture = to_pillow(pictures[r].permute(1, 2, 0)).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left, HEADER + r * (side + GAP)))
    for r, name in enumerate(names):
        words = name.replace("-", " ") + (f"\ntext asks for\n{wanted[r]}" if wanted[r] else "")
        top = HEADER + r * (side + GAP) + side / 2
        pen.multiline_text((LABELS - 10, top), words, fill="black", font=font, anchor="rm", align="right")
    return sheet
