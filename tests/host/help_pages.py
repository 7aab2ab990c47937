"""The tables of inputs and outputs in the nodes' help pages, from the nodes' own schemas.

``python tests/host/help_pages.py`` starts a ComfyUI and writes them anew into ``nodes/web/docs``, where ComfyUI's help panel
finds a page by the node's id. What stands outside of the marks is written by hand.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGES = Path(__file__).resolve().parents[2] / "nodes/web/docs"
BEGIN, END = "<!-- from the schema: tests/host/help_pages.py -->", "<!-- end -->"
FEW = 20
"""Options of a list that are named; longer lists are of files."""


def own_nodes(info: Mapping[str, Any], pack: str) -> dict[str, Any]:
    """This pack's nodes of today; the old names have no page of their own."""
    module = f"custom_nodes.{pack}"
    return {
        name: node
        for name, node in sorted(info.items())
        if node.get("python_module") == module and name.startswith("ImagePrompt")
    }


def table_of(node: Mapping[str, Any]) -> str:
    """Inputs with type, default, range and meaning, then outputs, as Markdown."""
    lines = ["| input | type | default | |", "|---|---|---|---|"]
    for section in ("required", "optional"):
        for name, (kind, *more) in node["input"].get(section, {}).items():
            lines.append(_row(name, kind, more[0] if more else {}, optional=section == "optional"))
    lines += ["", "| output | type |", "|---|---|"]
    lines += [f"| {name} | {kind} |" for name, kind in zip(node["output_name"], node["output"], strict=True)]
    return "\n".join(lines)


def _row(name: str, kind: Any, limits: Mapping[str, Any], *, optional: bool) -> str:
    options = kind if isinstance(kind, list) else limits.get("options", [])
    choice = isinstance(kind, list) or kind == "COMBO"
    default = limits.get("default", "")
    if choice:
        files = limits.get("image_upload") or name.split("_")[0] in FILES
        shown = "a list of files" if files or len(options) > FEW else ", ".join(map(str, options))
        default = "" if files else default or (options[0] if options else "")
    else:
        shown = f"{kind} {limits['min']:g} to {limits['max']:g}" if "min" in limits else str(kind)
    text = str(limits.get("tooltip", ""))
    if optional and shown.isupper():
        shown += ", optional"
    return f"| {name} | {_cell(shown)} | {_cell(default)} | {_cell(text)} |"


FILES = ("file", "tuned", "base", "image", "start")
"""First words of inputs whose options are the machine's files."""


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("*", "\\*").replace("<", "&lt;")


def with_table(page: str, table: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def stale(info: Mapping[str, Any], pack: str) -> Iterator[tuple[Path, str]]:
    """Pages that do not say what the schemas say, and what they would say; "" for one that is missing or has no marks."""
    for name, node in own_nodes(info, pack).items():
        path = PAGES / f"{name}.md"
        page = path.read_text(encoding="utf-8") if path.is_file() else ""
        wanted = with_table(page, table_of(node)) if BEGIN in page else ""
        if not wanted or wanted != page:
            yield path, wanted


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from host.comfy_server import PACK_NAME, ComfyServer, find_hosts

    with tempfile.TemporaryDirectory() as folder, ComfyServer(find_hosts()[0], Path(folder)) as server:
        info = server.object_info()
    for path, text in stale(info, PACK_NAME):
        if text:
            path.write_text(text, encoding="utf-8")
        print(path.name if text else f"{path.name} is missing, or has no '{BEGIN}' and '{END}': write it first")


if __name__ == "__main__":
    main()
