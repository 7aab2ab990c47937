"""What every graph in workflows/ has besides its nodes: where its files are downloaded, whose nodes it needs, room for them.

``python tests/workflows/tidy.py`` writes it into the graphs; a test asserts that they hold what this says.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import tomllib

from ipadapter_core.downloads import DOWNLOADS, TWINS, Download, find_download
from ipadapter_core.features import ENCODERS
from ipadapter_core.known_files import KNOWN_FILES
from ipadapter_core.models.unet import SD15, SDXL
from ipadapter_core.wishes import public_files

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "workflows"
VERSION: str = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["version"]

CORE, OURS = ("comfy-core", "0.3.64"), ("ipadapter-studio", VERSION)
"""Registry ids of packs, and the oldest versions whose nodes do."""
NOTES = ("MarkdownNote", "Note")
OFFERED = (".safetensors", ".sft", ".ckpt", ".pth", ".pt")
"""What ComfyUI offers to download; it wants no pickles with other names."""
FILES = "**Files**"

Json = dict[str, Any]

TITLE, FOOTER, AIR = 30, 26, 18
"""Pixels: of a node's title, of what the newer renderer hangs below a node (its errors, its folded inputs), between nodes."""
MARGIN = 20
PICTURES = {"LoadImage": 360, "PreviewAny": 170, "PreviewImage": 120, "SaveImage": 120, "ImagePromptLoadModels": 470}
"""Least heights of nodes that show something: pictures, texts, or the files that a need takes, of which there are up to four."""


def is_ours(node: Json) -> bool:
    return node["type"].startswith("ImagePrompt")


def height(node: Json) -> int:
    """Pixels below the title that a node needs in either renderer: rows of sockets, widgets, and who made it."""
    if node["type"] in NOTES:
        # as ComfyUI draws Markdown in 420 pixels
        paragraphs = str(node["widgets_values"][0]).split("\n")
        return 70 + sum(6 + 18 * math.ceil(len(shown(text)) / 62) for text in paragraphs)
    sockets = [entry for entry in node.get("inputs", ()) if "widget" not in entry]
    rows = max(len(sockets), len(node.get("outputs", ())))
    needed = 50 + 20 * rows + 28 * len(node.get("widgets_values") or ()) + (24 if is_ours(node) else 0)
    return max(needed, PICTURES.get(node["type"], 0))


def is_folded(node: Json) -> bool:
    """Whether only a node's title is drawn."""
    return bool(node.get("flags", {}).get("collapsed"))


def room(node: Json) -> tuple[float, float, float, float]:
    """The box that a node takes at most in either renderer: x, y, width, height."""
    (x, y), (width, tall) = node["pos"], node["size"]
    if is_folded(node):
        return x, y - TITLE, 60 + 9 * len(node.get("title") or node["type"]), TITLE
    return x, y - TITLE, width, TITLE + tall + FOOTER


def shown(markdown: str) -> str:
    """The text of a line without the addresses of its links."""
    return markdown if "](" not in markdown else markdown.replace("](", "\0").split("\0")[0]


def downloads(node: Json) -> list[Download]:
    """The public files that a node's widgets name."""
    if node["type"] in NOTES:
        return []
    values = [value for value in node.get("widgets_values") or () if isinstance(value, str)]
    found = [find_download(value) for value in values]
    if node["type"] == "ImagePromptLoadFaceModel":
        found.append(DOWNLOADS[f"{values[0]}.zip"])
    return [one for one in found if one is not None]


def by_need(node: Json, files: list[Download]) -> list[Download]:
    """The best public files for the need of Load Image Prompt Models, on the checkpoint that the graph names."""
    base = SDXL if any(file.name.startswith("sd_xl") for file in files) else SD15
    adapter = DOWNLOADS[public_files(node["widgets_values"][0], base.name)[0]]
    known = next(known for known in KNOWN_FILES if known.release == adapter.name)
    return [adapter, DOWNLOADS[ENCODERS[known.encoder].public]]


def line(download: Download) -> str:
    """A file in a note: a link, the folder, and what to do besides."""
    parts = [f"- [{download.name}]({download.url}) in models/{download.folder}"]
    if download.comes_as:
        parts.append(f"saved under this name (there it is {download.comes_as})")
    if download.name in TWINS:
        twin = DOWNLOADS[TWINS[download.name]]
        parts.append(f"or [{twin.name}]({twin.url})")
    parts += [download.note] if download.note else []
    return "; ".join(parts)


