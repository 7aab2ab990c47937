"""The Hugging Face Hub: what is named ``owner/name:path`` comes from this machine's cache, else from the Hub.

Only the command and Python's own calls come here. Whatever a graph of ComfyUI names never does: nothing that ``nodes/`` imports
imports this module (``tests/core/test_hub.py`` holds that).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from .errors import InvalidInputError, quoted, reason
from .images.files import EXTENSIONS
from .quiet import quietly

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_PLACE = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9._/-]{{1,200}}))?(?::([^:\\]+))?")

DESCRIPTIONS = ("*.json", "*.txt", "*.model")
"""What describes a model without its weights: configs and tokenizers."""


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A repository of the Hub, and a file or folder in it: ``owner/name``, ``owner/name:path``, ``owner/name@revision:path``."""

    repository: str
    path: str = ""
    revision: str | None = None

    @classmethod
    def read(cls, text: str) -> HubPlace | None:
        """The place that a text names; None for any other text, such as a path with no or several slashes."""
        found = _PLACE.fullmatch(text)
        if found is None:
            return None
        repository, revision, path = found.groups()
        parts = [] if path is None else path.split("/")
        if any(part in ("", ".", "..") for part in parts):
            return None
        return cls(repository, path or "", revision)

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repository}{at}{':' if self.path else ''}{self.path}"

    @property
    def is_file(self) -> bool:
        """Whether it names a file: its last part has an extension."""
        return bool(Path(self.path).suffix)

    def beside(self, name: str) -> HubPlace:
        """What lies in the same folder."""
        folder = self.path.rpartition("/")[0]
        return HubPlace(self.repository, f"{folder}/{name}" if folder else name, self.revision)


def file_on_disk(source: str | os.PathLike[str]) -> Path:
    """A path of this machine as it is; of ``owner/name:path`` the file in the cache, fetched if it is not there yet.

    Whether there is a file is for the loaders to say. Raises InvalidInputError in one sentence where the Hub is out of reach or
    has no such file.
    """
    place = _place_of(source)
    return Path(source) if place is None or not place.path else _fetched(place)


def folder_on_disk(source: str | os.PathLike[str], *, fetch: bool = True) -> Path:
    """Like ``file_on_disk``; ``owner/name`` is the model in the repository's own folder. Weights are read in safetensors.

    Without ``fetch`` the cache alone is asked. Raises FileNotFoundError where it has no such thing.
    """
    place = _place_of(source)
    return Path(source) if place is None else _fetched(place, fetch)


def place_of(source: object) -> HubPlace | None:
    """The Hub's file or folder that a source names; None for a repository alone, and for what is on this machine."""
    if not isinstance(source, (str, Path)):
        return None
    place = _place_of(source)
    return place if place is not None and place.path else None


def _fetched(place: HubPlace, fetch: bool = True) -> Path:
    import huggingface_hub

    where: dict[str, Any] = {"repo_id": place.repository, "revision": place.revision}
    if place.is_file:
        return Path(_local_first(place, huggingface_hub.hf_hub_download, fetch, filename=place.path, **where))
    names = (
        (*DESCRIPTIONS, "*.safetensors")
        if place.path
        else ("config.json", "preprocessor_config.json", "model*.safetensors*")
    )
    patterns = [f"{place.path}/{name}" if place.path else name for name in names]

    def folder(**arguments: Any) -> str:
        root = huggingface_hub.snapshot_download(allow_patterns=patterns, **where, **arguments)
        found = Path(root, place.path)
        if not any(found.glob("*.safetensors")):
            raise FileNotFoundError(f"no weights in safetensors in {place.path or 'its own folder'}")
        return str(found)

    return Path(_local_first(place, folder, fetch))


def model_on_disk(source: str | os.PathLike[str]) -> Path:
    """Like ``file_on_disk`` for base models: ``owner/name`` is a pipeline of diffusers, of which the needed files are fetched."""
    place = _place_of(source)
    if place is None:
        return Path(source)
    return _fetched(place) if place.path else _pipeline(place)


