"""The demo world's figures: does the picture follow the reference, does the text keep its say, does a mask confine it?

All on emoji that no training saw, judged by ``judge.py``, which shares nothing with the adapter's encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.schedule import WeightSchedule
from .judge import background_names, similarity
from .pictures import BACKGROUNDS
from .world import World

REFERENCES = 16
NAMED = (
    "tomato", "frog", "pizza", "panda face", "banana", "rose", "carrot", "bee",
    "penguin", "cat", "lemon", "octopus", "strawberry", "pig", "grapes", "egg",
)  # fmt: skip
"""Words for what the text draws where a mask keeps the image out: where nothing is asked for, anything may change."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What measure() finds; shares are of ``REFERENCES × seeds`` pictures."""

    similarity: dict[float, float]
    retrieval: dict[float, float]
    text_background: dict[float, float]
    inside_change: float
    outside_change: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "similarity_to_reference": {str(s): round(v, 3) for s, v in self.similarity.items()},
            f"right_reference_of_{REFERENCES}": {str(s): round(v, 3) for s, v in self.retrieval.items()},
            "background_the_text_asks_for": {str(s): round(v, 3) for s, v in self.text_background.items()},
            "mask": {"change_inside": round(self.inside_change, 4), "change_outside": round(self.outside_change, 4)},
        }

    def table(self) -> str:
        """The figures as aligned text."""
        lines = [f"{'strength':<10}{'similarity':>12}{f'right of {REFERENCES}':>14}{'text background':>18}"]
        for s in sorted({*self.similarity, *self.text_background}):
            cells = [self.similarity.get(s), self.retrieval.get(s), self.text_background.get(s)]
            lines.append(
                f"{s:<10}"
                + "".join(f"{'-' if c is None else f'{c:.2f}':>{w}}" for c, w in zip(cells, (12, 14, 18), strict=True))
            )
        ratio = self.inside_change / max(self.outside_change, 1e-9)
        lines.append(
            f"mask: the image changes its half by {self.inside_change:.3f} per pixel, the other half by "
            f"{self.outside_change:.3f} ({ratio:.1f} times less)"
        )
        lines.append(f"chance is {1 / REFERENCES:.2f} for the right reference; references were never seen in training")
        return "\n".join(lines)


def measure(
    world: World,
    family: str,
    *,
    steps: int = 20,
    seeds: Sequence[int] = (0,),
    strengths: Sequence[float] = (0.0, 0.5, 1.0),
    text_strength: float = 0.6,
    progress: Callable[[int, int], None] | None = None,
) -> Figures:
    """Generate and judge. ``len(seeds) · 16`` pictures per strength, as many with a contradicting text and a mask."""
    references = world.references[:REFERENCES]
    total = len(strengths) + 3
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    def draw(schedule: WeightSchedule, prompts: Sequence[str], mask: Tensor | None = None) -> Tensor:
        pictures = [
            world.draw(
                family,
                references.images,
                schedule,
                prompts,
                seeds=[seed * 1000 + i for i in range(len(prompts))],
                steps=steps,
                mask=mask,
            )
            for seed in seeds
        ]
        tick()
        return torch.cat(pictures)

    plain = ["emoji"] * len(references.names)
    right = torch.arange(len(plain)).repeat(len(seeds))
    similarities: dict[float, float] = {}
    retrieval: dict[float, float] = {}
    for strength in strengths:
        pictures = draw(WeightSchedule(strength=strength), plain)
        table = similarity(pictures, references.images)
        similarities[strength] = table[torch.arange(len(right)), right].mean().item()
        retrieval[strength] = (table.argmax(1) == right).float().mean().item()
    wanted = contradicting_backgrounds(references.backgrounds)
    words = [f"emoji on {colour} background" for colour in wanted]
    drawn = background_names(draw(WeightSchedule(strength=text_strength), words))
    agree = sum(a == b for a, b in zip(drawn, wanted * len(seeds), strict=True)) / len(drawn)
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    named = [f"{word} on {colour} background" for word, colour in zip(NAMED, wanted, strict=True)]
    free = draw(WeightSchedule(strength=0.0), named)
    masked = draw(WeightSchedule(strength=1.0), named, mask)
    change = (masked - free).abs().mean((0, 1))
    return Figures(
        similarities, retrieval, {text_strength: agree}, change[:, 32:].mean().item(), change[:, :32].mean().item()
    )


def contradicting_backgrounds(backgrounds: Sequence[str]) -> list[str]:
    """For each reference another named colour than its own, going round the colours."""
    names = list(BACKGROUNDS)
    return [names[(names.index(b) + 3 + i % (len(names) - 4)) % len(names)] for i, b in enumerate(backgrounds)]
