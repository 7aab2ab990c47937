"""Every text file is opened in a named encoding: that of the system differs from one to the next (cp1252, cp949, ascii)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for room in ("ipadapter_core", "nodes") for path in sorted((ROOT / room).rglob("*.py"))]
OTHERS = {"os", "Image", "tarfile", "zipfile", "io", "wave"}
"""Whose `open` opens no text file."""


def unnamed(source: str) -> list[int]:
    """Lines that open, read or write a text without saying its encoding."""
    found: list[int] = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg in ("encoding", None) for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in OTHERS:
            continue
        if name in ("read_text", "write_text"):
            ours = isinstance(node.func, ast.Name) or getattr(node.func.value, "id", "") == "text_files"
            found += [] if ours else [node.lineno]
        elif name in ("open", "NamedTemporaryFile", "TemporaryFile"):
            at = 1 if isinstance(node.func, ast.Name) else 0
            mode = (
                node.args[at]
                if len(node.args) > at
                else next((w.value for w in node.keywords if w.arg == "mode"), None)
            )
            binary = isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" in mode.value
            found += [] if binary else [node.lineno]
        elif name in ("run", "Popen", "check_output"):
            text = any(word.arg in ("text", "universal_newlines") for word in node.keywords)
            found += [node.lineno] if text else []
    return found


def test_the_reader_sees_them() -> None:
    bad = [
        "open(p)",
        "open(p, 'w')",
        "p.open()",
        "p.open('a')",
        "p.read_text()",
        "p.write_text('x')",
        "run(x, text=True)",
    ]
    good = ["open(p, 'rb')", "p.open('wb')", "p.open('r', encoding='utf-8')", "p.read_text(encoding='utf-8')", "read_text(p)",
            "Image.open(p)", "os.open(p, 0)", "open(p, mode='rb')", "run(x)"]  # fmt: skip
    assert [unnamed(line) for line in bad] == [[1]] * len(bad)
    assert [unnamed(line) for line in good] == [[]] * len(good)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_text_file_has_a_named_encoding(path: Path) -> None:
    assert unnamed(path.read_text(encoding="utf-8")) == []
