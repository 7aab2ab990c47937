"""A training as a child process: what a user interface starts, watches and cancels."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .config import RunConfig, write_config
from .loop import TrainingFailed
from .state import RunFolder
from .stopping import STOP_WITH_PARENT

Event = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
"""Where `ipadapter_core` lies; the child finds it there, installed or not."""


def run_job(
    config: RunConfig,
    *,
    python: str,
    on_event: Callable[[Event], None],
    check: Callable[[], None],
    patience: float = 120,
) -> Path:
    """Run `ipadapter train` with another Python and return the adapter file.

    `on_event` gets each line of its progress; `check` is called several times a second and raises to cancel: the
    training then saves its state within `patience` seconds, and the exception goes on. What the child printed besides
    is in `train.log`. Raises TrainingFailed with the child's own error.
    """
    folder = RunFolder(config.output)
    folder.prepare()
    job, log = folder.path / "job.toml", folder.path / "train.log"
    write_config(config, job)
    command = [python, "-m", "ipadapter_core.cli", "train", str(job.resolve()), "--json"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", STOP_WITH_PARENT: "1"}
    seen: queue.Queue[Event | None] = queue.Queue()
    file, error = None, ""
    with log.open("ab") as errors:
        start = errors.tell()
        try:
            child = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=folder.path,
            )
        except OSError as failure:
            raise TrainingFailed(f"{python} could not be started: {failure}") from failure
        assert child.stdout is not None
        threading.Thread(target=_read, args=(child.stdout, seen), daemon=True).start()
        try:
            while (event := _next(seen, check)) is not None:
                if event.get("event") == "done":
                    file = Path(event["file"])
                if "event" in event:
                    on_event(event)
                else:
                    error = event.get("error", error)
            child.wait()
        except BaseException:
            _cancel(child, folder, patience)
            raise
    if child.returncode != 0 or file is None:
        tail = log.read_bytes()[start:].decode("utf-8", "replace").strip()[-3000:]
        raise TrainingFailed(error or f"the training ended with code {child.returncode}:\n{tail}")
    return folder.path / file


def _next(seen: queue.Queue[Event | None], check: Callable[[], None]) -> Event | None:
    while True:
        check()
        try:
            return seen.get(timeout=0.2)
        except queue.Empty:
            continue


def _read(stream: IO[bytes], seen: queue.Queue[Event | None]) -> None:
    for line in stream:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a library that prints
        if isinstance(event, dict):
            seen.put(event)
    seen.put(None)


def _cancel(child: subprocess.Popen[bytes], folder: RunFolder, patience: float) -> None:
    """Ask, wait, insist."""
    folder.stop_file.touch()
    if os.name == "posix" and child.poll() is None:
        child.send_signal(signal.SIGINT)
    end = time.monotonic() + patience
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    if child.poll() is None:
        child.kill()
        child.wait()
    folder.stop_file.unlink(missing_ok=True)
