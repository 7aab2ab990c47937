"""What is kept of a run: small adapter files for people, and the full state to go on from, each whole or not at all."""

# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeGuard, TypeVar

from torch import Tensor

from ..errors import AdapterError, CorruptFileError, InvalidInputError, quoted
from ..files.text import as_table, read_json, regular_file
from .config import OutputConfig, RunConfig
from .locks import locked
from .saved_state import TRAINING

STATE = re.compile(r"state-(\d{8})")
NOTE = "run.json"
"""In every state: what run it is of, and a checksum of each of its files."""
FREE = ("watch", "output")
"""Sections that may change between a run and its resumption."""
SHAPING = {("watch", "validation")}
"""Keys of those that may not: what is held out is not trained on."""
EXTENDABLE = {
    ("train", "steps"), ("train", "device"), ("train", "ignore_memory"), ("train", "shard"),
    ("data", "cache"), ("data", "workers"),
    ("data", "encode_batch"), ("data", "path"), ("data", "roots"), ("model", "base"), ("model", "config"),
    ("model", "image_encoder"), ("adapter", "start_from"),
    ("lora", "start_from"),
}  # fmt: skip
"""Keys that may change too: places, and how long the run is."""


Kind = TypeVar("Kind")


class Savable(Protocol):
    """What is learned, as far as this room knows it."""

    def save(self, path: Path, state: dict[str, Tensor], metadata: Mapping[str, str]) -> Path: ...


class RunFolder:
    """The files of a run in ``output.folder``."""

    def __init__(self, config: OutputConfig) -> None:
        if not config.folder:
            raise InvalidInputError("output.folder is empty; give a folder for checkpoints and progress")
        self.path = Path(config.folder)
        self.config = config

    def prepare(self) -> None:
        """Make the folder, prove that it can be written, and remove what a killed run left half written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise InvalidInputError(
                f"output.folder {self.path} cannot be written ({error}); choose another, or mend its permissions"
            ) from error
        self.prepare_again()

    def alone(self) -> AbstractContextManager[None]:
        """While inside, another run that is to write here is refused; it would take away what this one is writing.

        Under torchrun it waits: shared disks give the lock of a machine that died back after a minute or two.
        """

        def busy() -> None:
            text = f"another training is writing to {self.path}"
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                raise InvalidInputError(f"{text}; wait for it or end it, or choose another output.folder")
            print(f"{text}; waiting for its end", file=sys.stderr, flush=True)

        return locked(self.path, busy)

    def prepare_again(self) -> None:
        """Remove what was left half written."""
        for left in self.path.glob("*.unfinished"):
            shutil.rmtree(left, ignore_errors=True)
        for pattern in ("*.tmp", ".*.tmp"):
            for left in self.path.glob(pattern):
                left.unlink(missing_ok=True)

    # --- full states ---------------------------------------------------------------------------------------------------

    def states(self) -> list[tuple[int, Path]]:
        """Finished states, oldest first."""
        found = ((STATE.fullmatch(path.name), path) for path in self.path.glob("state-*"))
        return sorted((int(match[1]), path) for match, path in found if match is not None)

    def unfinished(self, step: int) -> Path:
        """Where the state of a step is written before it counts."""
        return self.path / f"state-{step:08d}.unfinished"

    def finish(self, step: int, run: Mapping[str, object]) -> Path:
        """Make a written state count (one rename), then drop older ones. Its note has a checksum of every file."""
        folder = self.unfinished(step)
        files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != NOTE)
        write_note(folder, {**run, "files": {file.relative_to(folder).as_posix(): checksum(file) for file in files}})
        for file in (*files, folder / NOTE):
            _sync(file)
        final = self.path / f"state-{step:08d}"
        if final.exists():  # saved again at one step, where a save before had failed: the same bits
            shutil.rmtree(folder)
            return final
        os.replace(folder, final)
        _sync_folder(self.path)
        for _, old in self.states()[: -self.config.keep_states]:
            # renamed first: a kill amid removal must not leave half a state that looks whole
            going = old.with_name(old.name + ".unfinished")
            os.replace(old, going)
            shutil.rmtree(going, ignore_errors=True)
        return final

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest state that is whole, and what is wrong with those after it, which are put aside as ``.damaged``.

        Raises CorruptFileError if there are states and none is whole, InvalidInputError for those of older versions.
        """
        problems: list[str] = []
        states = self.states()
        for step, folder in reversed(states):
            try:
                found = read_state(step, folder)
                found.verify()
            except PickledStateError:
                raise
            except (AdapterError, OSError) as error:
                problems.append(f"{folder.name} cannot be used ({error})")
                continue
            for _, damaged in states[len(states) - len(problems) :]:
                _put_aside(damaged)
            return found, problems
        if problems:
            raise CorruptFileError(
                f"no state in {quoted(self.path)} is whole ({'; '.join(problems[:3])}); take its state-… folders away to start anew, with "
                "adapter.start_from or lora.start_from if one of its checkpoints is to be trained on"
            )
        return None, problems

    # --- results -----------------------------------------------------------------------------------------------------

    def save_result(
        self,
        trainee: Savable,
        state: dict[str, Tensor],
        stem: str,
        metadata: Mapping[str, str],
        *,
        nested: bool = False,
    ) -> Path:
        """Write one file of what is learned, in ``output.dtype``."""
        try:
            if nested:
                trainee.save(self.path / f"{stem}.bin", state, metadata)
            return trainee.save(self.path / f"{stem}.safetensors", state, metadata)
        except OSError as error:
            raise OSError(
                error.errno, f"{self.path} cannot be written ({error.strerror}); free some space or mend it"
            ) from error

    def checkpoint_stem(self, step: int, *, averaged: bool) -> str:
        return f"{self.config.name}-{step:08d}{'-ema' if averaged else ''}"

    def drop_old_checkpoints(self) -> None:
        pattern = re.compile(re.escape(self.config.name) + r"-(\d{8})(-ema)?\.safetensors")
        found = [(int(match[1]), path) for path in self.path.iterdir() if (match := pattern.fullmatch(path.name))]
        keep = sorted({step for step, _ in found})[-self.config.keep :]
        for step, path in found:
            if step not in keep:
                path.unlink(missing_ok=True)

    # --- a request to stop ---------------------------------------------------------------------------------------------

    @property
    def stop_file(self) -> Path:
        """A file of this name asks a running training to save and end, on any platform."""
        return self.path / "stop"


