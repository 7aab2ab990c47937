"""Runs that are started by a name: each replaces its own finished file and nobody else's, and what is begun anew is set aside."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import AdapterError, InvalidInputError, quoted
from ..files.access import plain_name
from ..files.text import as_table, read_json
from ..files.whole import written_whole
from .locks import locked

RECORD = "result.json"
"""In a run's folder: name and SHA-256 of the file that the run put among the adapters or LoRAs."""

EARLIER_RUNS = 5
"""So many runs of a name may lie aside. They keep their states and caches, so the disk must not fill with them unseen."""


def set_aside(folder: Path) -> Path | None:
    """Rename a run's folder to ``<name>.earlier-<number>``; None where nothing was learned in it. Nothing is deleted.

    The run can be gone on with under its new name. Raises InvalidInputError where too many lie aside, or a training is
    writing there.
    """
    if not any(folder.glob("state-*")) and not any(folder.glob("*.safetensors")):
        return None

    def busy() -> None:
        raise InvalidInputError(
            f"another training is writing to {folder}; wait for it or end it, or choose another name"
        )

    with locked(folder, busy):
        pass
    for number in range(1, EARLIER_RUNS + 1):
        aside = folder.with_name(f"{folder.name}.earlier-{number}")
        if not os.path.lexists(aside):
            os.rename(folder, aside)
            return aside
    raise InvalidInputError(
        f"{EARLIER_RUNS} earlier runs of {quoted(folder.name)} lie aside already: move or delete one of "
        f"{folder.name}.earlier-1 to -{EARLIER_RUNS} in {folder.parent}, or choose another name"
    )


def publish(result: Path, target: Path, folder: Path) -> Path:
    """Copy a finished file to ``target``, whole or not at all; returns where it is.

    The file that the run of ``folder`` put there before is replaced. A file of anybody else is not: then the name gets a
    number, ``<name>-2``, which the run keeps from then on.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    place = next(path for path in _candidates(target, folder) if not os.path.lexists(path) or _wrote(folder, path))
    with written_whole(place) as unfinished:
        shutil.copyfile(result, unfinished)
    # killed before this line, the run will find a file there that it does not know, and number the next one
    with written_whole(folder / RECORD) as record:
        record.write_text(json.dumps({"file": place.name, "sha256": _digest(place)}), encoding="utf-8")
    return place


def _candidates(target: Path, folder: Path) -> Iterator[Path]:
    record = _record(folder)
    if record is not None and record[0].startswith(target.stem) and record[0].endswith(target.suffix):
        yield target.with_name(record[0])
    yield target
    number = 2
    while True:
        yield target.with_name(f"{target.stem}-{number}{target.suffix}")
        number += 1


def _wrote(folder: Path, path: Path) -> bool:
    record = _record(folder)
    return record is not None and path.is_file() and not path.is_symlink() and record == (path.name, _digest(path))


def _record(folder: Path) -> tuple[str, str] | None:
    """What the run noted; None without a note that can be read, as a client of a server could upload another."""
    try:
        values = as_table(read_json(folder / RECORD))
        return plain_name(str(values.get("file", "")), RECORD), str(values.get("sha256", ""))
    except (AdapterError, FileNotFoundError):
        return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
