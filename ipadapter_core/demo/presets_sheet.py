"""What each weight preset does, drawn by the demo world: ``python -m ipadapter_core.demo.presets_sheet FOLDER``.

``presets.webp`` is one reference under all of them: the help page of Apply Adapter to Model shows it, and the list of presets in a node
its cells (``nodes/web/preset_pictures.js``). ``gallery.webp`` has several, for the page of that name.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

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


GALLERY = (
    ("sunflower.png", "fish on blue background"),
    ("owl.png", "hamburger on orange background"),
    ("wine-glass.png", "cat on red background"),
    ("guide-dog.png", "watermelon on grey background"),
    ("leopard.png", "penguin on yellow background"),
)
"""References of the gallery, and what the text names beside each."""
NAMES, HEADER = 170, 48
"""Room for the presets' names on the left of the gallery, and for the texts above it."""


def draw_gallery(world: World, pairs: Sequence[tuple[str, str]] = GALLERY, seed: int = SEED, steps: int = STEPS) -> Image.Image:  # fmt: skip
    """One row for each preset, one column for each reference with its text; on top the references and what the texts give."""
    images = torch.stack([world.references.images[world.references.names.index(reference)] for reference, _ in pairs])
    texts = [text for _, text in pairs]

    def drawn(preset: str, strength: float = 1) -> Sequence[Tensor]:
        schedule = WeightSchedule(strength=strength, preset=preset)
        made = world.draw("plus", images, schedule, texts, seeds=[seed] * len(pairs), steps=steps)
        return [picture.permute(1, 2, 0) for picture in made]

    rows = [("the reference", [picture.permute(1, 2, 0) for picture in images]), ("the text alone", drawn("linear", 0))]
    rows += [(preset, drawn(preset)) for preset in PRESETS]
    sheet = Image.new("RGB", (NAMES + len(pairs) * (CELL + GAP), HEADER + len(rows) * (CELL + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, text in enumerate(texts):
        middle = NAMES + column * (CELL + GAP) + CELL / 2
        pen.multiline_text(
            (middle, HEADER - 6),
            text.removesuffix(" background").replace(" on ", "\non "),
            "black",
            font,
            "md",
            align="center",
        )
    for row, (name, pictures) in enumerate(rows):
        top = HEADER + row * (CELL + GAP)
        pen.multiline_text((NAMES - 12, top + CELL / 2), _two_lines(name), "black", font, "rm", align="right")
        for column, picture in enumerate(pictures):
            large = to_pillow(picture).resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(large, (NAMES + column * (CELL + GAP), top))
    return sheet


def _two_lines(name: str) -> str:
    return name if len(name) < 20 else "\nand ".join(name.rsplit(" and ", 1))


def main() -> None:
    folder, world = Path(sys.argv[1]), load_world()
    draw_presets(world).save(folder / "presets.webp", quality=82, method=6)
    draw_gallery(world).save(folder / "gallery.webp", quality=82, method=6)


if __name__ == "__main__":
    main()
