"""What ComfyUI's registry and pip hand out: one name, one version, and an archive that lacks nothing that it imports."""

# pyright: basic

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

import ipadapter_core

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PLACEHOLDERS = re.compile(r"example\.|your[-_ ]|placeholder|todo", re.IGNORECASE)


def tracked(*arguments: str) -> list[Path]:
    found = subprocess.run(["git", "ls-files", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a clone: what the archive holds is decided by git")
    return [Path(line) for line in found.stdout.splitlines()]


@pytest.fixture(scope="module")
def left_out() -> set[Path]:
    return set(tracked("--cached", "--ignored", "--exclude-from=.comfyignore"))


def test_the_name_is_one_that_the_registry_takes() -> None:
    name = PROJECT["project"]["name"]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", name)
    assert "comfyui" not in name
    extras = [need for needs in PROJECT["project"]["optional-dependencies"].values() for need in needs]
    assert {need.split("[")[0] for need in extras if "[" in need and not need.startswith("mkdocstrings")} == {name}


def test_one_version() -> None:
    version = PROJECT["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert ipadapter_core.__version__ == version
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


def test_nothing_is_invented() -> None:
    """What the owner has not filled in is left out."""
    assert PLACEHOLDERS.search((ROOT / "pyproject.toml").read_text(encoding="utf-8")) is None
    assert "" not in PROJECT["tool"]["comfy"].values()


def test_the_archive_imports_nothing_that_it_leaves_out(left_out: set[Path]) -> None:
    gone = {".".join(path.with_suffix("").parts) for path in left_out if path.suffix == ".py"}
    assert "ipadapter_core.demo.train_world" in gone
    for path in set(tracked("*.py")) - left_out:
        package = path.parts[:-1]
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else ()
                module = ".".join((*base, *(node.module.split(".") if node.module else ())))
                names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not gone & set(names), path


def test_the_archive_holds_what_users_need(left_out: set[Path]) -> None:
    for needed in (
        "workflows",
        "nodes",
        "ipadapter_core/demo/world",
        "ipadapter_core/demo/references",
        "README.md",
        "LICENSE",
    ):
        missing = {path.as_posix() for path in left_out if path.as_posix().startswith(needed)}
        assert missing <= {"nodes/web/mkdocs.yml"}, needed


def test_no_requirement_is_installed_for_the_nodes() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("#") for line in lines)