def note(text: str, files: list[Download]) -> str:
    """A note whose list of files begins with links; lines about a user's own files stay behind them."""
    if not files:
        return text
    assert FILES in text, "no list of files"
    before, _, rest = text.partition(FILES)
    lines = rest.strip("\n").split("\n")
    listed = list(itertools.takewhile(lambda entry: entry.startswith("- "), lines))
    own = [entry for entry in listed if not entry.startswith("- [")]
    after = "\n".join(lines[len(listed) :]).strip()
    found = "\n".join([before + FILES, *map(line, dict.fromkeys(files)), *own])
    return f"{found}\n\n{after}" if after else found


def tidied(workflow: Json) -> Json:
    """The graph with its models, packs, links and room."""
    nodes = [dict(node) for node in workflow["nodes"]]
    files = [file for node in nodes for file in downloads(node)]
    files += [file for node in nodes if node["type"] == "ImagePromptLoadModels" for file in by_need(node, files)]
    for node in nodes:
        if node["type"] in NOTES:
            texts = node["widgets_values"]
            node["widgets_values"] = [note(texts[0], files) if texts and FILES in texts[0] else texts[0]]
            node["properties"] = {}
            continue
        name, version = OURS if is_ours(node) else CORE
        if is_ours(node):  # of the version that it was written for
            version = node["properties"].get("ver", version)
        offered = [file for file in downloads(node) if file.name.endswith(OFFERED)]
        kept = {k: v for k, v in node["properties"].items() if k not in ("models", "cnr_id", "ver")}
        models = [{"name": file.name, "url": file.url, "directory": file.folder} for file in dict.fromkeys(offered)]
        node["properties"] = {**kept, "cnr_id": name, "ver": version} | ({"models": models} if models else {})
    return {**workflow, "nodes": nodes, "groups": spread(nodes, workflow["groups"])}


def spread(nodes: list[Json], groups: list[Json]) -> list[Json]:
    """Give every node its height, stack those of a column, and let the groups hold them; returns the groups."""
    order = sorted(groups, key=lambda group: group["bounding"][1])
    members = {group["id"]: [node for node in nodes if home(node, order) is group] for group in order}
    found: dict[int, Json] = {}
    for group in order:
        x, top, width, _ = group["bounding"]
        above = [other["bounding"] for other in found.values() if beside(other["bounding"], group["bounding"])]
        y = max([top, *(above_y + tall + 2 * MARGIN for _, above_y, _, tall in above)])
        columns: dict[float, list[Json]] = {}
        for node in members[group["id"]]:
            node["pos"] = [node["pos"][0], node["pos"][1] + y - top]
            columns.setdefault(node["pos"][0], []).append(node)
        bottom = y
        for column in columns.values():
            free = 0
            for node in sorted(column, key=lambda node: node["pos"][1]):
                least = height(node)
                node["size"] = [node["size"][0], least if node["type"] in NOTES else max(node["size"][1], least)]
                node["pos"] = [node["pos"][0], free or node["pos"][1]]
                _, above, _, tall = room(node)
                free = above + tall + AIR + TITLE
            bottom = max(bottom, free - AIR - TITLE + MARGIN)
        found[group["id"]] = {**group, "bounding": [x, y, width, bottom - y]}
    return [found[group["id"]] for group in groups]


def home(node: Json, groups: list[Json]) -> Json | None:
    """The group that a node begins in: the lowest that holds its corner."""
    x, y = node["pos"]
    held = [g for g in groups if g["bounding"][0] <= x <= sum(g["bounding"][::2]) and g["bounding"][1] <= y]
    return held[-1] if held else None


def beside(one: list[float], other: list[float]) -> bool:
    """Whether two boxes share columns of pixels."""
    return one[0] < other[0] + other[2] and other[0] < one[0] + one[2]


def text_of(workflow: Json) -> str:
    """A graph as its file holds it: one node, link or group a line, so that changes can be read."""
    parts: list[str] = []
    for key, value in workflow.items():
        if key in ("nodes", "links", "groups") and value:
            rows = ",\n".join(f"    {json.dumps(entry, ensure_ascii=False)}" for entry in value)
            parts.append(f'  "{key}": [\n{rows}\n  ]')
        else:
            parts.append(f'  "{key}": {json.dumps(value, ensure_ascii=False)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    for file in sorted(FOLDER.glob("*.json")):
        file.write_text(text_of(tidied(json.loads(file.read_text("utf-8")))), encoding="utf-8")


if __name__ == "__main__":
    main()
