"""Captions as people keep them: text files beside pictures, values of lists and tables. What cannot be used is said, never guessed."""

from __future__ import annotations

import math
import os

from ..errors import CorruptFileError, InvalidInputError
from ..files.access import Allowed
from ..files.text import decode_text, read_bytes
from ..images.files import EXTENSIONS, shown

CAPTIONS = (".txt", ".caption")

MAX_CAPTION = 20_000
"""Characters; text encoders read some hundred words."""

MAX_CAPTION_FILE = 2**20
"""Bytes of a caption's file, and of a JSON file that holds one."""


def check_encoding(name: str) -> str:
    """``data.caption_encoding``, if Python knows it. Raises InvalidInputError."""
    try:
        "".encode(name or "utf-8")
    except (LookupError, ValueError):
        raise InvalidInputError(
            f"data.caption_encoding is {shown(name)}, which is no encoding of text; names are such as cp1252, shift_jis, gb18030"
        ) from None
    return name


def caption_of(value: object, name: str) -> str | None:
    """A value of a list or table as a caption: text and numbers as they are written, None and NaN for none.

    ``name`` says whose it is. Raises CorruptFileError for lists, tables, and text that cannot be used.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, (str, int, float)):
        raise CorruptFileError(f"{shown(name)} has a {type(value).__name__} where its text should be")
    text = str(value).strip()
    if len(text) > MAX_CAPTION:
        raise CorruptFileError(
            f"{shown(name)} has a text of {len(text):,} characters; at most {MAX_CAPTION:,} can be one"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CorruptFileError(f"{shown(name)} has a text with halves of characters (lone surrogates)") from None
    return text


def decode_caption(content: bytes, name: str, encoding: str) -> str:
    """The caption in a file's bytes. Raises CorruptFileError, of the kind NotUnicodeError for code pages."""
    return caption_of(decode_text(content, name, encoding), name) or ""


class CaptionFiles:
    """The caption files beside pictures, found whatever the case of their names; folders are listed once."""

    def __init__(self, encoding: str, allowed: Allowed = str) -> None:
        self.encoding, self._allowed = encoding, allowed
        self._folders: dict[str, tuple[dict[str, list[str]], set[str]]] = {}

    def beside(self, picture: str) -> str | None:
        """``a.txt`` or ``a.caption`` for ``a.png``, else ``A.TXT`` and the like if that is no other picture's."""
        folder, name = os.path.split(picture)
        if folder not in self._folders:
            self._folders[folder] = _texts_and_pictures(folder)
        texts, pictures = self._folders[folder]
        stem = os.path.splitext(name)[0]
        best: tuple[bool, int, str] | None = None
        for text in texts.get(stem.lower(), ()):
            other, extension = os.path.splitext(text)
            if other == stem or other not in pictures:
                rank = (other != stem, CAPTIONS.index(extension.lower()), text)
                best = rank if best is None else min(best, rank)
        return None if best is None else os.path.join(folder, best[2])

    def read(self, picture: str) -> str | None:
        """The caption of a picture, None without a file. Raises as ``decode_caption``, and InvalidInputError for no plain file."""
        file = self.beside(picture)
        if file is None:
            return None
        return decode_caption(read_bytes(self._allowed(file), MAX_CAPTION_FILE), os.path.basename(file), self.encoding)


def _texts_and_pictures(folder: str) -> tuple[dict[str, list[str]], set[str]]:
    """Caption files of a folder by their stem in lower case, and the stems of its pictures."""
    texts: dict[str, list[str]] = {}
    pictures: set[str] = set()
    try:
        names = os.listdir(folder or ".")
    except (OSError, ValueError):
        names = []
    for name in names:
        stem, extension = os.path.splitext(name)
        if extension.lower() in CAPTIONS:
            texts.setdefault(stem.lower(), []).append(name)
        elif extension.lower() in EXTENSIONS:
            pictures.add(stem)
    return texts, pictures
