"""What people read in ComfyUI, in their language: ``locales/<language>`` from the nodes' schemas and tables of translations.

``locales/<language>/texts.json`` holds translations by their English text and is written by hand. ``python tests/host/locales.py``
starts a ComfyUI and writes what it reads, ``nodeDefs.json`` and ``main.json``, from these and the schemas, and says which texts
lack a translation. The frontend reads names, descriptions and tooltips; for the options of lists it asks no translation.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host.help_pages import own_nodes

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = ("de", "es", "fr", "ja", "ko", "ru", "zh")


def texts_of(language: str) -> dict[str, str]:
    """Translations by English text."""
    return json.loads((LOCALES / language / "texts.json").read_text(encoding="utf-8"))


def english(info: Mapping[str, Any], pack: str) -> set[str]:
    """Every text of the schemas that people read."""
    return {text for node in own_nodes(info, pack).values() for text in _texts(node)}


def _texts(node: Mapping[str, Any]) -> Iterator[str]:
    yield node["display_name"]
    yield node["description"]
    yield from node["category"].split("/")
    yield from map(readable, node["output_name"])
    yield from filter(None, node.get("output_tooltips") or [])
    for _, name, tooltip in _inputs(node):
        yield readable(name)
        if tooltip:
            yield tooltip


def _inputs(node: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for section in ("required", "optional"):
        for name, (_, *more) in node["input"].get(section, {}).items():
            yield section, name, str((more[0] if more else {}).get("tooltip") or "")


def readable(name: str) -> str:
    """``strength_3`` as ``strength``: the number stays a number in every language."""
    stem, _, number = name.rpartition("_")
    return stem if stem and number.isdigit() else name


def translated(info: Mapping[str, Any], pack: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """``nodeDefs.json`` and ``main.json`` of one language, by file name."""

    def label(name: str) -> str:
        base = readable(name)
        return texts[base] + name[len(base) :].replace("_", " ")

    nodes: dict[str, Any] = {}
    categories: dict[str, str] = {}
    for kind, node in own_nodes(info, pack).items():
        inputs: dict[str, Any] = {}
        for _, name, tooltip in _inputs(node):
            inputs[name] = {"name": label(name)} | ({"tooltip": texts[tooltip]} if tooltip else {})
        tooltips = node.get("output_tooltips") or [None] * len(node["output_name"])
        outputs = {
            str(i): {"name": label(name)} | ({"tooltip": texts[tip]} if tip else {})
            for i, (name, tip) in enumerate(zip(node["output_name"], tooltips, strict=True))
        }
        nodes[kind] = {
            "display_name": texts[node["display_name"]],
            "description": texts[node["description"]],
            "inputs": inputs,
            "outputs": outputs,
        }
        categories |= {part: texts[part] for part in node["category"].split("/")}
    return {"nodeDefs.json": nodes, "main.json": {"nodeCategories": dict(sorted(categories.items()))}}


def written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def main() -> None:
    from host.comfy_server import PACK_NAME, ComfyServer, find_hosts

    with tempfile.TemporaryDirectory() as folder, ComfyServer(find_hosts()[0], Path(folder)) as server:
        info = server.object_info()
    wanted = english(info, PACK_NAME)
    for language in LANGUAGES:
        texts = texts_of(language) if (LOCALES / language / "texts.json").is_file() else {}
        missing, unused = sorted(wanted - texts.keys()), sorted(texts.keys() - wanted)
        for title, lines in (("lacks", missing), ("no longer needs", unused)):
            for line in lines:
                print(f"{language} {title}: {line}")
        if not missing:
            for name, value in translated(info, PACK_NAME, texts).items():
                (LOCALES / language / name).write_text(written(value), encoding="utf-8")


if __name__ == "__main__":
    main()
