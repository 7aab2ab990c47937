"""diffusers: what a pipeline says of the calls of its model: which prompt runs, and how its scheduler spaces the noise."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...errors import InvalidInputError
from .notes import STRAIGHT, Beginning, Branch, Flow


def model_of(pipeline: object) -> nn.Module:
    """A pipeline's UNet or transformer. Raises InvalidInputError for a pipeline that has none."""
    for name in ("unet", "transformer"):
        model = getattr(pipeline, name, None)
        if isinstance(model, nn.Module):
            return model
    raise InvalidInputError(
        f"a {type(pipeline).__name__} has no unet and no transformer in which an image prompt could act; give a text-to-image "
        "pipeline of diffusers, or call apply() on the model itself"
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """One call of a model as the next one has to know it: its tensors, by identity, and where the scheduler stood."""

    latents: weakref.ref[Tensor]
    text: weakref.ref[Tensor] | None
    run: object
    step: object
    second: bool


class _Thread(threading.local):
    last: _Pass | None = None


class Asked:
    """A pipeline, asked at every call of its model. Copied with the pipeline it asks the copy, with a model alone the same one."""

    def __init__(self, pipeline: object) -> None:
        self._pipeline: Any = pipeline
        self._thread = _Thread()

    def __deepcopy__(self, memo: dict[int, object]) -> Asked:
        return Asked(memo.get(id(self._pipeline), self._pipeline))

    def __reduce__(self) -> tuple[object, ...]:
        return Asked, (self._pipeline,)  # a thread's last call is of this process

    def branches(self, call: Beginning) -> Sequence[Branch]:
        """What the batch of a call that begins consists of. Asked once for each call."""
        guided = getattr(self._pipeline, "do_classifier_free_guidance", None)
        if call.family.negative == "apart":
            return ("uncond",) if self._second(call) and guided is not False else ("cond",)
        if guided is None:
            raise InvalidInputError(
                "the model was called before its pipeline was, so whether guidance is on is unknown; call the pipeline, or say "
                "what the batch consists of with apply(model, ..., branches=...)"
            )
        return ("uncond", "cond") if guided and not call.skips_blocks else ("cond",)

    def _second(self, call: Beginning) -> bool:
        """Whether a call repeats the one before with another prompt: the same latents in the same step of the same run.

        Distilled models have one pass a step. With true guidance the negative prompt's follows the positive one's with the
        very tensor of latents, as the scheduler has not moved yet.
        """
        thread, scheduler = self._thread, getattr(self._pipeline, "scheduler", None)
        run, step = getattr(scheduler, "timesteps", None), getattr(scheduler, "step_index", None)
        last, thread.last = thread.last, None
        latents, text = call.sample, call.text
        if latents is None:
            return False
        second = (
            last is not None
            and not last.second
            and last.latents() is latents
            and (text is None or last.text is None or last.text() is not text)
            and last.run is _reference(run)
            and last.step == step
        )
        thread.last = _Pass(
            weakref.ref(latents), None if text is None else weakref.ref(text), _reference(run), step, second
        )
        return second

    def flow(self, call: Beginning) -> Flow:
        """How the pipeline's scheduler spaces the noise of a call."""
        scheduler = getattr(self._pipeline, "scheduler", None)
        if call.family.clock == "steps" or not hasattr(scheduler, "config"):
            return STRAIGHT
        timesteps, index = getattr(scheduler, "timesteps", None), getattr(scheduler, "step_index", None)
        shift = shift_of(scheduler, call)
        return (
            Flow(shift, timesteps, index if isinstance(index, int) else None)
            if isinstance(timesteps, Tensor)
            else Flow(shift)
        )


def _reference(run: object) -> object:
    """What stands for a tensor of timesteps, which every run makes anew, without keeping it: the same object for the same one."""
    return weakref.ref(run) if isinstance(run, Tensor) else run


def shift_of(scheduler: Any, call: Beginning) -> float:
    """The shift that a scheduler gives a picture of this size: Flux's grows with the picture.

    Source: diffusers' ``calculate_shift`` and ``FlowMatchEulerDiscreteScheduler.time_shift``. A scheduler without one has 1.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        shift = getattr(scheduler, "shift", config.get("shift", config.get("flow_shift")))
        return float(shift) if isinstance(shift, (int, float)) and shift > 0 else 1.0
    latent = call.latent
    if latent is None:
        return 1.0
    tokens = latent[0] * latent[1] // 4
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = base + (tokens - low) * (top - base) / (high - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