class ResultFiles:
    """What a run leaves of what it learned: a file at every checkpoint, beside it the averaged one, and the finished file."""

    def __init__(self, folder: RunFolder, trainee: Savable, metadata: Mapping[str, str], *, averaged: bool) -> None:
        self.folder, self.trainee, self.metadata, self.averaged = folder, trainee, metadata, averaged

    def checkpoint(self, step: int, state: dict[str, Tensor], averaged: dict[str, Tensor] | None) -> None:
        folder, texts = self.folder, self._texts(step)
        folder.save_result(self.trainee, state, folder.checkpoint_stem(step, averaged=False), texts)
        if averaged is not None:
            folder.save_result(self.trainee, averaged, folder.checkpoint_stem(step, averaged=True), texts)
        folder.drop_old_checkpoints()

    def finish(self, step: int, state: dict[str, Tensor]) -> None:
        out, texts = self.folder.config, self._texts(step)
        self.folder.save_result(self.trainee, state, out.name, texts)
        if out.nested:
            self.folder.save_result(self.trainee, state, out.name, texts, nested=True)

    def file(self, step: int | None) -> Path:
        stem = self.folder.config.name if step is None else self.folder.checkpoint_stem(step, averaged=self.averaged)
        return self.folder.path / f"{stem}.safetensors"

    def _texts(self, step: int) -> dict[str, str]:
        return {**self.metadata, "steps": str(step)}


@dataclass(frozen=True, slots=True)
class Saved:
    """A finished state: after which step, in which folder, and what was noted of its run. ``files`` are checksums by name."""

    step: int
    folder: Path
    config: Mapping[str, Mapping[str, object]]
    processes: int
    files: Mapping[str, str]

    def verify(self) -> None:
        """Compare every file with its checksum. Raises CorruptFileError, FileNotFoundError, OSError."""
        for name, wanted in self.files.items():
            if checksum(self.folder / name) != wanted:
                raise CorruptFileError(f"{quoted(name)} is damaged: it is not what was saved")


