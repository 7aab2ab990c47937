"""What ComfyUI says of this pack's nodes, as far as graphs depend on it; kept in ``tests/core/object_info.json``.

``python tests/host/object_info.py`` starts a ComfyUI and writes the file anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "core" / "object_info.json"
KEPT = ("default", "min", "max", "step", "multiline", "forceInput", "options")
"""What is kept of an input beside its type."""
FILES = (
    "file", "tuned", "base", "base_model", "image_encoder", "start_from", "clip_name", "ipadapter_file", "embeds", "lora_name",
    "ipadapter", "ipadatper", "clip_vision",
)  # fmt: skip
"""Inputs whose options are files of the machine: ``file_1`` too."""


def of_this_pack(info: Mapping[str, Any], pack: str) -> dict[str, Any]:
    """``/object_info`` without texts, files, and what the hosts' versions say differently; and Load CLIP Vision of the host."""
    module = f"custom_nodes.{pack}"
    kinds = [name for name, node in info.items() if node.get("python_module") == module or name == "CLIPVisionLoader"]
    return {name: _node(info[name]) for name in sorted(kinds)}


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    sections = {
        section: {name: _input(name, *entry) for name, entry in node["input"][section].items()}
        for section in ("required", "optional")
        if node["input"].get(section)
    }
    return {"input": sections, "output": list(node["output"]), "output_name": list(node["output_name"])}


def _input(name: str, kind: Any, more: Mapping[str, Any] | None = None) -> list[Any]:
    """``[type, settings]``; the options of the old nodes, which are in the type's place, among the settings."""
    settings = dict(more or {})
    if isinstance(kind, list):
        kind, settings["options"] = "COMBO", kind
    if name.rstrip("_12345") in FILES:
        settings = {key: value for key, value in settings.items() if key not in ("options", "default")}
    return [kind, {key: settings[key] for key in KEPT if settings.get(key) is not None and settings[key] is not False}]


def stored() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from host.comfy_server import PACK_NAME, ComfyServer, find_hosts

    with tempfile.TemporaryDirectory() as folder, ComfyServer(find_hosts()[0], Path(folder)) as server:
        nodes = of_this_pack(server.object_info(), PACK_NAME)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(node)}" for name, node in nodes.items())
    FILE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
