"""What people see of this pack in ComfyUI: node names, progress, text and pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import comfy.utils
import numpy as np
import torch
from server import PromptServer
from torch import Tensor


def register_nodes(classes: Mapping[str, tuple[type, str]]) -> list[str]:
    """Add V1 node classes (with their display names) under names that nobody has taken; returns those taken.

    ComfyUI loads either V1 or V3 nodes of a pack, and a name that two packs declare goes to the one loaded last: a
    drop-in must not take a name from the pack it stands in for.
    """
    import nodes as host_nodes

    package = __name__.rsplit(".", 3)[0]  # this pack as ComfyUI imported it: its folder, dots written as _x_
    module = "custom_nodes." + os.path.basename(package.replace("_x_", "."))
    taken = [name for name in classes if name in host_nodes.NODE_CLASS_MAPPINGS]
    for name, (node, title) in classes.items():
        if name not in taken:
            node.RELATIVE_PYTHON_MODULE = module
            host_nodes.NODE_CLASS_MAPPINGS[name] = node
            host_nodes.NODE_DISPLAY_NAME_MAPPINGS[name] = title
    return taken


def progress_bar() -> Callable[[int, int], None]:
    bars: list[comfy.utils.ProgressBar] = []

    def report(done: int, total: int) -> None:
        if not bars:
            bars.append(comfy.utils.ProgressBar(total))
        bars[0].update_absolute(done, total)

    return report


def show_in_node(text: str, node_id: str) -> None:
    """Let the frontend write ``text`` into the node: of the ui output it shows texts of a few core nodes only."""
    PromptServer.instance.send_progress_text(text, node_id)


def picture_tensor(picture: Any) -> Tensor:
    """A Pillow picture as an IMAGE, 1 y x c in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
