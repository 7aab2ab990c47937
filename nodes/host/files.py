"""ComfyUI's model, input and output folders."""

from __future__ import annotations

import os

import folder_paths

from .access import listed, marked, readable

FOLDER = "ipadapter"
PROMPT_FOLDER = "image_prompts"
IN_INPUT = " [input]"
"""How ComfyUI marks a file of the input folder."""

Version = tuple[str, int, int]


def register_model_folders() -> None:
    """Make ``models/ipadapter`` and ``output/ipadapter`` known, besides what others registered under the same name, and
    the same for ``image_prompts``."""
    _register(FOLDER, folder_paths.supported_pt_extensions)
    _register(PROMPT_FOLDER, {".safetensors", ".ipadpt"})


def _register(kind: str, known: set[str]) -> None:
    for base in (folder_paths.models_dir, folder_paths.get_output_directory()):
        path = os.path.join(base, kind)
        if path not in folder_paths.folder_names_and_paths.get(kind, ([], set()))[0]:
            folder_paths.add_model_folder_path(kind, path)
    paths, extensions = folder_paths.folder_names_and_paths[kind]
    folder_paths.folder_names_and_paths[kind] = (paths, set(extensions) | known)


def adapter_files() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


def folder_of(kind: str) -> str:
    """Where files of a kind belong: the first folder of its name."""
    return folder_paths.get_folder_paths(kind)[0]


def clip_vision_files() -> list[str]:
    return folder_paths.get_filename_list("clip_vision")


def input_files(extensions: tuple[str, ...]) -> list[str]:
    """Files of these extensions anywhere below the input folder."""
    root = folder_paths.get_input_directory()
    found = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    return sorted(os.path.relpath(path, root) for path in found if path.endswith(extensions))


def prompt_files() -> list[str]:
    """Saved image prompts, and the embeds that other tools' users have in the input folder."""
    loose = [name + IN_INPUT for name in input_files((".ipadpt", ".ipadpt.safetensors"))]
    return [*folder_paths.get_filename_list(PROMPT_FOLDER), *loose]


def prompt_path(file: str) -> str:
    return input_path(file) if marked(file) else listed(PROMPT_FOLDER, file)


def prompt_fingerprint(file: str) -> str:
    stat = os.stat(prompt_path(file))
    return f"{file} {stat.st_mtime_ns} {stat.st_size}"


def input_path(name: str) -> str:
    return readable(name, "file")


def file_version(kind: str, file: str) -> Version:
    """Path, time of change and size of a file below models/<kind>: what is loaded from it is shared under this key."""
    path = listed(kind, file)
    stat = os.stat(path)
    return path, stat.st_mtime_ns, stat.st_size


def _fingerprint(kind: str, file: str) -> str:
    _, changed, size = file_version(kind, file)
    return f"{file} {changed} {size}"


def adapter_fingerprint(file: str) -> str:
    return _fingerprint(FOLDER, file)


def lora_files() -> list[str]:
    return folder_paths.get_filename_list("loras")


def lora_fingerprint(*files: str) -> str:
    return " ".join(_fingerprint("loras", file) for file in files)


def lora_path(file: str) -> str:
    return listed("loras", file)


def checkpoint_files() -> list[str]:
    return folder_paths.get_filename_list("checkpoints")


def checkpoint_path(file: str) -> str:
    return listed("checkpoints", file)


def adapter_path(file: str) -> str:
    return listed(FOLDER, file)
