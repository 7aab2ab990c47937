"""Writing files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Generator[Path]:
    """The place in the same folder where the block writes the file; at the block's end it takes the name ``path``.

    What had the name before stays until then, and for good where the block raises. The numbers are on the disk before the
    name is: a power cut leaves the old file or the new one. Two that write the same file at a time do not mix.

    Raises OSError for a folder that is not there or takes no files, ValueError for what is no name of a file.
    """
    path = Path(path)
    unfinished = path.with_name(f".{uuid4().hex}.tmp")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # safetensors leaves files that only their owner can read
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
