"""What people see and touch in ComfyUI's editor, in both renderers where the host has both.

One file, so that each host's server and browser start once; a new check is a function that takes ``editor``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from host.comfy_server import ComfyServer

if TYPE_CHECKING:
    from web.browser import Editor

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))


def test_the_pack_serves_its_scripts(server: ComfyServer) -> None:
    listed = server.get("/extensions")
    assert [name for name in listed if name.startswith("/extensions/ipadapter-studio/")]


def test_templates_open_without_an_error_and_within_their_groups(editor: Editor) -> None:
    assert len(WORKFLOWS) > 20
    problems: list[str] = []
    for renderer in editor.renderers:
        editor.use(renderer)
        for path in WORKFLOWS:
            workflow = json.loads(path.read_text())
            with editor.quiet(path.name):
                editor.load(workflow)
            shown = editor.nodes()
            editor.shot(f"{path.stem} {renderer}")
            assert len(shown) == len(workflow["nodes"])
            for node_id, box in grouped(workflow):
                node = shown[str(node_id)]
                if not node.inside(box):
                    problems.append(f"{renderer}: {path.name}: {node.title} sticks out of its group: {node}, {box}")
    assert problems == [], "\n".join(problems)


def grouped(workflow: Mapping[str, Any]) -> list[tuple[int, list[float]]]:
    """Nodes of a workflow and the groups that they lie in, by their middle as they were saved."""
    found: list[tuple[int, list[float]]] = []
    for node in workflow["nodes"]:
        x, y = (at + side / 2 for at, side in zip(node["pos"], node["size"], strict=True))
        for group in workflow.get("groups") or ():
            left, top, width, height = group["bounding"]
            if left <= x <= left + width and top <= y <= top + height:
                found.append((node["id"], group["bounding"]))
    return found
