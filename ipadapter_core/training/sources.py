"""Where pictures and captions come from: a folder, lists, webdataset shards, Hugging Face datasets.

A source gives records in a fixed order, without opening pictures. ``read`` gives the bytes of one; a stream's records
carry theirs along, so that one pass over remote shards is enough for the cache. What cannot be used is named, not dropped.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import csv
import importlib
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, Protocol, cast
from urllib.parse import urlparse

from ..errors import AdapterError, CorruptFileError, InvalidInputError, reason
from ..files.access import Allowed, Places, check_local
from ..files.text import NotUnicodeError, decode_text, parse_json, read_bytes
from ..images.files import EXTENSIONS, MAX_FILE, shown
from .captions import CAPTIONS, CaptionFiles, caption_of, check_encoding
from .config import DataConfig
from .tar_members import (
    Member,
    UntilItsEnd,
    caption_and_subject,
    content_of,
    damaged,
    key_of,
    picture_in,
    samples_in,
    wanted,
)

LISTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
METADATA = ("metadata.jsonl", "metadata.csv")
"""Lists that lie in the folder of their pictures, as ``datasets`` has them."""

MAX_LIST = 2**32
"""Bytes of a list; that of ten million pictures has about 1.5 GB."""

MAX_SHARDS = 1_000_000
_Arguments = ParamSpec("_Arguments")
_KOHYA = re.compile(r"\d+_.")


@dataclass(frozen=True, slots=True)
class Record:
    """One picture with its caption (None: there is none; or there is a ``problem`` with it, and the record cannot be used).

    ``subject`` groups pictures of the same thing; ``reference`` names another record's picture, or a picture of its own
    right, to be the reference. ``stamp`` changes when the file does; empty where only its bytes can tell.
    """

    name: str
    caption: str | None
    subject: str = ""
    reference: str = ""
    stamp: str = ""
    content: bytes | None = None
    problem: str = ""


class Source(Protocol):
    """Records in a fixed order, and their bytes by name. ``random_access`` is False for streams."""

    @property
    def random_access(self) -> bool: ...

    @property
    def notes(self) -> Sequence[str]:
        """What else lies there, one line each: files that are not read, folders that cannot be."""
        ...

    def __iter__(self) -> Iterator[Record]: ...

    def read(self, name: str) -> bytes:
        """The bytes of a picture; raises OSError or AdapterError."""
        ...


class FolderSource:
    """All pictures below a folder; the caption of ``a.png`` is in ``a.txt``. A subfolder is a subject, links to folders too."""

    random_access = True

    def __init__(self, folder: Path, encoding: str = "", allowed: Allowed = str) -> None:
        self.folder, self._allowed = folder, allowed
        self._captions = CaptionFiles(encoding, allowed)
        self.names: list[str] = []
        texts: list[str] = []
        others: Counter[str] = Counter()
        self.notes: list[str] = []
        for name in _walk(folder, self.notes, allowed):
            extension = os.path.splitext(name)[1].lower()
            if extension in EXTENSIONS:
                self.names.append(name)
            elif extension in CAPTIONS:
                texts.append(name)
            else:
                others[extension] += 1
        self.names.sort()
        used = {self._captions.beside(self._path(name)) for name in self.names}
        alone = [name for name in texts if self._path(name) not in used]
        if alone:
            self.notes.append(f"{len(alone)} text files without a picture, not read: {_some(alone)}")
        self.notes += _others(others, "files")
        repeats = sorted({part for name in self.names for part in name.split("/")[:-1] if _KOHYA.match(part)})
        if repeats:
            self.notes.append(
                f"folders named as for kohya's repeats ({_some(repeats)}): the numbers have no effect here, every picture "
                "is seen once per epoch"
            )

    def __iter__(self) -> Iterator[Record]:
        for name in self.names:
            caption, _, problem = _usable(name, self._caption, name)
            yield Record(name, caption, name.rpartition("/")[0], stamp=_stamp(self._path(name)), problem=problem)

    def read(self, name: str) -> bytes:
        return read_bytes(self._allowed(self._path(name)), MAX_FILE)

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _caption(self, name: str) -> tuple[str | None, str]:
        return self._captions.read(self._path(name)), ""


class ListSource:
    """The original's list, ``[{"image_file": "1.png", "text": "A dog"}, …]``, relative to the list's folder; also as JSON
    lines or CSV, with ``file_name`` for ``image_file``, as ``datasets`` has them.

    Entries may add ``subject`` and ``reference_file``. An entry without a caption key is captioned by the text beside its picture.
    """

    random_access = True

    def __init__(self, file: Path, caption_key: str, encoding: str = "", allowed: Allowed = str) -> None:
        self.folder, self._allowed = file.parent, allowed
        self.notes: list[str] = []
        self._captions = CaptionFiles(encoding, allowed)
        self.records: list[Record] = []
        for number, values in enumerate(_entries(file, encoding)):
            entry = f"entry {number} of {file.name}"
            if not isinstance(values, dict):
                raise InvalidInputError(f'{shown(entry)} is no table such as {{"image_file": …, "{caption_key}": …}}')
            self.records.append(self._record(values, caption_key, entry))
        if file.name in METADATA:
            listed = {os.path.normpath(record.name) for record in self.records}
            more = [
                n
                for n in _walk(self.folder, [], allowed)
                if os.path.splitext(n)[1].lower() in EXTENSIONS and n not in listed
            ]
            if more:
                self.notes.append(
                    f"{len(more)} pictures that {file.name} does not list, left out: {_some(sorted(more))}"
                )

    def _record(self, values: dict[str, Any], caption_key: str, entry: str) -> Record:
        name, reference = values.get("image_file", values.get("file_name")), values.get("reference_file") or ""
        if not isinstance(name, str) or not name:
            raise InvalidInputError(f"{shown(entry)} has no image_file (or file_name), the name of its picture")
        if not isinstance(reference, str):
            raise InvalidInputError(
                f"{shown(entry)} has a reference_file that is no text; the name of a picture was expected"
            )
        caption, subject, problem = _usable(name, self._texts, values, caption_key, self._path(name), entry)
        stamp = _stamp(self._path(name))
        if reference and stamp:
            stamp += f" {_stamp(self._path(reference))}"
        return Record(name, caption, subject, reference, stamp, problem=problem)

    def _texts(self, values: dict[str, Any], caption_key: str, path: str, entry: str) -> tuple[str | None, str]:
        caption = caption_of(values[caption_key], entry) if caption_key in values else self._captions.read(path)
        return caption, caption_of(values.get("subject"), entry) or ""

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def read(self, name: str) -> bytes:
        return read_bytes(self._path(name), MAX_FILE)

    def _path(self, name: str) -> str:
        path = os.path.join(self.folder, os.path.expanduser(name))
        # lists are written on Windows too
        path = path if "\\" not in name or os.path.exists(path) else path.replace("\\", "/")
        self._allowed(path)
        return path


class TarSource:
    """Local webdataset shards: ``0001.jpg``, ``0001.txt`` or ``0001.json``; each member's place in its tar is remembered."""

    random_access = True

    def __init__(self, shards: list[Path], caption_key: str, encoding: str = "") -> None:
        self.records: list[Record] = []
        self._places: dict[str, tuple[Path, int, int]] = {}
        names = Counter(shard.name for shard in shards)
        self._alike = {name for name, count in names.items() if count > 1}
        others: Counter[str] = Counter()
        for shard in shards:
            try:
                with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
                    self._index(shard, tar, caption_key, encoding, others)
            except Exception as error:  # tarfile raises of many kinds
                hint = "; compressed shards cannot be read at random, unpack it first" if _compressed(shard) else ""
                raise damaged(shard, error, hint) from error
        self.notes = _others(others, "members of shards")

    def _index(self, shard: Path, tar: tarfile.TarFile, caption_key: str, encoding: str, others: Counter[str]) -> None:
        groups: dict[str, dict[str, tarfile.TarInfo]] = {}
        end = shard.stat().st_size
        for member in tar:
            key = key_of(member)
            if member.isfile() and not member.issparse() and member.offset_data + member.size > end:
                raise CorruptFileError(f"{shown(member.name)} ends behind the file's end")
            if key is not None and wanted(key[1]):
                groups.setdefault(key[0], {})[key[1]] = member
            elif not member.isdir():
                others["links, devices or hidden" if key is None else key[1]] += 1
        for key, members in groups.items():
            extension = picture_in(members)
            if extension is None:
                continue
            picture = members[extension]
            name = f"{shard if shard.name in self._alike else shard.name}/{key}"
            texts = {e: content_of(tar, m, e) for e, m in members.items() if e not in EXTENSIONS}
            caption, subject, problem = _usable(name, caption_and_subject, texts, caption_key, encoding, name)
            self._places[name] = (shard, picture.offset_data, picture.size)
            stamp = f"{_stamp(shard)} {picture.offset_data}"
            self.records.append(Record(name, caption, subject, stamp=stamp, problem=problem))

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def read(self, name: str) -> bytes:
        shard, offset, size = self._places[name]
        if size > MAX_FILE:
            raise CorruptFileError(
                f"{shown(name)} has {size:,} bytes, more than the {MAX_FILE:,} that a picture may have"
            )
        with shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class StreamSource:
    """Remote webdataset shards (http, https, s3 through ``pipe:``), read once from start to end."""

    random_access = False

    def __init__(self, urls: str | list[str], caption_key: str, encoding: str = "") -> None:
        self.urls, self.caption_key, self.encoding = urls, caption_key, encoding
        self.bad: list[str] = []
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[Record]:
        urls = expand_urls(self.urls) if isinstance(self.urls, str) else self.urls
        for url in urls:
            try:
                yield from self._records(url)
            except Exception as error:  # tarfile, the network and the commands raise of many kinds
                self.bad.append(reason(error))
        if self.bad:
            raise CorruptFileError(f"{len(self.bad)} shards could not be read, the first: {self.bad[0]}")

    def _records(self, url: str) -> Iterator[Record]:
        shard = Path(urlparse(url).path).name
        stream: Any = importlib.import_module("webdataset.gopen").gopen(url)
        try:
            with tarfile.open(fileobj=cast(Any, UntilItsEnd(stream)), mode="r|*", tarinfo=Member) as tar:
                for key, contents in samples_in(tar):
                    extension = picture_in(contents)
                    if extension is None:
                        continue
                    name, content = f"{shard}/{key}", contents[extension]
                    if content is None:
                        problem = f"{shown(name)} has more than the {MAX_FILE:,} bytes that a picture may have"
                        yield Record(name, None, content=b"", problem=problem)
                        continue
                    texts = (contents, self.caption_key, self.encoding, name)
                    caption, subject, problem = _usable(name, caption_and_subject, *texts)
                    yield Record(name, caption, subject, content=content, problem=problem)
        finally:
            with suppress(Exception):  # a command that is stopped early says that it was
                stream.close()

    def read(self, name: str) -> bytes:
        raise InvalidInputError("remote shards are read once, in order; set data.cache so that they are kept")