class PickledStateError(InvalidInputError):
    """A state of an older version. Its pickles could run code when they are opened, and nothing of it is."""


def read_state(step: int, folder: Path) -> Saved:
    """A state by its note. Raises CorruptFileError, FileNotFoundError, InvalidInputError, and PickledStateError."""
    values = as_table(read_json(folder / NOTE))
    if "config" in values and "files" not in values:
        raise PickledStateError(
            f"{quoted(folder)} was saved by an older version, as pickles, which can run code when they are opened; finish this "
            "training with that version, or choose another output.folder and train its newest checkpoint on "
            "(adapter.start_from, lora.start_from)"
        )
    claimed = values.pop("checksum", None)
    files, config, processes = values.get("files"), values.get("config"), values.get("processes")
    if (
        claimed != _digest_of(values)
        or not _is_table(files, str)
        or not _is_table(config, dict)
        or TRAINING not in files
        or any(Path(name).name != name for name in files)
        or type(processes) is not int
        or values.get("step") != step
    ):
        raise CorruptFileError(f"{NOTE} is damaged: it is not what was saved")
    return Saved(step, folder, config, processes, files)


def _is_table(value: object, kind: type[Kind]) -> TypeGuard[dict[str, Kind]]:
    return isinstance(value, dict) and all(isinstance(one, kind) for one in as_table(value).values())


def write_note(folder: Path, note: Mapping[str, object]) -> None:
    """Write what is noted of a state, with a checksum of itself."""
    text = json.dumps({**note, "checksum": _digest_of(note)}, indent=1)
    (folder / NOTE).write_text(text, encoding="utf-8")


def checksum(file: Path) -> str:
    """SHA-256 of a file's bytes. Raises FileNotFoundError, InvalidInputError for what is no plain file, OSError."""
    digest = hashlib.sha256()
    with regular_file(file).open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _digest_of(note: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def _put_aside(folder: Path) -> None:
    """Rename a damaged state, so that the run can save at that step again and nothing is lost."""
    number, aside = 1, folder.with_name(f"{folder.name}.damaged")
    while aside.exists():
        number, aside = number + 1, folder.with_name(f"{folder.name}.damaged-{number}")
    os.replace(folder, aside)


def check_same_run(config: RunConfig, before: Saved, processes: int = 1) -> str:
    """What another number of processes changes, in words; empty for the same number.

    Raises InvalidInputError when a state belongs to a run whose settings shaped it differently.
    """
    now, defaults = (json.loads(json.dumps(one.as_dict())) for one in (config, RunConfig()))

    def was(section: str, key: str) -> object:
        # a run of an older version, which lacked the key, ran as its default does
        return before.config.get(section, {}).get(key, defaults[section][key])

    other, batch, earlier = before.processes, config.train.batch, was("train", "batch")
    together = (other * earlier if isinstance(earlier, int) else 0, processes * batch)
    same_samples = other != processes and together[0] == together[1]
    changed = [
        f"{section}.{key}: {was(section, key)!r} → {value!r}"
        for section, entries in now.items()
        for key, value in entries.items()
        if (section not in FREE or (section, key) in SHAPING)
        and (section, key) not in EXTENDABLE
        and was(section, key) != value
        and not (same_samples and (section, key) == ("train", "batch"))
    ]
    if changed:
        raise InvalidInputError(
            f"{before.folder.parent} holds a run with other settings ({'; '.join(changed)[:400]}); "
            "choose another output.folder, or set them back to go on"
        )
    if other == processes:
        return ""
    text = f"processes: {other} of batch {earlier} → {processes} of batch {batch}; "
    if same_samples:
        return text + f"{together[0]} samples at a time as before, whose gradients are summed in another order"
    keeps = "" if together[0] % processes else f"; train.batch={together[0] // processes} would have kept both"
    return text + (
        f"{together[1]} samples at a time instead of {together[0]}, in another order from here on, so that in the current epoch "
        f"some come twice and some not at all{keeps}"
    )


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "posix":
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
