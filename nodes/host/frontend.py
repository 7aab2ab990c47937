"""What people see of this pack in ComfyUI: node names, progress, text and pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.utils
from comfy_api.latest import ComfyAPI, io
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from ...ipadapter_core.legacy.migrate import Replacement, replace_in_prompt


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
    # texts of files may hold halves of characters, which cannot be sent
    PromptServer.instance.send_progress_text(text.encode("utf-8", "replace").decode(), node_id)


def show_in_running_node(text: str) -> None:
    """``show_in_node`` for the node that the host is running; nowhere outside a graph."""
    running = get_executing_context()
    if running is not None:
        show_in_node(text, running.node_id)


def name_errors_shortly(kinds: Iterable[type[BaseException]]) -> None:
    """Let ComfyUI write ``InvalidInputError`` before our sentence, where it writes the path of this folder else.

    It leaves the module away of Python's own exceptions only. Of ``kinds`` and all that are derived from them.
    """
    for kind in kinds:
        kind.__module__ = "builtins"
        name_errors_shortly(kind.__subclasses__())


OLD_NAMES = "IMAGE_PROMPT_OLD_NAMES"
"""Environment variable: ``off`` leaves the old pack's class types out, and ComfyUI offers our nodes in their place."""


def wants_old_names() -> bool:
    return os.environ.get(OLD_NAMES, "on").lower() not in ("off", "0", "false", "no")


async def register_replacements(replacements: Iterable[Replacement]) -> None:
    """Tell ComfyUI which of our nodes takes an old one's place where that is missing; older versions have no such thing.

    Its editor then offers the replacement; prompts that are sent without an editor are rewritten on arrival.
    """
    if not hasattr(io, "NodeReplace"):
        return
    import nodes as host_nodes

    for entry in replacements:
        mapping: list[dict[str, Any]] = [{"new_id": new, "old_id": old} for new, old in entry.inputs.items()]
        mapping += [{"new_id": name, "set_value": value} for name, value in entry.values.items()]
        await ComfyAPI().node_replacement.register(
            io.NodeReplace(
                new_node_id=entry.new,
                old_node_id=entry.old,
                old_widget_ids=list(entry.widgets),
                input_mapping=mapping,
                output_mapping=[{"new_idx": i, "old_idx": i} for i in range(entry.outputs)],
            )
        )

    def replaced(request: dict[str, Any]) -> dict[str, Any]:
        replace_in_prompt(request.get("prompt") or {}, host_nodes.NODE_CLASS_MAPPINGS)
        return request

    PromptServer.instance.add_on_prompt_handler(replaced)


def resized_like(image: Tensor, other: Tensor) -> Tensor:
    """A picture ``b h w c`` at another's size, by ComfyUI's own upscaling (bilinear, middle part kept)."""
    if image.shape[1:] == other.shape[1:]:
        return image
    height, width = other.shape[1:3]
    return comfy.utils.common_upscale(image.movedim(-1, 1), width, height, "bilinear", "center").movedim(1, -1)
