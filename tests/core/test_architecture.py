"""Which room may know which: read from the source, nothing of the pack is imported."""

# pyright: basic, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE, NODES = ROOT / "ipadapter_core", ROOT / "nodes"
HOST_MODULES = {"comfy", "nodes", "folder_paths", "comfy_api", "comfy_extras", "comfy_execution", "execution", "server"}


def sources(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)
    assert found, f"no sources under {folder}"
    return found


NOT_HOST = [path for path in sources(NODES) if path.parent != NODES / "host"]


def dotted(path: Path) -> str:
    """``ipadapter_core.backends.comfy``; a package's ``__init__`` is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, at_load: bool = False) -> Iterator[str]:
    """Absolute names of everything a file imports; ``at_load``: only outside functions."""
    tree = ast.parse(path.read_text())
    package = dotted(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in _walk(tree, skip_functions=at_load):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _walk(node: ast.AST, *, skip_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if skip_functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield child
        yield from _walk(child, skip_functions=skip_functions)


def within(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def offenders(files: list[Path], *forbidden: str, at_load: bool = False) -> list[str]:
    return [
        f"{dotted(p)} imports {name}" for p in files for name in imports(p, at_load=at_load) if within(name, *forbidden)
    ]


def core(*rooms: str) -> list[str]:
    return [f"ipadapter_core.{room}" for room in rooms]


def files_of(*rooms: str) -> list[Path]:
    """The files of rooms of the core, packages with all their files; a room that does not exist yet has none."""
    found: list[Path] = []
    for room in rooms:
        path = CORE.joinpath(*room.split("."))
        if path.is_dir():
            found += sources(path)
        elif path.with_suffix(".py").exists():
            found.append(path.with_suffix(".py"))
    return found


def all_rooms() -> set[str]:
    return {
        p.stem if p.is_file() else p.name
        for p in CORE.iterdir()
        if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))
    }


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    """Every kind of import that the rules below rest on."""
    found = set(imports(CORE / "backends/diffusers/doors.py"))
    assert {
        "ipadapter_core.attention.patch",
        "ipadapter_core.attention.patch.AdapterPatch",
        "torch",
        "torch.nn",
    } <= found
    assert "ipadapter_core.checkpoints.format" in set(imports(CORE / "checkpoints/__init__.py"))
    assert offenders([CORE / "backends/comfy/doors.py"], *core("attention")), "a rule could not fail"


def test_the_core_never_imports_the_host() -> None:
    assert offenders(sources(CORE), *HOST_MODULES) == []


def test_the_core_never_imports_the_pack_around_it() -> None:
    """ComfyUI loads the folder by path: only relative imports resolve to the same classes."""
    for path in sources(CORE):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                deep = len(path.relative_to(CORE).parts)
                assert node.level <= deep, f"{dotted(path)}:{node.lineno} reaches out of the core"
                assert not within(node.module or "", "ipadapter_core"), (
                    f"{dotted(path)}:{node.lineno}: use a relative import"
                )
            if isinstance(node, ast.Import):
                assert not any(within(alias.name, "ipadapter_core") for alias in node.names), (
                    f"{dotted(path)}:{node.lineno}"
                )


def test_importing_the_core_loads_neither_diffusers_nor_transformers() -> None:
    code = "import sys, ipadapter_core, ipadapter_core.backends.comfy.doors, ipadapter_core.backends.diffusers.doors; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert {"torch", "ipadapter_core"} <= loaded
    assert loaded & {"diffusers", "transformers", "accelerate", "peft", *HOST_MODULES} == set()


HEAVY = ("diffusers", "transformers", "accelerate", "peft")


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    rooms = sorted(all_rooms() - {"demo", "training"})
    assert offenders(files_of(*rooms), *HEAVY, at_load=True) == []


FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "quiet", "features", "downloads", "console", "device_cache", "narrowing"),
    ("files", "compatibility", "models", "devices"),
    ("entries", "images", "checkpoints", "model_folders"),
    ("attention", "known_files", "hub"),
    ("lora", "prompt", "legacy"),
    ("bake", "backends.calls"),
    ("backends.comfy", "backends.diffusers"),
    ("report", "recipe", "steering", "wishes", "backends.diffusers_lora"),
    ("generate", "sharing"),
    ("training",),
    ("demo",),
    ("commands",),
    ("cli", "__main__"),
)
"""The rooms of the core, lowest floor first. A room knows those on floors below its own, and no other: not one beside it."""


def room_of(name: str) -> str | None:
    """The room of a dotted name; None for the core's own ``__init__`` and for what is not of the core."""
    parts = name.split(".")
    if parts[0] != "ipadapter_core" or len(parts) == 1:
        return None
    return ".".join(parts[1:3]) if parts[1] == "backends" and len(parts) > 2 else parts[1]


def arrows(files: list[Path]) -> dict[tuple[str, str], str]:
    """Every pair (room, room that it imports), with one import that shows it."""
    rooms = {room for floor in FLOORS for room in floor}
    found: dict[tuple[str, str], str] = {}
    for path in files:
        here = room_of(dotted(path))
        for name in imports(path):
            there = room_of(name)
            if here and there in rooms and here != there:
                found.setdefault((here, there), f"{dotted(path)} imports {name}")
    return found


def against_the_order(found: dict[tuple[str, str], str]) -> list[str]:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    return [text for (here, there), text in found.items() if floor[there] >= floor[here]]


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(dotted(path)) for path in sources(CORE)} - {None, "backends"}
    listed = [room for floor in FLOORS for room in floor]
    assert sorted(rooms) == sorted(listed), "name the room in FLOORS, above all that it imports"


def test_dependencies_point_one_way() -> None:
    found = arrows(sources(CORE))
    assert len(found) > 50, "the rule sees nothing"
    assert against_the_order(found) == []


