"""ComfyUI's modules in a process of ours: no server, and on a machine that has not all that ComfyUI asks for.

``enter`` puts the host on the path. What it imports for videos, servers and tables (``STOOD_IN``) is stood in for where it is not
installed, and versions of packages that its forks insist on are invented, so that nothing is downloaded. ``bare`` hides all of that
also where it is installed, which shows that a bare machine will do.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

STOOD_IN = ("aiohttp", "alembic", "av", "comfy_aimdo", "kornia", "spandrel", "sqlalchemy", "torchaudio", "torchsde")
"""Top-level packages that a sampling of ours never calls."""
HIDDEN = (*STOOD_IN, "comfyui_frontend_package")
"""What ``bare`` takes away."""


class _Made(type):
    """A class that has every attribute, and is called without effect."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Made(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]  # a decorator
        return cls


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Made(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes modules below the given packages; refuses the hidden ones that are not stood in for."""

    def __init__(self, made: set[str], refused: set[str]) -> None:
        self.made, self.refused = made, refused

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        top = fullname.partition(".")[0]
        if top in self.refused:
            raise ModuleNotFoundError(f"No module named {fullname!r} (hidden)", name=fullname)
        if top not in self.made:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def enter(host: str, flags: list[str], *, bare: bool = False) -> list[str]:
    """Put a ComfyUI folder on the path as if it was started with these flags. Returns what is stood in for."""
    sys.path.insert(0, host)
    hidden: set[str] = {*HIDDEN} if bare else set()
    made = {name for name in STOOD_IN if name in hidden or importlib.util.find_spec(name) is None}
    sys.meta_path.insert(0, _Finder({*made, "server"}, hidden - made))
    asked = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return asked(name)
        except importlib.metadata.PackageNotFoundError:
            if name in made or name.replace("_", "-").startswith("comfyui-"):
                return "9999"  # newer than whatever is wanted: a fork of ComfyUI installs what is older
            raise

    importlib.metadata.version = version
    sys.argv = [sys.argv[0], *flags]
    options: Any = importlib.import_module("comfy.options")
    options.enable_args_parsing()
    importlib.import_module("utils.extra_config")  # before anything puts another utils first
    return sorted(made)


def dynamic_memory() -> str:
    """Switch on ComfyUI's dynamic memory as its main.py does. Returns why not, or nothing."""
    try:
        control: Any = importlib.import_module("comfy_aimdo.control")
        import comfy.memory_management
        import comfy.model_management
        import comfy.model_patcher
    except ImportError as error:
        return f"this ComfyUI has none ({error})"
    if isinstance(control, _StandIn):
        return "comfy-aimdo is not installed"
    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        return "this ComfyUI has none"
    import torch

    if not torch.cuda.is_available():
        return "needs CUDA"
    devices: list[Any] = comfy.model_management.get_all_torch_devices()
    try:
        begun = control.init_devices((d.index, 0) for d in devices)
    except TypeError:
        begun = control.init_devices(d.index for d in devices)
    if not begun:
        return "comfy-aimdo does not work on this machine"
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return ""


def before_torch(dynamic: bool) -> None:
    """What main.py does for dynamic memory before torch is imported."""
    if not dynamic:
        return
    try:
        control: Any = importlib.import_module("comfy_aimdo.control")
    except ImportError:
        return
    for settings in ({"simple_vram_headroom": None, "nvml_pressure": True}, {"simple_vram_headroom": None}, {}):
        try:
            control.init(**settings)
            return
        except TypeError:
            continue


def load_package(name: str, folder: Path) -> Any:
    """A custom node pack as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
