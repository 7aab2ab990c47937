"""Scenes, pairs and captions drawn on the device that trains: nothing of a step waits for the processor.

Captions are rows of a table of all sentences of the world, tokenised once. Random numbers come from the device's own generator, which a
recorded CUDA graph goes on with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .learner import generator_on
from .pictures import BACKGROUNDS, STUDIOS, Pictures, caption, colour_table, on_background, place, recolour

NONE = -1
"""Stands for a part that a caption leaves out."""
DROP = 0.05
"""Share of pairs without image, without text, and without both (tencent tutorial_train.py)."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A batch of scenes: images ``b 3 y x`` in 0..1, tokens of their captions ``b n``, index of their background."""

    images: Tensor
    captions: Tensor
    background: Tensor


@dataclass(frozen=True, slots=True)
class Pairs:
    """References and targets ``b 3 y x``, tokens of the captions ``b n``, and which references are dropped."""

    references: Tensor
    targets: Tensor
    captions: Tensor
    dropped: Tensor


class Easel:
    """The pictures and all captions on one device; every method draws anew."""

    def __init__(self, pictures: Pictures, tokenizer: Any, length: int, device: torch.device) -> None:
        self.device, self.rgba = device, pictures.rgba.to(device)
        vocabulary = sorted(set(pictures.names))
        row = {name: i for i, name in enumerate(vocabulary)}
        self.vocabulary = vocabulary
        self.names = torch.tensor([row[name] for name in pictures.names], device=device)
        self.studios = torch.tensor([STUDIOS.index(studio) for studio in pictures.studios], device=device)
        core = torch.arange(len(pictures.names)) < len(pictures.names) - pictures.others
        self.seen = torch.nonzero(~pictures.held_out)[:, 0].to(device)
        self.core_seen = torch.nonzero(~pictures.held_out & core)[:, 0].to(device)
        self.unseen = torch.nonzero(pictures.held_out & core)[:, 0].to(device)
        self.colours = colour_table().to(device)
        self._captions = self._tokenised(tokenizer, length).to(device)
        self.generator = generator_on(device)

    def _tokenised(self, tokenizer: Any, length: int) -> Tensor:
        sentences = [""]
        for studio in (None, *STUDIOS):
            for name in (None, *self.vocabulary):
                sentences += [caption(studio, name, colour) for colour in (None, *BACKGROUNDS)]
        found = tokenizer(sentences, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return found.input_ids

    def tokens(self, studio: Tensor, name: Tensor, background: Tensor, empty: Tensor) -> Tensor:
        """Captions by the indices of their parts (NONE: left out); ``empty``: no caption at all."""
        row = 1 + ((studio + 1) * (len(self.vocabulary) + 1) + name + 1) * (len(BACKGROUNDS) + 1) + background + 1
        return self._captions[torch.where(empty, 0, row)]

    def chance(self, count: int, rate: float) -> Tensor:
        return torch.rand(count, generator=self.generator, device=self.device) < rate

    def choose(self, count: int) -> Tensor:
        """Pictures that training may see, half of them of the categories that references are of."""

        def among(pictures: Tensor) -> Tensor:
            return pictures[torch.randint(len(pictures), (count,), generator=self.generator, device=self.device)]

        return torch.where(self.chance(count, 0.5), among(self.core_seen), among(self.seen))

    def background(self, count: int) -> Tensor:
        return torch.randint(len(BACKGROUNDS), (count,), generator=self.generator, device=self.device)

    def hue(self, recoloured: Tensor) -> Tensor:
        """Angles by which chosen pictures' hues turn, radians."""
        turn = torch.rand(len(recoloured), generator=self.generator, device=self.device) * 5.0 + 0.6
        return torch.where(recoloured, turn, 0.0)

    def scenes(self, index: Tensor, recolour_rate: float) -> Drawn:
        """Scenes of these pictures, with captions of which each part is dropped at times."""
        count = len(index)
        recoloured, background = self.chance(count, recolour_rate), self.background(count)
        with self.device:
            cutouts = place(recolour(self.rgba[index], self.hue(recoloured)), self.generator)
        studio = torch.where(self.chance(count, 0.5), self.studios[index], NONE)
        name = torch.where(self.chance(count, 0.85) & ~recoloured, self.names[index], NONE)
        told = torch.where(self.chance(count, 0.75), background, NONE)
        words = self.tokens(studio, name, told, self.chance(count, 0.1))
        return Drawn(on_background(cutouts, self.colours[background]), words, background)

    def pairs(self, index: Tensor) -> Pairs:
        """References and targets; in half of them the backgrounds differ, and the caption names the target's."""
        count = len(index)
        recoloured = self.chance(count, 0.2)
        with self.device:
            cutouts = recolour(self.rgba[index], self.hue(recoloured))
            seen, moved = place(cutouts, self.generator), place(cutouts, self.generator)
        target = torch.where(self.chance(count, 0.15)[:, None, None, None], moved, seen)
        background = self.background(count)
        others = len(BACKGROUNDS) - 1
        other = 1 + torch.randint(others, (count,), generator=self.generator, device=self.device)
        which = torch.rand(count, generator=self.generator, device=self.device)
        no_image = (which < DROP) | ((which >= 2 * DROP) & (which < 3 * DROP))
        no_text = (which >= DROP) & (which < 3 * DROP)
        conflict = self.chance(count, 0.5) & ~no_text
        behind = torch.where(conflict, (background + other) % len(BACKGROUNDS), background)
        words = self.tokens(
            torch.where(self.chance(count, 0.2) & ~recoloured, self.studios[index], NONE),
            torch.where(self.chance(count, 0.25) & ~recoloured, self.names[index], NONE),
            torch.where(conflict | self.chance(count, 0.2), background, NONE),
            no_text,
        )
        references = on_background(seen, self.colours[behind])
        return Pairs(references, on_background(target, self.colours[background]), words, no_image)