def test_the_order_of_floors_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A room that looks up, one that looks beside itself, and a way in that only a function takes, are each seen."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name, line in (
        ("attention/maths.py", "from ..bake import bake"),
        ("backends/comfy/unet.py", "from ..diffusers import unet"),
        ("models/__init__.py", "def late():\n    from ..checkpoints.base import Base"),
        ("bake.py", "from .attention import maths"),
    ):
        path = tmp_path / "ipadapter_core" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n")
    seen = against_the_order(arrows(sorted((tmp_path / "ipadapter_core").rglob("*.py"))))
    assert sorted(text.split(" imports ")[0] for text in seen) == [
        "ipadapter_core.attention.maths",
        "ipadapter_core.backends.comfy.unet",
        "ipadapter_core.models",
    ]


def circles(files: list[Path]) -> list[list[str]]:
    """Modules that import each other, directly or around corners; a package and its own parts aside."""
    names = {dotted(path) for path in files}
    known = {
        dotted(path): {
            name for name in imports(path) if name in names and name != dotted(path) and not within(dotted(path), name)
        }
        for path in files
    }
    reach = {name: set(known[name]) for name in names}
    for through in names:
        for name in names:
            if through in reach[name]:
                reach[name] |= reach[through]
    return [[name] for name in sorted(names) if name in reach[name]]


def test_no_module_imports_itself_around_a_corner() -> None:
    assert circles(sources(CORE)) == []


def test_the_search_for_circles_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name, line in (
        ("a", "from . import b"),
        ("b", "def f():\n    from .c import x"),
        ("c", "import pkg.a"),
        ("d", "from .a import y"),
    ):
        path = tmp_path / "pkg" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(line + "\n")
    assert circles(sorted((tmp_path / "pkg").glob("*.py"))) == [["pkg.a"], ["pkg.b"], ["pkg.c"]]


def test_files_take_their_names_in_one_place() -> None:
    """``files.whole`` renames finished files; the trainer's states are whole folders."""
    renaming = {
        dotted(p) for p in (*sources(CORE), *sources(NODES)) if re.search(r"os\.replace\(|\.tmp\"\)", p.read_text())
    }
    assert renaming == {"ipadapter_core.files.whole", "ipadapter_core.training.state", "ipadapter_core.training.cache"}


def test_only_the_host_room_knows_the_comfy_backend() -> None:
    comfy = CORE / "backends/comfy"
    assert offenders([p for p in sources(CORE) if p.parent != comfy], *core("backends.comfy")) == []
    assert offenders(NOT_HOST, *core("backends.diffusers", "generate", "commands", "demo", "training")) == []


def test_graphs_cannot_reach_the_network() -> None:
    """The Hub is for the command and for Python's own calls: nothing that nodes import knows it."""
    assert offenders(sources(NODES), *core("hub", "steering", "generate", "commands")) == []
    knowing = {room_of(dotted(p)) for p in sources(CORE) if offenders([p], *core("hub"))} - {None}
    assert "steering" in knowing, "the rule sees nothing"
    assert knowing <= {"hub", "steering", "generate", "commands", "sharing"}


def test_only_the_host_room_asks_comfyui() -> None:
    """comfy_api is the schema every node is written in; all else of the host goes through one room."""
    assert offenders(NOT_HOST, *(HOST_MODULES - {"comfy_api", "nodes"})) == []
    assert offenders(sources(NODES / "host"), "comfy", "folder_paths"), "a rule could not fail"


def test_docstrings_have_one_markup() -> None:
    """Code stands between double backticks; blocks of it are fenced."""
    single = re.compile(r"(?<!`)`(?!`)[^`]+`(?!`)")
    texts = [
        (f"{dotted(path)}:{one.lineno}", one.value.value)
        for path in (*sources(CORE), *sources(NODES))
        for one in ast.walk(ast.parse(path.read_text()))
        if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str)
    ]
    assert len(texts) > 1000, "the rule sees nothing"
    offending = [place for place, text in texts if single.search(text)]
    assert offending == []


def test_no_drawer_for_everything() -> None:
    names = {p.stem for folder in (CORE, NODES, ROOT / "tests") for p in sources(folder)}
    names |= {p.name for folder in (CORE, NODES) for p in folder.rglob("*") if p.is_dir()}
    assert names & {"utils", "util", "helpers", "helper", "common", "types", "misc"} == set()


def test_every_node_is_in_the_one_list() -> None:
    """Each class that derives from io.ComfyNode is imported and listed in nodes/__init__.py, each in a file of its own family."""
    classes = {
        node.name: path.stem
        for path in sources(NODES)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("ComfyNode") for base in node.bases)
    }
    tree = ast.parse((NODES / "__init__.py").read_text())
    (listed,) = (
        node.value for node in tree.body
        if isinstance(node, (ast.AnnAssign, ast.Assign)) and "NODES" in ast.unparse(getattr(node, "target", None) or node.targets[0])
    )  # fmt: skip
    assert isinstance(listed, ast.List)
    names = [ast.unparse(item) for item in listed.elts]
    assert sorted(names) == sorted(classes), "a node is not listed, or listed twice"
    imported = {a.name: n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.level for a in n.names}
    assert {name: imported.get(name) for name in names} == classes
    unlisted = {p.stem for p in NODES.glob("*.py")} - {"__init__", "sockets"} - set(classes.values())
    assert unlisted == set(), "files in nodes/ without a node"


def test_no_init_files_below_tests() -> None:
    """They break the one pytest set-up that collects a repository whose root is a package for ComfyUI."""
    assert [p for p in (ROOT / "tests").rglob("__init__.py") if ".venv" not in p.parts] == []
