"""The pictures on the cards of the template browser: what the demo world drew for the sheet, one for each workflow.

``python tests/workflows/thumbnails.py`` writes ``workflows/<title>.jpg``, where both ComfyUIs look for them.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from ipadapter_core.demo import sheet

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
DEMO = Path(sheet.__file__).parent
SIDE, EDGE, QUALITY = 512, 10, 72
CELL = 128

Cell = tuple[int, int]
"""Row and column in a sheet, from 0."""
BACON, CUCUMBER, DOG, OWL, SUNFLOWER, GLASS = range(6)
REFERENCE, TEXT, LITTLE, FULL, ALONE, MASKED, STYLE, COMPOSITION = range(8)

BESIDE: dict[str, Cell] = {
    "1": (SUNFLOWER, FULL), "9": (BACON, STYLE), "10": (OWL, FULL), "11": (GLASS, FULL), "12": (SUNFLOWER, ALONE), "13": (CUCUMBER, STYLE), "14": (CUCUMBER, COMPOSITION),
    "15": (DOG, ALONE), "19": (DOG, LITTLE), "20": (SUNFLOWER, MASKED), "22": (BACON, FULL), "23": (OWL, LITTLE),
    "24": (GLASS, MASKED), "25": (GLASS, ALONE), "30": (OWL, STYLE), "31": (DOG, FULL), "33": (SUNFLOWER, LITTLE),
    "34": (BACON, ALONE), "35": (OWL, ALONE),
}  # fmt: skip
"""Workflows, by number, that turn one reference into one picture: the picture, with its reference in a corner."""
FOURS: dict[str, tuple[Cell, Cell, Cell, Cell]] = {
    "3": ((GLASS, REFERENCE), (GLASS, TEXT), (GLASS, LITTLE), (GLASS, FULL)),
    "4": ((OWL, REFERENCE), (SUNFLOWER, REFERENCE), (SUNFLOWER, MASKED), (SUNFLOWER, ALONE)),
    "16": ((OWL, REFERENCE), (SUNFLOWER, REFERENCE), (GLASS, REFERENCE), (SUNFLOWER, FULL)),
    "17": ((DOG, REFERENCE), (DOG, MASKED), (GLASS, REFERENCE), (GLASS, MASKED)),
    "18": ((SUNFLOWER, TEXT), (SUNFLOWER, LITTLE), (SUNFLOWER, STYLE), (SUNFLOWER, FULL)),
    "21": ((OWL, FULL), (GLASS, FULL), (BACON, FULL), (CUCUMBER, FULL)),
    "26": ((BACON, REFERENCE), (CUCUMBER, REFERENCE), (DOG, REFERENCE), (OWL, REFERENCE)),
    "27": ((BACON, ALONE), (CUCUMBER, ALONE), (DOG, ALONE), (OWL, ALONE)),
    "28": ((GLASS, LITTLE), (GLASS, FULL), (GLASS, STYLE), (GLASS, COMPOSITION)),
    "29": ((OWL, REFERENCE), (OWL, MASKED), (OWL, STYLE), (OWL, FULL)),
    "32": ((SUNFLOWER, REFERENCE), (SUNFLOWER, MASKED), (OWL, REFERENCE), (OWL, MASKED)),
    "50": ((DOG, TEXT), (DOG, LITTLE), (DOG, REFERENCE), (DOG, FULL)),
}
"""Workflows about several pictures: four of them."""
PRINTS: dict[str, tuple[Cell, Cell, Cell, Cell]] = {
    "2": ((3, 1), (3, 3), (2, 4), (2, 6)),
    "40": ((0, 1), (0, 2), (0, 3), (0, 6)),
    "41": ((0, 3), (1, 3), (2, 3), (3, 3)),
    "42": ((1, 1), (1, 3), (1, 4), (1, 6)),
    "43": ((2, 1), (2, 2), (2, 3), (2, 6)),
    "44": ((3, 1), (3, 3), (3, 4), (3, 6)),
    "45": ((3, 4), (3, 6), (0, 4), (0, 6)),
    "46": ((2, 4), (2, 6), (0, 1), (0, 3)),
    "47": ((0, 1), (1, 3), (2, 2), (3, 6)),
    "51": ((1, 1), (1, 2), (2, 5), (1, 3)),
}
"""Workflows about LoRAs: four pictures of the sheet of the style LoRA."""


def cell(page: Image.Image, at: Cell) -> Image.Image:
    """One picture of a sheet."""
    row, column = at
    left, top = sheet.LABELS + column * (CELL + sheet.GAP), sheet.HEADER + row * (CELL + sheet.GAP)
    return page.crop((left, top, left + CELL, top + CELL)).convert("RGB")


def beside(page: Image.Image, at: Cell) -> Image.Image:
    """A picture, and in its corner the reference that it follows."""
    picture = cell(page, at).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    reference = cell(page, (at[0], REFERENCE)).resize((CELL, CELL))
    corner = SIDE - CELL - 2 * EDGE
    ImageDraw.Draw(picture).rectangle((corner - 4, corner - 4, corner + CELL + 3, corner + CELL + 3), "white")
    picture.paste(reference, (corner, corner))
    return picture


def four(page: Image.Image, cells: tuple[Cell, Cell, Cell, Cell]) -> Image.Image:
    """Four pictures, row by row, with a white edge between them."""
    side = (SIDE - EDGE) // 2
    made = Image.new("RGB", (SIDE, SIDE), "white")
    for number, at in enumerate(cells):
        place = ((number % 2) * (side + EDGE), (number // 2) * (side + EDGE))
        made.paste(cell(page, at).resize((side, side), Image.Resampling.LANCZOS), place)
    return made


def draw(title: str, page: Image.Image, prints: Image.Image) -> Image.Image:
    """The picture of the workflow of a title, which begins with its number."""
    number = title.split()[0]
    if number in BESIDE:
        return beside(page, BESIDE[number])
    if number in PRINTS:
        return four(prints, PRINTS[number])
    return four(page, FOURS.get(number) or row_of(int(number)))


def row_of(number: int) -> tuple[Cell, Cell, Cell, Cell]:
    """What a workflow without a line of its own gets."""
    row = number % sheet.ROWS
    return (row, REFERENCE), (row, TEXT), (row, LITTLE), (row, FULL)


def drawn() -> dict[Path, Image.Image]:
    """The picture of every workflow, by the file that it belongs in."""
    page, prints = Image.open(DEMO / "sheet.png"), Image.open(DEMO / "style.png")
    return {file.with_suffix(".jpg"): draw(file.stem, page, prints) for file in sorted(FOLDER.glob("*.json"))}


def main() -> None:
    for file, picture in drawn().items():
        picture.save(file, quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()
