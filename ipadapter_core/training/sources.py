"""Where pictures and captions come from: a folder, the original's JSON list, webdataset shards, Hugging Face datasets.

A source gives records in a fixed order, without opening pictures. `read` gives the bytes of one; a stream's records
carry theirs along, so that one pass over remote shards is enough for the cache.
"""

from __future__ import annotations

import importlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlparse

from ..errors import CorruptFileError, InvalidInputError
from .config import DataConfig

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
CAPTIONS = (".txt", ".caption")


@dataclass(frozen=True, slots=True)
class Record:
    """One picture with its caption (None: there is none).

    `subject` groups pictures of the same thing; `reference` names another record's picture, or a picture of its own
    right, to be the reference. `stamp` changes when the file does; empty where only its bytes can tell.
    """

    name: str
    caption: str | None
    subject: str = ""
    reference: str = ""
    stamp: str = ""
    content: bytes | None = None


class Source(Protocol):
    """Records in a fixed order, and their bytes by name. `random_access` is False for streams."""

    @property
    def random_access(self) -> bool: ...

    def __iter__(self) -> Iterator[Record]: ...

    def read(self, name: str) -> bytes:
        """The bytes of a picture; raises OSError or CorruptFileError."""
        ...


class FolderSource:
    """All pictures below a folder; the caption of `a.png` is in `a.txt`. A subfolder is a subject."""

    random_access = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.suffix.lower() in PICTURES
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )

    def __iter__(self) -> Iterator[Record]:
        for name in self.names:
            path = self.folder / name
            subject = path.parent.relative_to(self.folder).as_posix() if path.parent != self.folder else ""
            yield Record(name, _caption_beside(path), subject, stamp=_stamp(path))

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


class JsonSource:
    """The original's list, `[{"image_file": "1.png", "text": "A dog"}, …]`, relative to the list's folder.

    Entries may add `subject` and `reference_file`.
    """

    random_access = True

    def __init__(self, file: Path, caption_key: str) -> None:
        self.folder = file.parent
        try:
            entries: Any = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptFileError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(entries, list):
            raise InvalidInputError(f'{file} should hold a list of {{"image_file": …, "{caption_key}": …}} entries')
        self.records: list[Record] = []
        for number, entry in enumerate(cast("list[Any]", entries)):
            if not isinstance(entry, dict) or not isinstance(entry.get("image_file"), str):
                raise InvalidInputError(f"{file}: entry {number} has no image_file: {str(entry)[:80]}")
            values = cast("dict[str, Any]", entry)
            caption = values.get(caption_key)
            if caption is not None and not isinstance(caption, str):
                raise InvalidInputError(f"{file}: entry {number} has {caption_key} = {caption!r}; text was expected")
            name, reference = str(values["image_file"]), str(values.get("reference_file", ""))
            stamp = _stamp(self.folder / name)
            if reference and stamp:
                stamp += f" {_stamp(self.folder / reference)}"
            self.records.append(Record(name, caption, str(values.get("subject", "")), reference, stamp))

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


class TarSource:
    """Local webdataset shards: `0001.jpg`, `0001.txt` or `0001.json`; each member's place in its tar is remembered."""

    random_access = True

    def __init__(self, shards: list[Path], caption_key: str) -> None:
        self.records: list[Record] = []
        self._places: dict[str, tuple[Path, int, int]] = {}
        names = Counter(shard.name for shard in shards)
        self._alike = {name for name, count in names.items() if count > 1}
        for shard in shards:
            try:
                with tarfile.open(shard) as tar:
                    self._index(shard, tar, caption_key)
            except tarfile.TarError as error:
                raise CorruptFileError(f"{shard} is not a readable webdataset shard: {error}") from error

    def _index(self, shard: Path, tar: tarfile.TarFile, caption_key: str) -> None:
        groups: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in tar:
            if member.isfile():
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                groups.setdefault(f"{folder}/{stem}".lstrip("/"), {})["." + extension.lower()] = member
        for key, members in groups.items():
            picture = next((members[extension] for extension in PICTURES if extension in members), None)
            if picture is None:
                continue
            texts = {e: _text(tar, m) for e, m in members.items() if e in (*CAPTIONS, ".json")}
            caption, subject = _caption_of(texts, caption_key)
            name = f"{shard if shard.name in self._alike else shard.name}/{key}"
            self._places[name] = (shard, picture.offset_data, picture.size)
            stamp = f"{_stamp(shard)} {picture.offset_data}"
            self.records.append(Record(name, caption, subject, stamp=stamp))

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def read(self, name: str) -> bytes:
        shard, offset, size = self._places[name]
        with shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class StreamSource:
    """Remote webdataset shards (http, https, s3 through `pipe:`), read once from start to end."""

    random_access = False

    def __init__(self, urls: str | list[str], caption_key: str) -> None:
        self.urls, self.caption_key = urls, caption_key
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[Record]:
        wds: Any = importlib.import_module("webdataset")

        def note(error: Exception) -> bool:
            self.bad.append(f"{type(error).__name__}: {error}")
            return True

        # which process reads which shard is decided before; webdataset would refuse several processes
        pipeline: Any = wds.WebDataset(
            self.urls, shardshuffle=False, handler=note, empty_check=False, nodesplitter=_every_shard
        )
        for sample in cast("Iterable[dict[str, Any]]", pipeline):
            content = next((sample[e[1:]] for e in PICTURES if e[1:] in sample), None)
            if content is None:
                continue
            texts = {
                f".{k}": bytes(v).decode("utf-8", "replace")
                for k, v in sample.items()
                if k in ("txt", "caption", "json")
            }
            caption, subject = _caption_of(texts, self.caption_key)
            shard = Path(urlparse(str(sample.get("__url__", ""))).path).name
            yield Record(f"{shard}/{sample['__key__']}", caption, subject, content=bytes(content))
        if self.bad:
            raise CorruptFileError(f"{len(self.bad)} shards could not be read, the first: {self.bad[0]}")

    def read(self, name: str) -> bytes:
        raise InvalidInputError("remote shards are read once, in order; set data.cache so that they are kept")


