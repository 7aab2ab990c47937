"""diffusers and transformers without what they print while they load."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quietly(*packages: str) -> Generator[None]:
    """No loading bars and no notices of these packages about others that nothing here uses; errors stay."""
    logs: list[Any] = [importlib.import_module(f"{package}.utils.logging") for package in packages]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
