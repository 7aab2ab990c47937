"""ComfyUI's model, input and output folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import folder_paths

from ...ipadapter_core import InvalidInputError
from ...ipadapter_core.demo.world import STYLE
from ...ipadapter_core.downloads import DOWNLOADS
from .access import listed, marked, readable

Kind = Literal["checkpoints", "clip_vision", "diffusion_models", "image_prompts", "ipadapter", "loras"]
"""The folders below ``models`` whose files this pack lists."""

IN_INPUT = " [input]"
"""How ComfyUI marks a file of the input folder."""

Version = tuple[str, int, int]


FORMER_FOLDERS: dict[str, tuple[str, Kind]] = {
    "xlabs_ipadapters": ("xlabs/ipadapters", "ipadapter"),
    "ipadapter-flux": ("ipadapter-flux", "ipadapter"),
    "xlabs_loras": ("xlabs/loras", "loras"),
}
"""Where packs for FLUX.1 have their files: the kind that they register, its folder below ``models``, and what it is here."""


def register_folders() -> None:
    """Make ``models/ipadapter`` and ``output/ipadapter`` known, besides what others registered under the same name, and
    the same for ``image_prompts``. What lies where other packs have theirs is offered too."""
    _register("ipadapter", folder_paths.supported_pt_extensions)
    _register("image_prompts", {".safetensors", ".ipadpt"})
    for kind, (folder, ours) in FORMER_FOLDERS.items():
        known = folder_paths.folder_names_and_paths.get(kind, ([], set()))[0]
        for path in dict.fromkeys([*known, os.path.join(folder_paths.models_dir, folder)]):
            if os.path.isdir(path) and path not in folder_paths.get_folder_paths(ours):
                folder_paths.add_model_folder_path(ours, path)


def _register(kind: Kind, known: set[str]) -> None:
    for base in (folder_paths.models_dir, folder_paths.get_output_directory()):
        path = os.path.join(base, kind)
        if path not in folder_paths.folder_names_and_paths.get(kind, ([], set()))[0]:
            folder_paths.add_model_folder_path(kind, path)
    paths, extensions = folder_paths.folder_names_and_paths[kind]
    folder_paths.folder_names_and_paths[kind] = (paths, set(extensions) | known)


def user_file(name: str) -> Path:
    """A file of the user's own, below ComfyUI's user folder, which no graph can write."""
    return Path(folder_paths.get_user_directory(), name)


def folder_of(kind: Kind) -> str:
    """Where files of a kind belong: the first folder of its name."""
    return folder_paths.get_folder_paths(kind)[0]


SHIPPED: dict[Kind, dict[str, Path]] = {"loras": {STYLE.name: STYLE}}
"""Files that come with this pack, for graphs that need no download: last on this pack's own lists, and on nobody else's."""


def names(kind: Kind) -> list[str]:
    """The files of a kind that a widget offers; image prompts also lie in the input folder, where other tools save them.

    What comes with this pack is last.
    """
    loose = input_names((".ipadpt", ".ipadpt.safetensors")) if kind == "image_prompts" else []
    own = [*folder_paths.get_filename_list(kind), *(name + IN_INPUT for name in loose)]
    return [*own, *(name for name in SHIPPED.get(kind, {}) if name not in own)]


EXAMPLES: dict[Kind, str] = {
    "checkpoints": DOWNLOADS["v1-5-pruned-emaonly.safetensors"].where,
    "clip_vision": DOWNLOADS["CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"].where,
    "image_prompts": "what Save Image Prompt writes is found in output/image_prompts too",
    "ipadapter": DOWNLOADS["ip-adapter_sd15.safetensors"].where,
    "loras": "a LoRA of any format for your model",
}
"""What to put into a folder that is empty, for messages."""


def choices(kind: Kind) -> list[str]:
    """``names`` for a widget: without files one entry that says so, where an empty list would be drawn as 'undefined'."""
    return names(kind) or [none_yet(kind)]


def none_yet(kind: str) -> str:
    return f"no file in models/{kind} yet"


def input_names(extensions: tuple[str, ...]) -> list[str]:
    """Files of these extensions anywhere below the input folder."""
    root = folder_paths.get_input_directory()
    found = [os.path.join(folder, name) for folder, _, files in os.walk(root) for name in files]
    return sorted(os.path.relpath(path, root) for path in found if path.endswith(extensions))


def path(kind: Kind, name: str) -> str:
    """The path of a file that ``names`` offers. Raises InvalidInputError for another, and for the entry that says there is none."""
    if name == none_yet(kind):
        raise InvalidInputError(
            f"there is no file in {folder_of(kind)} yet: put one there ({EXAMPLES[kind]}), press R in ComfyUI's editor and choose it"
        )
    if name in SHIPPED.get(kind, {}) and name not in folder_paths.get_filename_list(kind):
        return str(SHIPPED[kind][name])
    return readable(name, "file") if kind == "image_prompts" and marked(name) else listed(kind, name)


def named(kind: Kind, text: str) -> str:
    """The name on the list of a kind that a text from another pack or system means, else the text itself.

    It may have the other kind of slashes, or be the whole path of a listed file, as LoRA stackers give them.
    """
    texts = [text]
    for folder in folder_paths.get_folder_paths(kind) if os.path.isabs(text) else ():
        texts.append(os.path.relpath(text, folder))
    return next((name for wanted in texts for name in names(kind) if _slashed(name) == _slashed(wanted)), text)


def _slashed(name: str) -> str:
    return name.replace("\\", "/")


def listing(*kinds: Kind) -> str:
    """Text that changes with what lies in these folders, for ComfyUI's caching of nodes that choose by themselves."""
    return "\n".join(fingerprint(kind, *names(kind)) for kind in kinds)


def version(kind: Kind, name: str) -> Version:
    """Path, time of change and size of a file: what is loaded from it is shared under this key."""
    found = path(kind, name)
    stat = os.stat(found)
    return found, stat.st_mtime_ns, stat.st_size


def fingerprint(kind: Kind, *names: str) -> str:
    """Text that changes with the files, for ComfyUI's caching of nodes."""
    there = [name for name in names if name != none_yet(kind)]
    return " ".join(f"{name} {changed} {size}" for name in there for _, changed, size in [version(kind, name)])