def described(source: str | os.PathLike[str]) -> Path:
    """A folder that describes a model in one file: of ``owner/name`` configs and tokenizers, and what that file has not.

    Files of UNets hold text encoders and autoencoders, those of transformers do not. Raises as ``file_on_disk``.
    """
    place = _place_of(source)
    if place is None:
        return Path(source)
    import huggingface_hub

    def folder(**arguments: Any) -> str:
        found: str = huggingface_hub.snapshot_download(
            place.repository, revision=place.revision, allow_patterns=[*DESCRIPTIONS], **arguments
        )
        if not Path(found, "model_index.json").is_file():
            raise FileNotFoundError("no model_index.json")
        return found

    home = Path(_local_first(place, folder))
    return _pipeline(place, transformer=None) if (home / "transformer").is_dir() else home


def _pipeline(place: HubPlace, **without: None) -> Path:
    """A pipeline's files, chosen by diffusers, but for the parts ``without``."""
    from diffusers import DiffusionPipeline

    made: Any = DiffusionPipeline

    def folder(**arguments: Any) -> str:
        with quietly("diffusers"):
            found = Path(
                made.download(place.repository, revision=place.revision, use_safetensors=True, **without, **arguments)
            )
        heavy = [part for part in ("unet", "transformer", "vae") if part not in without and (found / part).is_dir()]
        if not heavy or not all(any((found / part).glob("*.safetensors")) for part in heavy):
            raise FileNotFoundError("no weights of all its parts in safetensors")
        return str(found)

    return Path(_local_first(place, folder))


def is_on_hub(source: str | os.PathLike[str]) -> bool:
    """Whether a source names a repository of the Hub, or a place in one, and nothing on this machine."""
    return _place_of(source) is not None


@contextmanager
def nothing_fetched() -> Generator[None]:
    """Inside, the cache alone is asked, whatever is named: for names that come from strangers' files."""
    before = _FETCHING.set(False)
    try:
        yield
    finally:
        _FETCHING.reset(before)


_FETCHING: ContextVar[bool] = ContextVar("fetching", default=True)


def _place_of(source: str | os.PathLike[str]) -> HubPlace | None:
    text = os.fspath(source)
    if os.path.exists(text):
        return None
    place = HubPlace.read(text.replace(os.sep, "/"))
    missing = place is not None and not place.path and Path(place.repository).suffix.lower() in _FILES
    return None if missing else place


_FILES = {".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth", ".onnx", *EXTENSIONS}
"""What ends a path with one slash that is no repository, but a file that is not there."""


def _local_first(place: HubPlace, get: Callable[..., str], fetch: bool = True, **arguments: Any) -> str:
    """What ``get`` finds in the cache, else what it fetches. Without ``fetch`` FileNotFoundError tells that it found nothing."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging

    disable_progress_bars()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # of every try it would write lines
    try:
        try:
            return get(local_files_only=True, **arguments)
        except Exception:  # not there: each version of the library has errors of its own for that
            enable_progress_bars()
        if not fetch:
            raise FileNotFoundError(str(place))
        if not _FETCHING.get():
            raise InvalidInputError(
                f"{quoted(str(place), 200)} is not on this machine, and what a picture names is not fetched unasked; fetch it with: "
                f"hf download {place.repository}{' ' + place.path if place.is_file else ''}"
            )
        try:
            _find_host()
            return get(**arguments)
        except Exception as error:
            raise InvalidInputError(_why(place, error)) from error
    finally:
        logging.set_verbosity(before)
        enable_progress_bars()


def _find_host() -> None:
    """Raise OSError where the Hub's name leads nowhere: the library would try again for half a minute. A proxy may know it."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    if host.hostname and not getproxies():
        socket.getaddrinfo(host.hostname, host.port or 443)


def _why(place: HubPlace, error: Exception) -> str:
    from huggingface_hub import errors

    what = quoted(str(place), 200)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{what} is gated: accept its terms on https://huggingface.co/{place.repository}, then run: hf auth login"
        )
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        return f"{what} is nothing on this machine, and the Hub has no such repository (or it is private: hf auth login); check the spelling"
    missing = isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError)
    if missing or type(error) is FileNotFoundError:
        return f"the Hub's repository {place.repository} has not what {what} names ({reason(error)}); look at its files there"
    return (
        f"{what} is not on this machine, and the Hugging Face Hub is out of reach ({reason(error, 80)}); fetch it once with a "
        f"connection (hf download {place.repository}{' ' + place.path if place.is_file else ''}), or give a local path"
    )
