"""What a graph may name on this machine: the one room where a text from a graph becomes a path.

Graphs come from strangers, and who may queue one need not be who owns the machine. So a graph reads below ComfyUI's input,
output and temp folders, files that its lists offer, and folders that the owner lists; it writes below output, to names
that are free. SECURITY.md says the same to users.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import folder_paths

from ...ipadapter_core import InvalidInputError
from ...ipadapter_core.errors import quoted
from ...ipadapter_core.files.access import Places, check_local, listed_folders, plain_path
from ...ipadapter_core.files.text import read_text

FOLDERS = "IMAGE_PROMPT_FOLDERS"
"""Environment variable: more folders that graphs may read from, with the system's path separator between them."""

FOLDERS_FILE = "image_prompt_folders.txt"
"""The same, one a line, in a file beside ComfyUI's main.py and extra_model_paths.yaml, where no client can upload to."""

HINT = (
    f" (ComfyUI's input, output and temp, and those that the owner of the machine lists in {FOLDERS} or {FOLDERS_FILE}; "
    "see SECURITY.md)"
)
_PLACE = re.compile(r" ?\[(input|output|temp)\]$")


def owners_folders() -> list[str]:
    """Folders that the owner lists besides ComfyUI's own; only whole paths count."""
    listed = [os.path.expanduser(part) for part in os.environ.get(FOLDERS, "").split(os.pathsep) if part.strip()]
    file = Path(folder_paths.__file__).with_name(FOLDERS_FILE)
    if file.is_file():
        listed += listed_folders(read_text(file))
    relative = [folder for folder in listed if not os.path.isabs(folder)]
    if relative:
        logging.warning(
            "%s and %s need whole paths; not used: %s", FOLDERS, FOLDERS_FILE, ", ".join(map(quoted, relative))
        )
    return [folder for folder in listed if os.path.isabs(folder)]


def readable_folders() -> list[str]:
    """Where a graph may read anything that it can name."""
    own = (folder_paths.get_input_directory(), folder_paths.get_output_directory(), folder_paths.get_temp_directory())
    return [*own, *owners_folders()]


def marked(name: str) -> bool:
    """Whether a name says by ComfyUI's marks which of its folders it is of."""
    return bool(_PLACE.search(name))


def readable(name: str, what: str) -> str:
    """The path of a file or folder that a graph names: below input, with ComfyUI's marks ``[output]`` and ``[temp]`` below
    these, or whole below a folder of ``readable_folders``.

    Raises InvalidInputError. The host's own reading of marks is not used: that of 0.3.64 lets ``../`` through.
    """
    check_local(name, what)
    mark = _PLACE.search(name)
    base = folder_paths.get_directory_by_type(mark[1] if mark else "input")
    path = os.path.join(base, name[: mark.start()] if mark else name)
    return str(Places(readable_folders(), HINT).check(path, what))


def listed(kind: str, name: str) -> str:
    """The path of a file that ComfyUI lists for a kind of model.

    What lies in these folders is the owner's choice, links included; so only names on the list count, and none that
    leads elsewhere from there. Raises InvalidInputError.
    """
    path = folder_paths.get_full_path(kind, name) if name in folder_paths.get_filename_list(kind) else None
    if path is None:
        raise InvalidInputError(
            f"{quoted(name)} is none of the files in models/{kind}: choose one that the list offers"
        )
    return path


def writable(*parts: str) -> str:
    """A path below output, links followed. Raises InvalidInputError."""
    output = folder_paths.get_output_directory()
    return str(Places([output], " (ComfyUI's output)").check(os.path.join(output, *filter(None, parts)), "output path"))


def free_path(prefix: str, folder: str, extension: str) -> str:
    """A free path ``<prefix>_00001<extension>`` in output or the folder below it, numbered on as the host numbers.

    ``prefix`` may begin with folders and hold the host's ``%year%`` and its like. Raises InvalidInputError.
    """
    root = writable(folder)
    place = writable(folder, plain_path(prefix, "filename_prefix"))
    full, name, counter, _, _ = folder_paths.get_save_image_path(os.path.relpath(place, root), root)
    while os.path.lexists(path := os.path.join(full, f"{name}_{counter:05}{extension}")):
        counter += 1
    return path
