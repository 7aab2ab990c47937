"""A training as a child process: what a user interface starts, watches and cancels."""

# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .config import RunConfig, absolute, write_config
from .loop import TrainingFailed
from .state import RunFolder
from .stopping import STOP_WITH_PARENT

Event = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
"""Where ``ipadapter_core`` lies; the child works there and finds it there, installed or not."""
CHILD = Path(__file__).resolve().with_name("child.py")
TAIL = 3000
"""Characters of a child's log that an error shows."""

# neither proxies nor tokens: what a graph trains on lies on this machine
_PASSED = re.compile(
    r"PATH|HOME|USER|LOGNAME|USERNAME|USERPROFILE|HOMEDRIVE|HOMEPATH|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|TEMP|TMP"
    r"|SYSTEMROOT|SYSTEMDRIVE|WINDIR|COMSPEC|PATHEXT|APPDATA|LOCALAPPDATA|PROGRAMDATA|PROGRAMFILES\S*|PROCESSOR_\w+"
    r"|NUMBER_OF_PROCESSORS|XDG_\w+|VIRTUAL_ENV|CONDA_\w+|PYTHON(HOME|USERBASE|NOUSERSITE|UTF8|IOENCODING|HASHSEED)"
    r"|LD_LIBRARY_PATH|DYLD_(FALLBACK_)?LIBRARY_PATH|CUDA\w*|NVIDIA_\w+|NCCL_\w+|CUBLAS\w*|CUDNN\w*|HIP_?\w*|ROC\w+|HSA_\w+"
    r"|AMD\w*|GPU_\w+|MIOPEN_\w+|ZE_\w+|ONEAPI\w*|SYCL_\w+|PYTORCH_\w+|TORCH_\w+|TORCHINDUCTOR_\w+|TRITON_\w+"
    r"|OMP_\w+|MKL_\w+|KMP_\w+|GOMP_\w+|OPENBLAS_\w+|NUMEXPR_\w+|VECLIB_\w+|MALLOC_\w+|BNB_\w+|BITSANDBYTES_\w+"
    r"|ACCELERATE_\w+|TOKENIZERS_PARALLELISM|MPLCONFIGDIR|HF_(HOME|HUB_CACHE|DATASETS_CACHE|ASSETS_CACHE)|HUGGINGFACE_HUB_CACHE"
    r"|TRANSFORMERS_CACHE",
    re.IGNORECASE,
)


def run_job(
    config: RunConfig,
    *,
    python: str,
    on_event: Callable[[Event], None],
    check: Callable[[], None],
    patience: float = 120,
) -> Path:
    """Run ``ipadapter train`` with another Python and return the adapter file.

    ``on_event`` gets each line of its progress; ``check`` is called several times a second and raises to cancel: the
    training then saves its state within ``patience`` seconds, and the exception goes on. What the child printed besides
    is in ``train.log``. Raises TrainingFailed with the child's own error.

    The run's folder may be one that clients of a server upload files to. So the child neither works in it nor looks for
    modules there, and its settings come from a folder that only this user can open.
    """
    config = absolute(config)
    folder = RunFolder(config.output)
    folder.prepare()
    with tempfile.TemporaryDirectory(prefix="ipadapter-job-") as private:
        job = Path(private) / "job.toml"
        write_config(config, job)
        return _run([python, str(CHILD), "train", str(job), "--json"], folder, on_event, check, patience)


def environment() -> dict[str, str]:
    """What of this process's environment a training gets: where things are and how devices compute, no secrets.

    Relative parts of PYTHONPATH mean the working directory and are left out. The child needs no network.
    """
    kept = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(path)]
    if paths:
        kept["PYTHONPATH"] = os.pathsep.join(paths)
    return {**kept, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", STOP_WITH_PARENT: "1"}


def _run(
    command: list[str],
    folder: RunFolder,
    on_event: Callable[[Event], None],
    check: Callable[[], None],
    patience: float,
) -> Path:
    log = folder.path / "train.log"
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
                env=environment(),
                cwd=ROOT,
            )
        except OSError as failure:
            raise TrainingFailed(f"{command[0]} could not be started: {failure}") from failure
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
        raise TrainingFailed(error or f"the training ended with code {child.returncode}:\n{_tail(log, start)}")
    return folder.path / file


def _tail(log: Path, start: int) -> str:
    """The end of what a log holds behind ``start``."""
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 4 * TAIL))
        return file.read().decode("utf-8", "replace").strip()[-TAIL:]


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
