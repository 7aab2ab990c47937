"""What each weight preset does, drawn by the demo world: ``python -m ipadapter_core.demo.presets_sheet OUT.webp``.

The help page of Apply Adapter to Model shows it, and the list of presets in a node its cells (``nodes/web/preset_pictures.js``).
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..attention.presets import PRESETS
from ..attention.schedule import WeightSchedule
from ..generate import to_pillow
from .world import World, load_world

REFERENCE, PROMPT = "sunflower.png", "fish on blue background"
SEED, STEPS = 5, 20
COLUMNS, CELL, LABEL = 4, 120, 24
"""Cells stand in the order of ``PRESETS``, ``CELL`` pixels wide with a gap of 8, each ``LABEL`` above its picture."""
GAP = 8


def draw_presets(world: World, reference: str = REFERENCE, prompt: str = PROMPT, seed: int = SEED, steps: int = STEPS) -> Image.Image:  # fmt: skip
    """One reference and one text under every preset, from the same noise; on top the reference and what the text alone gives."""
    image = world.references.images[world.references.names.index(reference)][None]

    def drawn(schedule: WeightSchedule | None) -> Image.Image:
        given = None if schedule is None else image
        made = world.draw("plus", given, schedule or WeightSchedule(), [prompt], seeds=[seed], steps=steps)
        return to_pillow(made[0].permute(1, 2, 0))

    cells: list[tuple[str, Image.Image | None]] = [
        ("the reference", to_pillow(image[0].permute(1, 2, 0))),
        ("the text alone", drawn(None)),
        ("", None),
        ("", None),
    ]
    cells += [(preset, drawn(WeightSchedule(preset=preset))) for preset in PRESETS]
    rows = -(-len(cells) // COLUMNS)
    size = COLUMNS * (CELL + GAP), rows * (CELL + LABEL + GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (label, picture) in enumerate(cells):
        left, top = GAP // 2 + i % COLUMNS * (CELL + GAP), GAP // 2 + i // COLUMNS * (CELL + LABEL + GAP)
        small = font if font.getlength(label) <= CELL else ImageFont.load_default(size=9.5)
        pen.text((left + CELL / 2, top + LABEL - 6), label, fill="black", font=small, anchor="ms")
        if picture is not None:
            sheet.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (left, top + LABEL))
    said = f'text: "{prompt}"\nstrength 1, the same noise'
    pen.multiline_text((2 * (CELL + GAP) + GAP, LABEL + 40), said, fill=(90, 90, 90), font=font, spacing=6)
    return sheet


if __name__ == "__main__":
    draw_presets(load_world()).save(Path(sys.argv[1]), quality=82, method=6)
