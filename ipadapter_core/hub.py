"""The Hugging Face Hub: what is named ``owner/name:path`` comes from this machine's cache, else from the Hub.

Only the command and Python's own calls come here. Whatever a graph of ComfyUI names never does: nothing that ``nodes/`` imports
imports this module (``tests/core/test_hub.py`` holds that).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from .errors import InvalidInputError, quoted, reason
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
    if place.path:
        return _fetched(place)
    from diffusers import DiffusionPipeline

    def folder(**arguments: Any) -> str:
        with quietly("diffusers"):
            found = Path(
                DiffusionPipeline.download(place.repository, revision=place.revision, use_safetensors=True, **arguments)
            )
        if not any(any((found / part).glob("*.safetensors")) for part in ("unet", "transformer")):
            raise FileNotFoundError("no weights of a unet or transformer in safetensors")
        return str(found)

    return Path(_local_first(place, folder))


def descriptions_of(repository: str) -> Path:
    """The configs and tokenizers of a repository's model, without weights. Raises as ``file_on_disk``."""
    import huggingface_hub

    place = HubPlace(repository)

    def folder(**arguments: Any) -> str:
        found: str = huggingface_hub.snapshot_download(repository, allow_patterns=[*DESCRIPTIONS], **arguments)
        if not Path(found, "model_index.json").is_file():
            raise FileNotFoundError("no model_index.json")
        return found

    return Path(_local_first(place, folder))


def _place_of(source: str | os.PathLike[str]) -> HubPlace | None:
    text = os.fspath(source)
    if os.path.exists(text):
        return None
    return HubPlace.read(text.replace(os.sep, "/"))


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
