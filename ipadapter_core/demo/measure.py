"""The demo world's figures: does the picture follow the reference, does the text keep its say, does a mask confine the
image, does it go together with a style LoRA?

All on emoji that no training saw. The text names another subject and another background than the reference's. ``judge`` judges,
which shares nothing with the adapter's encoder; only halves under a mask are compared by ``halves``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.schedule import WeightSchedule
from ..backends.diffusers import lora as diffusers_lora
from ..lora import load_lora
from .halves import Half, half_similarity, right_half_mask
from .judge import background_names, similarity, with_decoys
from .pictures import BACKGROUNDS, SIZE
from .poster import off_the_inks, posters
from .world import STYLE, World

STYLED = WeightSchedule(preset="composition", end_percent=0.5)
"""How the image leaves colours and texture to a style LoRA: it acts where the layout is decided, and not on the last steps."""
STYLE_STRENGTH = 1.25
NAMED = (
    "fox face", "tulip", "beer", "koala", "tomato", "penguin", "rose", "mushroom", "pig", "watermelon", "corn", "strawberry",
    "cactus", "doughnut", "hamburger", "tiger face", "crab", "icecream", "panda face", "eggplant", "bear", "cherries",
    "monkey face", "cat",
)  # fmt: skip
"""What the text names beside each reference: words that the world knows; it never learned those of its references."""


@dataclass(frozen=True, slots=True)
class MaskFigures:
    """Similarities of subjects' halves (``halves``), with the image in the right half alone."""

    inside: float
    """Of the masked half to the reference's."""
    inside_unmasked: float
    """The same with the image everywhere."""
    inside_without: float
    """The same without the image."""
    outside: float
    """Of the other half to that of the picture without the image."""
    outside_unmasked: float
    """The same with the image everywhere."""


@dataclass(frozen=True, slots=True)
class StyleFigures:
    """A style LoRA and the image prompt at once: is the picture a poster, and one of the reference?"""

    poster: float
    """How much of the plain pictures' distance to ink on paper is gone; 1 is all of it."""
    right: float
    """Share of pictures that are nearest to their own reference's poster."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What measure() finds; shares are of ``candidates`` references, of which two thirds are decoys in wrong hues."""

    candidates: int
    references: int
    similarity: dict[float, float]
    retrieval: dict[float, float]
    text_background: dict[float, float]
    mask: MaskFigures
    style: StyleFigures | None

    def as_dict(self) -> dict[str, Any]:
        def rounded(values: dict[Any, float]) -> dict[str, float]:
            return {str(key): round(value, 3) for key, value in values.items()}

        facts: dict[str, Any] = {
            "similarity_to_reference": rounded(self.similarity),
            f"right_reference_of_{self.candidates}": rounded(self.retrieval),
            "background_the_text_asks_for": rounded(self.text_background),
            "mask": rounded(asdict(self.mask)),
        }
        return facts if self.style is None else facts | {"style_lora": rounded(asdict(self.style))}

    def table(self) -> str:
        """The figures as aligned text."""
        lines = [f"{'strength':<10}{'similarity':>12}{f'right of {self.candidates}':>14}{'text background':>18}"]
        for s in self.similarity:
            lines.append(
                f"{s:<10}{self.similarity[s]:>12.2f}{self.retrieval[s]:>14.2f}{self.text_background[s]:>18.2f}"
            )
        mask, style = self.mask, self.style
        lines += [
            f"mask, inside:  {mask.inside:.2f} like the reference's half ({mask.inside_unmasked:.2f} with no mask, "
            f"{mask.inside_without:.2f} without the image)",
            f"mask, outside: {mask.outside:.2f} like the picture without the image ({mask.outside_unmasked:.2f} with no mask)",
        ]
        if style is not None:
            lines.append(
                f"with the style LoRA: {style.poster:.2f} of the way to its inks, {style.right:.2f} right of "
                f"{self.references} posters"
            )
        lines.append(
            f"the text names another subject; chance is {1 / self.candidates:.2f} for the right reference; references were "
            "never seen in training"
        )
        return "\n".join(lines)


def measure(
    world: World,
    family: str,
    *,
    steps: int = 20,
    strengths: Sequence[float] = (0.0, 0.5, 1.0),
    style: Path = STYLE,
    progress: Callable[[int, int], None] | None = None,
) -> Figures:
    """Generate and judge: a picture of every reference at each strength, under a mask, and with the LoRA in ``style``.

    0 and 1 are always among the strengths. A missing file leaves the style out.
    """
    references = world.references
    strengths = sorted({0.0, *strengths, 1.0})
    right = torch.arange(len(references.names))
    wanted = contradicting_backgrounds(references.backgrounds)
    texts = [f"{word} on {colour} background" for word, colour in zip(NAMED, wanted, strict=True)]
    total, done = len(strengths) + 1 + style.is_file(), 0

    def draw(schedule: WeightSchedule, prompts: Sequence[str], mask: Tensor | None = None) -> Tensor:
        nonlocal done
        pictures = world.draw(
            family, references.images, schedule, prompts, seeds=range(len(right)), steps=steps, mask=mask
        )
        done += 1
        if progress is not None:
            progress(done, total)
        return pictures

    drawn = {strength: draw(WeightSchedule(strength=strength), texts) for strength in strengths}
    candidates = with_decoys(references.images)
    tables = {strength: similarity(pictures, candidates) for strength, pictures in drawn.items()}
    masked = draw(WeightSchedule(), texts, right_half_mask(SIZE))
    plain, full = drawn[0.0], drawn[1.0]
    everything = torch.cat([references.images, plain, full])

    def alike(half: Half, pictures: Tensor, others: Tensor) -> float:
        return half_similarity(world, half, pictures, others, everything)

    styled = None
    if style.is_file():
        patch = diffusers_lora.place(world.pipeline, load_lora(style))
        with diffusers_lora.apply(world.pipeline, patch, branches=("uncond", "cond")) as lora:
            lora.set_strength(STYLE_STRENGTH)
            both = draw(STYLED, ["emoji"] * len(right))
        off = off_the_inks(both).mean() / off_the_inks(references.images).mean()
        found = similarity(both, posters(references.images)).argmax(1) == right
        styled = StyleFigures(1 - off.item(), found.float().mean().item())
    return Figures(
        len(candidates),
        len(right),
        {s: table[right, right].mean().item() for s, table in tables.items()},
        {s: (table.argmax(1) == right).float().mean().item() for s, table in tables.items()},
        {s: _share(background_names(pictures), wanted) for s, pictures in drawn.items()},
        MaskFigures(
            alike(Half.RIGHT, masked, references.images),
            alike(Half.RIGHT, full, references.images),
            alike(Half.RIGHT, plain, references.images),
            alike(Half.LEFT, masked, plain),
            alike(Half.LEFT, full, plain),
        ),
        styled,
    )


def _share(found: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def contradicting_backgrounds(backgrounds: Sequence[str]) -> list[str]:
    """For each reference another named colour than its own, going round the colours."""
    names = list(BACKGROUNDS)
    return [names[(names.index(b) + 3 + i % (len(names) - 4)) % len(names)] for i, b in enumerate(backgrounds)]
