"""Sampling runs of a MODEL, recorded and told apart."""

from __future__ import annotations

from typing import Any

from ...ipadapter_core.backends.comfy import recording as backend
from ...ipadapter_core.backends.comfy.recording import Recording

__all__ = ["Recording", "record"]


def record(model: Any, stages: int) -> tuple[Any, Recording]:
    """A clone of a MODEL that records what image prompts on it do, those that are applied later included."""
    recording = Recording(stages)
    return backend.record(model, recording), recording
