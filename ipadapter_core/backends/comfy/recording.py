"""ComfyUI: a MODEL whose sampling runs are recorded, for pictures of where its image prompts acted."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.recording import AttentionMaps, Recorder
from ...errors import InvalidInputError
from .notes import RECORDER, Executor, PatcherLike, install_notes

RUNS = 8
"""Runs that are kept: a graph may hold several samplers, and the host takes some of their results from its cache."""
COMPARED = 4096
"""Numbers of a result by which it is known again."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What was recorded of one run of a sampler, and some numbers of its result."""

    maps: AttentionMaps
    result: Tensor

    def made(self, latent: Tensor) -> bool:
        """Whether a latent is this run's result, but for rounding to half precision."""
        other = some_of(latent)
        return other.shape == self.result.shape and bool(torch.isclose(other, self.result, 2e-2, 1e-2).all())


def some_of(latent: object) -> Tensor:
    """Numbers from all over a latent, at most ``COMPARED``; none of what is no tensor."""
    if not isinstance(latent, Tensor):
        return torch.empty(0)
    flat = latent.detach().flatten()
    return flat[:: max(1, flat.numel() // COMPARED)][:COMPARED].float().cpu()


class Recording:
    """The runs of a recorded MODEL, the last one at the end."""

    def __init__(self, stages: int = 3) -> None:
        self.recorder = Recorder(stages)
        self.runs: deque[Run] = deque(maxlen=RUNS)

    def __deepcopy__(self, memo: dict[int, object]) -> Recording:
        return self  # hosts before 0.13 deep-copy what is on a model in every clone

    def __call__(self, executor: Executor, *args: object, **kwargs: object) -> object:
        """OUTER_SAMPLE wrapper: a run is what one sampler does, whatever models it calls and how often."""
        self.recorder.start()
        result = executor(*args, **kwargs)
        try:
            maps = self.recorder.maps()
        except InvalidInputError:  # this MODEL was not called: another recorder is behind this one
            return result
        self.runs.append(Run(maps, some_of(result)))
        self.recorder.start()
        return result

    def of(self, latent: Tensor | None = None) -> AttentionMaps:
        """What was recorded of the run that made ``latent``; of the last run for None. Raises InvalidInputError."""
        runs = [run for run in self.runs if latent is None or run.made(latent)]
        if not runs and self.runs:
            raise InvalidInputError(
                f"none of the last {len(self.runs)} recorded runs made this latent: connect the latent of the sampler that uses the "
                "recorded model, or change its seed so that it runs again"
            )
        if not runs:
            raise InvalidInputError(
                "nothing was recorded: connect the model output of Record Image Attention to the sampler; if it is, the sampler's result "
                "came from the cache of an earlier run: change its seed, and it runs again"
            )
        return runs[-1].maps


def record(model: PatcherLike, recording: Recording) -> PatcherLike:
    """A clone of ``model`` whose sampling runs are recorded; another recording on it ends."""
    clone = model.clone()
    options = clone.model_options
    clone.model_options = {
        **options,
        "transformer_options": {**options.get("transformer_options", {}), RECORDER: recording.recorder},
    }
    install_notes(clone)
    clone.remove_wrappers_with_key("outer_sample", RECORDER)
    clone.add_wrapper_with_key("outer_sample", RECORDER, recording)
    return clone
