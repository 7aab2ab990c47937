"""The pictures and captions in webdataset shards, from files and from streams: ``0001.jpg``, ``0001.txt`` or ``0001.json``.

A shard comes from strangers: only plain files in it are looked at, and no header makes us read or hold more than it should.
"""

from __future__ import annotations

import tarfile
from collections.abc import Container, Iterator
from typing import IO

from ..errors import AdapterError, CorruptFileError, reason
from ..files.text import as_table, parse_json
from ..images.files import EXTENSIONS, MAX_FILE, shown
from .captions import CAPTIONS, MAX_CAPTION_FILE, caption_of, decode_caption

MAX_HEADER = 2**20
"""Bytes of a header that holds long names or further fields."""

_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


class Member(tarfile.TarInfo):
    """A member whose header is believed only as far as it can be true."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Member:
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0 or (member.type in _HEADERS and member.size > MAX_HEADER):
            raise CorruptFileError(f"a header in it declares {member.size:,} bytes")
        return member


class UntilItsEnd:
    """A stream that says when it is asked for more than it has, again and again.

    tarfile skips a member of any declared size block by block, also long after the end: 2^60 bytes would take centuries.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.empty = stream, 0

    def read(self, size: int) -> bytes:
        content = self.stream.read(size)
        self.empty = 0 if content else self.empty + 1
        if self.empty > 100:
            raise EOFError("it ends before the members that it declares")
        return content


def key_of(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """A member's sample and its extension in lower case; None for what is no plain file, or hidden."""
    folder, _, file = member.name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not member.isfile() or member.issparse() or not stem:
        return None
    return f"{folder}/{stem}".lstrip("/"), (dot + extension).lower()


def wanted(extension: str) -> bool:
    """Whether members of this extension are read."""
    return extension in EXTENSIONS or extension in CAPTIONS or extension == ".json"


def content_of(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> bytes | None:
    """A member's bytes; None if it has more than a file of its kind may have."""
    file = tar.extractfile(member)
    if file is None or member.size > (MAX_FILE if extension in EXTENSIONS else MAX_CAPTION_FILE):
        return None
    return file.read()


def picture_in(members: Container[str]) -> str | None:
    """The extension of the picture among a sample's members."""
    return next((extension for extension in EXTENSIONS if extension in members), None)


def samples_in(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Samples of a tar that is read from start to end: name and contents by extension. Members of a sample follow one another."""
    last, contents = "", dict[str, bytes | None]()
    while (member := tar.next()) is not None:
        setattr(tar, "members", [])  # noqa: B010  (tarfile keeps all that it has seen)
        key = key_of(member)
        if key is None or not wanted(key[1]):
            continue
        if key[0] != last and contents:
            yield last, contents
            contents = {}
        last = key[0]
        contents[key[1]] = content_of(tar, member, key[1])
    if contents:
        yield last, contents


def caption_and_subject(
    texts: dict[str, bytes | None], caption_key: str, encoding: str, name: str
) -> tuple[str | None, str]:
    """What a sample's texts say: the caption file before the JSON, whose only other use is the subject.

    Raises CorruptFileError if the text that holds the caption cannot be used.
    """
    caption = None
    extension = next((e for e in CAPTIONS if e in texts), None)
    if extension is not None:
        caption = decode_caption(_small(texts[extension], name + extension), name + extension, encoding)
    if ".json" not in texts:
        return caption, ""
    try:
        values = as_table(parse_json(_small(texts[".json"], name + ".json"), name + ".json", constants=True))
        if caption is None:
            caption = caption_of(values.get(caption_key), name + ".json")
        return caption, caption_of(values.get("subject"), name + ".json") or ""
    except CorruptFileError:
        if caption is None:
            raise
        return caption, ""  # the caption is what counts; tools write all sorts of things beside it


def _small(content: bytes | None, name: str) -> bytes:
    if content is None:
        raise CorruptFileError(
            f"{shown(name)} has more than the {MAX_CAPTION_FILE:,} bytes that a caption's file may have"
        )
    return content


def damaged(where: object, error: Exception, hint: str = "") -> CorruptFileError:
    """Whatever tarfile raised for a shard, as one sentence."""
    why = str(error) if isinstance(error, AdapterError) else reason(error)
    return CorruptFileError(f"{shown(where)} is not a readable webdataset shard: {why}{hint}")
