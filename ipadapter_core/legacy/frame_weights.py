"""Weights over the frames of an animation, and the references that cross-fade by them.

Names, formulas and quirks are those of ComfyUI_IPAdapter_plus: "ease_in" starts fast (a sine), "ease_out" slow.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..attention.schedule import parse_numbers
from ..entries import LONGEST_LIST, MOST_NUMBERS
from ..errors import InvalidInputError, quoted
from ..files.text import check_length

Timing = Literal["custom", "linear", "ease_in_out", "ease_in", "ease_out", "random"]
Method = Literal["full batch", "shift batches", "alternate batches"]

MOST_BYTES = 32 * 2**30
"""Most bytes of the references of all frames together, which are copies of one another."""

_COUNTS = ("frames", "start_frame", "end_frame", "add_starting_frames", "add_ending_frames", "frame_count")

_EASE: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "ease_in_out": lambda t: (1 - math.cos(t * math.pi)) / 2,
    "ease_in": lambda t: math.sin(t * math.pi / 2),
    "ease_out": lambda t: 1 - math.cos(t * math.pi / 2),
}


@dataclass(frozen=True, slots=True)
class WeightsStrategy:
    """How weights run over frames; as a plain dictionary it is the WEIGHTS_STRATEGY that nodes hand on.

    ``frame_count`` is the number of references it was made with.
    """

    weights: str
    timing: Timing = "linear"
    frames: int = 0
    start_frame: int = 0
    end_frame: int = 9999
    add_starting_frames: int = 0
    add_ending_frames: int = 0
    method: Method = "full batch"
    frame_count: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (("timing", self.timing, Timing), ("method", self.method, Method)):
            if value not in get_args(allowed):
                raise InvalidInputError(f"{name} is {quoted(value)}; choose one of: {', '.join(get_args(allowed))}")
        weights: Any = self.weights
        if not isinstance(weights, str):  # from another pack's strategy
            raise InvalidInputError(f"weights are {quoted(self.weights)}; a text such as '1.0, 0.0' was expected")
        for name in _COUNTS:
            value: Any = getattr(self, name)
            if not (isinstance(value, Integral) and 0 <= int(value) <= MOST_NUMBERS):
                raise InvalidInputError(f"{name} is {quoted(value)}; it must be a whole number of 0..{MOST_NUMBERS:,}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> WeightsStrategy:
        given: Any = values  # of another pack
        missing = [name for name in cls.__slots__ if not isinstance(given, Mapping) or name not in given]
        if missing:
            raise InvalidInputError(f"this is no weights strategy: {', '.join(missing)} missing")
        return cls(**{name: values[name] for name in cls.__slots__})

    def as_mapping(self) -> dict[str, Any]:
        return asdict(self)

    def curve(self) -> list[float]:
        """One weight per frame of one transition, at least one."""
        listed = parse_numbers(self.weights, "the weights")
        if self.timing == "custom":
            return listed or [0.0]
        frames = max(self.frames, 2)
        first, last = (listed[0], listed[-1]) if listed else (0.0, 1.0)
        end_frame = min(self.end_frame, frames)
        steps = max(end_frame - self.start_frame, 0)
        curve = [first] * self.start_frame
        if self.timing == "random":
            dice = random.Random(0)  # the same graph gives the same picture
            curve += [dice.uniform(first, last) for _ in range(steps)]
        else:
            ease = _EASE[self.timing]
            curve += [first + (last - first) * ease(i / max(steps - 1, 1)) for i in range(steps)]
            if curve:
                curve[-1] = last
        return curve + [last] * (frames - end_frame) or [0.0]

    def frames_of(self, images: Tensor | None) -> tuple[list[float], Tensor | None, Tensor | None]:
        """Weights of all frames, and the references of each frame (the second one only where two cross-fade)."""
        curve = self.curve()
        if images is None:
            return curve, None, None
        first, second, weights = self._paired(curve, images)
        frames = len(first) * len(curve) + self.add_starting_frames + self.add_ending_frames
        if frames * images[:1].nbytes > MOST_BYTES:
            raise InvalidInputError(
                f"{frames:,} frames with a reference of {tuple(images.shape[1:3])} pixels each take more than "
                f"{MOST_BYTES >> 30} GiB; give fewer frames, or scale the references down"
            )
        first = first.repeat_interleave(len(curve), 0)
        second = None if second is None else second.repeat_interleave(len(curve), 0)
        before, after = self.add_starting_frames, self.add_ending_frames
        weights = weights[:1] * before + weights + weights[-1:] * after
        return weights, _extended(first, images, before, after), _extended(second, images, before, after)

    def _paired(self, curve: list[float], images: Tensor) -> tuple[Tensor, Tensor | None, list[float]]:
        if self.method == "full batch":
            return images, None, curve * len(images)
        if len(images) < 2:
            raise InvalidInputError(f"{self.method!r} fades from one image to the next; give at least two")
        if self.method == "shift batches":
            return images[:-1], images[1:], curve * (len(images) - 1)
        # alternate: 0-1, 2-1, 2-3, … with every other transition mirrored within the curve's own range
        first, second = images[::2].repeat_interleave(2, 0)[1:], images[1::2].repeat_interleave(2, 0)
        mirrored = [max(curve) - (weight - min(curve)) for weight in curve]
        weights = (curve + mirrored) * (len(first) // 2)
        if len(images) % 2:
            return first[:-1], second, weights
        return first, second[:-1], weights + curve

    def prompt_schedule(self, prompts: str) -> str:
        """One line ``"frame": "prompt",`` per reference, from one prompt per line; at most 10 million characters."""
        lines = [line for line in check_length(prompts, "the prompts", LONGEST_LIST).split("\n") if line.strip()]
        if not lines or self.frame_count <= 0:
            return ""
        check_length(max(lines, key=len), "a prompt", 10 * LONGEST_LIST // self.frame_count)
        lines = (lines + lines[-1:] * self.frame_count)[: self.frame_count]
        entries = [(i * self.frames + self.add_starting_frames, line) for i, line in enumerate(lines)]
        if self.add_starting_frames > 0:
            entries.insert(0, (0, lines[0]))
        if self.add_ending_frames > 0:
            entries.append((self.frame_count * self.frames + self.add_starting_frames, lines[-1]))
        return "".join(f'"{frame}": "{line}",\n' for frame, line in entries)


def _extended(frames: Tensor | None, images: Tensor, before: int, after: int) -> Tensor | None:
    if frames is None:
        return None
    return torch.cat([images[:1].expand(before, -1, -1, -1), frames, images[-1:].expand(after, -1, -1, -1)])