def _every_shard(shards: Any, group: Any = None) -> Any:
    return shards


class HuggingFaceSource:
    """A `datasets` image folder (with metadata.jsonl or .csv) or a dataset saved with save_to_disk."""

    random_access = True

    def __init__(self, folder: Path, caption_key: str) -> None:
        import datasets

        if (folder / "state.json").is_file():
            table: Any = datasets.load_from_disk(str(folder))
        else:
            table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
        column = next((name for name, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
        if column is None:
            raise InvalidInputError(f"{folder} has no column of pictures; it has {', '.join(table.features)}")
        self._pictures = table.cast_column(column, datasets.Image(decode=False))
        self._column = column
        self._caption = caption_key if caption_key in table.features else None
        self._subject = "subject" if "subject" in table.features else None

    def __iter__(self) -> Iterator[Record]:
        for number, row in enumerate(self._pictures):
            caption = None if self._caption is None else row[self._caption]
            subject = "" if self._subject is None else str(row[self._subject])
            yield Record(f"row {number}", caption, subject)

    def read(self, name: str) -> bytes:
        picture = self._pictures[int(name.removeprefix("row "))][self._column]
        return cast(bytes, picture["bytes"]) if picture["bytes"] is not None else Path(picture["path"]).read_bytes()


def open_source(config: DataConfig) -> Source:
    """The source that `data.path` and `data.kind` mean. Raises InvalidInputError or CorruptFileError."""
    if not config.path:
        raise InvalidInputError("data.path is empty; give a folder of pictures, a JSON list or webdataset shards")
    remote = "://" in config.path or config.path.startswith("pipe:")
    kind = config.kind if config.kind != "auto" else _guess(config.path, remote)
    if kind == "webdataset" and remote:
        return StreamSource(config.path, config.caption_key)
    if remote:
        raise InvalidInputError(f"{config.path} is remote; only webdataset shards (.tar) can be read from there")
    path = Path(config.path)
    if kind == "webdataset":
        shards = _shards(path)
        if not shards:
            raise InvalidInputError(f"{path} matches no .tar shard")
        return TarSource(shards, config.caption_key)
    if not path.exists():
        raise InvalidInputError(f"{path} does not exist")
    if kind == "json":
        return JsonSource(path, config.caption_key)
    if not path.is_dir():
        raise InvalidInputError(f"{path} is no folder; a folder of pictures, a .json list or .tar shards were expected")
    return HuggingFaceSource(path, config.caption_key) if kind == "huggingface" else FolderSource(path)


def _guess(path: str, remote: bool) -> str:
    if ".tar" in path:
        return "webdataset"
    if path.endswith(".json"):
        return "json"
    if remote:
        return "folder"
    folder = Path(path)
    if folder.is_dir():
        if any(folder.glob("*.tar")):
            return "webdataset"
        if any((folder / name).is_file() for name in ("metadata.jsonl", "metadata.csv", "state.json")):
            return "huggingface"
    return "folder"


def _shards(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    from braceexpand import braceexpand

    found = [Path(name) for name in braceexpand(str(path))]
    matches = [sorted(one.parent.glob(one.name)) if "*" in one.name else [one] for one in found]
    shards = [shard for group in matches for shard in group]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise InvalidInputError(f"{len(missing)} shards do not exist, the first is {missing[0]}")
    return shards


def _caption_beside(path: Path) -> str | None:
    for extension in CAPTIONS:
        file = path.with_suffix(extension)
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace").strip()
    return None


def _caption_of(texts: dict[str, str], caption_key: str) -> tuple[str | None, str]:
    caption = next((texts[e].strip() for e in CAPTIONS if e in texts), None)
    values: Any = {}
    if ".json" in texts:
        try:
            values = json.loads(texts[".json"])
        except ValueError:
            values = {}
    if not isinstance(values, dict):
        return caption, ""
    values = cast("dict[str, Any]", values)
    if caption is None and isinstance(values.get(caption_key), str):
        caption = values[caption_key].strip()
    return caption, str(values.get("subject", ""))


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    return "" if file is None else file.read().decode("utf-8", "replace")


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"