def expand_urls(urls: str) -> list[str]:
    """The shards that braces in an address mean. Raises InvalidInputError."""
    _check_braces(urls)
    try:
        return list(importlib.import_module("webdataset.shardlists").expand_urls(urls))
    except Exception as error:
        raise InvalidInputError(f"{shown(urls)} is no address of shards: {reason(error)}") from None


class HuggingFaceSource:
    """A dataset saved with save_to_disk, or what ``datasets`` finds in a folder of pictures without metadata."""

    random_access = True

    def __init__(self, folder: Path, caption_key: str, encoding: str = "") -> None:
        import datasets

        self.notes: list[str] = []
        try:
            if (folder / "state.json").is_file():
                table: Any = datasets.load_from_disk(str(folder))
            else:
                table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
            column = next((name for name, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
        except Exception as error:  # datasets, arrow and pandas raise of many kinds
            raise CorruptFileError(f"{shown(folder)} cannot be read by datasets: {reason(error)}") from error
        if column is None:
            raise InvalidInputError(f"{shown(folder)} has no column of pictures; it has {_some(list(table.features))}")
        self._pictures = table.cast_column(column, datasets.Image(decode=False))
        self._column = column
        self._caption = caption_key if caption_key in table.features else None
        self._subject = "subject" if "subject" in table.features else None
        self._beside = CaptionFiles(encoding)

    def __iter__(self) -> Iterator[Record]:
        for name in (f"row {number}" for number in range(len(self._pictures))):
            caption, subject, problem = _usable(name, self._texts, name)
            yield Record(name, caption, subject, problem=problem)

    def _texts(self, name: str) -> tuple[str | None, str]:
        row = self._row(name)
        subject = "" if self._subject is None else caption_of(row[self._subject], name) or ""
        if self._caption is not None:
            return caption_of(row[self._caption], name), subject
        path = (row[self._column] or {}).get("path")
        return self._beside.read(path) if path else None, subject

    def _row(self, name: str) -> dict[str, Any]:
        try:
            return self._pictures[int(name.removeprefix("row "))]
        except Exception as error:  # arrow raises of many kinds for damaged files
            raise CorruptFileError(f"{name} cannot be read by datasets: {reason(error)}") from error

    def read(self, name: str) -> bytes:
        picture = self._row(name)[self._column]
        if not picture or (picture["bytes"] is None and not picture["path"]):
            raise CorruptFileError(f"{name} has no picture")
        return picture["bytes"] if picture["bytes"] is not None else read_bytes(picture["path"], MAX_FILE)


def open_source(config: DataConfig) -> Source:
    """The source that ``data.path`` and ``data.kind`` mean. Raises InvalidInputError or CorruptFileError."""
    if not config.path:
        raise InvalidInputError("data.path is empty; give a folder of pictures, a list or webdataset shards")
    encoding = check_encoding(config.caption_encoding)
    remote = "://" in config.path or config.path.startswith("pipe:")
    path = Path(config.path if remote else os.path.expanduser(config.path))
    if "\0" in config.path:
        raise InvalidInputError(f"data.path is {shown(path)}, which is no path: it has a NUL character")
    allowed: Allowed = str
    if config.roots:
        check_local(config.path, "data.path")
        allowed = partial(Places(config.roots).check, what="file")
        allowed(str(path))
    kind = config.kind if config.kind != "auto" else _guess(path, remote)
    if kind == "webdataset" and remote:
        return StreamSource(config.path, config.caption_key, encoding)
    if remote:
        raise InvalidInputError(f"{shown(config.path)} is remote; only webdataset shards (.tar) can be read from there")
    if kind == "webdataset":
        shards = _shards(path, allowed)
        if not shards:
            raise InvalidInputError(f"{shown(path)} matches no .tar shard")
        return TarSource(shards, config.caption_key, encoding)
    if not os.path.exists(path):
        raise InvalidInputError(
            f"data.path: {shown(path)} does not exist; give a folder of pictures, a list or webdataset shards"
        )
    if kind == "huggingface" and path.is_dir():
        path = next((path / name for name in METADATA if (path / name).is_file()), path)
        allowed(str(path))
    if kind == "json" or (path.name in METADATA and path.is_file()):
        try:
            return ListSource(path, config.caption_key, encoding, allowed)
        except NotUnicodeError as error:
            raise NotUnicodeError(f'{error}, or name the code page: data.caption_encoding = "cp1252"') from None
        except FileNotFoundError as error:
            raise InvalidInputError(str(error)) from None
    if not path.is_dir():
        raise InvalidInputError(
            f"{shown(path)} is no folder; a folder of pictures, a list ({', '.join(LISTS)}) or .tar shards were expected"
        )
    if kind == "huggingface" and config.roots:
        raise InvalidInputError(
            f"{shown(path)} is a saved dataset, whose files name others; a graph may give a folder of pictures, a list or .tar "
            "shards, and the command ipadapter train reads the rest"
        )
    if kind == "huggingface":
        return HuggingFaceSource(path, config.caption_key, encoding)
    return FolderSource(path, encoding, allowed)


def _guess(path: Path, remote: bool) -> str:
    if remote:
        return "webdataset" if ".tar" in str(path) else "folder"
    if os.path.isdir(path):
        if any(path.glob("*.tar")):
            return "webdataset"
        return "huggingface" if any((path / name).is_file() for name in (*METADATA, "state.json")) else "folder"
    if path.suffix.lower() in LISTS:
        return "json"
    return "webdataset" if ".tar" in path.name.lower() else "folder"


def _shards(path: Path, allowed: Allowed) -> list[Path]:
    """The shards of a folder or pattern, each allowed; what is not is not looked for."""
    if os.path.isdir(path):
        shards = sorted(path.glob("*.tar"))
        for shard in shards:
            allowed(str(shard))
        return shards
    from braceexpand import braceexpand

    _check_braces(str(path))
    try:
        found = [Path(name) for name in braceexpand(str(path))]
        for one in found:
            allowed(str(one))
        matches = [sorted(one.parent.glob(one.name)) if "*" in one.name else [one] for one in found]
    except AdapterError:
        raise
    except (ValueError, OSError, NotImplementedError) as error:
        raise InvalidInputError(f"{shown(path)} is no pattern of shards: {reason(error)}") from None
    shards = [shard for group in matches for shard in group]
    for shard in shards:
        allowed(str(shard))
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        raise InvalidInputError(f"{len(missing)} shards do not exist, the first is {shown(missing[0])}")
    return shards


def _check_braces(pattern: str) -> None:
    """Raise InvalidInputError if braces mean more names than anybody has; braceexpand would write them all down."""
    count = 1
    for group in re.findall(r"\{([^{}]*)\}", pattern):
        numbers = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?", group)
        if numbers and len(group) < 60:
            count *= abs(int(numbers[1]) - int(numbers[2])) + 1
        else:
            count *= MAX_SHARDS + 1 if numbers else group.count(",") + 1
        if count > MAX_SHARDS:
            raise InvalidInputError(f"{shown(pattern)} means more than {MAX_SHARDS:,} shards; check its braces")


# --- what lies in a folder ---------------------------------------------------------------------------------------------


def _walk(folder: Path, notes: list[str], allowed: Allowed) -> Iterator[str]:
    """Names of the files below a folder, hidden ones left out. Links to allowed folders are followed, each folder is read once.

    Real folders come before links, so that a linked folder inside keeps its own name; a link to where it lies in is a loop.
    """
    real = [""]
    links: list[str] = []
    seen: set[str] = set()
    while real or links:
        inside = real.pop() if real else links.pop(0)
        path = os.path.realpath(folder / inside)
        if path in seen:
            continue
        seen.add(path)
        try:
            allowed(str(folder / inside))
            entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
        except AdapterError as error:
            notes.append(f"{error}; what is in it is left out")
            continue
        except OSError as error:
            notes.append(f"{shown(inside or folder)} cannot be read ({error.strerror}); what is in it is left out")
            continue
        for entry in entries:
            name = f"{inside}/{entry.name}".lstrip("/")
            if entry.name.startswith("."):
                continue
            if not os.path.isdir(entry.path):
                yield name
            elif not entry.is_symlink():
                real.append(name)
            elif not (path + os.sep).startswith(os.path.join(os.path.realpath(entry.path), "")):
                links.append(name)


def _others(counts: Counter[str], what: str) -> list[str]:
    if not counts:
        return []
    kinds = [f"{count} {shown(kind[:30]) if kind else 'without an extension'}" for kind, count in counts.most_common(6)]
    return [f"{sum(counts.values())} other {what}, not read: {', '.join(kinds)}{', …' if len(counts) > 6 else ''}"]


def _some(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- lists -----------------------------------------------------------------------------------------------------------------


def _entries(file: Path, encoding: str) -> Iterator[Any]:
    """The entries of a list, whatever they are. Raises CorruptFileError, InvalidInputError and FileNotFoundError."""
    text = decode_text(read_bytes(file, MAX_LIST), str(file), encoding)
    match file.suffix.lower():
        case ".jsonl" | ".ndjson":
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    yield parse_json(line, f"line {number} of {file.name}", constants=True)
        case ".csv" | ".tsv":
            yield from _rows(text, file)
        case _:
            entries = parse_json(text, str(file), constants=True)
            if not isinstance(entries, list):
                raise InvalidInputError(f'{shown(file)} should hold a list of {{"image_file": …, "text": …}} entries')
            yield from entries


def _rows(text: str, file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table by column, empty cells as None; Excel separates by semicolons where commas are decimal points."""
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter):
            yield {str(key).strip(): value or None for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise CorruptFileError(f"{shown(file)} is no table that can be read: {reason(error)}") from None


def _usable(
    name: str, read: Callable[_Arguments, tuple[str | None, str]], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> tuple[str | None, str, str]:
    """Caption and subject that ``read`` gives for a picture of that name, and why they cannot be used."""
    try:
        return *read(*args, **kwargs), ""
    except AdapterError as error:
        return None, "", str(error)
    except OSError as error:
        return None, "", f"the caption of {shown(name)} cannot be read ({reason(error)})"


def _compressed(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    return False


def _stamp(path: str | Path) -> str:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"
