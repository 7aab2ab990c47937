"""Which room may know which: read from the source, nothing of the pack is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE, NODES = ROOT / "ipadapter_core", ROOT / "nodes"
HOST_MODULES = {"comfy", "nodes", "folder_paths", "comfy_api", "comfy_extras", "execution", "server"}


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
    found = set(imports(CORE / "backends/comfy.py"))
    assert {"ipadapter_core.patch", "ipadapter_core.patch.COND", "torch", "torch.nn"} <= found
    assert "ipadapter_core.checkpoints.format" in set(imports(CORE / "checkpoints/__init__.py"))
    assert offenders([CORE / "backends/comfy.py"], *core("patch")), "a rule could not fail"


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
    code = "import sys, ipadapter_core, ipadapter_core.backends.comfy, ipadapter_core.backends.diffusers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert {"torch", "ipadapter_core"} <= loaded
    assert loaded & {"diffusers", "transformers", "accelerate", "peft", *HOST_MODULES} == set()


HEAVY = ("diffusers", "transformers", "accelerate", "peft")


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    rooms = sorted(all_rooms() - {"demo", "training"})
    assert offenders(files_of(*rooms), *HEAVY, at_load=True) == []


EVERYWHERE = {"errors", "text_files", "entries", "__init__"}
"""The lowest floor: what every room may know."""

# room, and what of the core it may not import: the arrows of the architecture, read backwards
FORBIDDEN = {
    "errors": sorted(all_rooms() - {"errors", "__init__"}),
    "text_files": sorted(all_rooms() - EVERYWHERE | {"entries"}),
    "entries": sorted(all_rooms() - EVERYWHERE),
    "access": sorted(all_rooms() - {"access", *EVERYWHERE}),
    "sites": sorted(all_rooms() - {"sites", *EVERYWHERE}),
    "layouts": sorted(all_rooms() - {"layouts", "sites", *EVERYWHERE}),
    "schedule": sorted(all_rooms() - {"schedule", "sites", *EVERYWHERE}),
    "batch": sorted(all_rooms() - {"batch", *EVERYWHERE}),
    "compatibility": sorted(all_rooms() - {"compatibility", *EVERYWHERE}),
    "masks": sorted(all_rooms() - {"masks", "batch", *EVERYWHERE}),
    "attention": sorted(all_rooms() - {"attention", "schedule", *EVERYWHERE}),
    "pickles": sorted(all_rooms() - {"pickles", *EVERYWHERE}),
    "state_dict": sorted(all_rooms() - {"state_dict", "pickles", *EVERYWHERE}),
    "projectors": sorted(all_rooms() - {"projectors", *EVERYWHERE}),
    "checkpoints": sorted(all_rooms() - {"checkpoints", "projectors", "state_dict", "image_encoder", *EVERYWHERE}),
    "image_encoder": sorted(all_rooms() - {"image_encoder", "checkpoints", "state_dict", "quiet", *EVERYWHERE}),
    "lora": sorted(all_rooms() - {"lora", "state_dict", "schedule", "masks", *EVERYWHERE}),
    "prompt": sorted(
        all_rooms() - {"prompt", "batch", "checkpoints", "compatibility", "image_encoder", "projectors", *EVERYWHERE}
    ),
    "patch": ["backends", "processors", "report", "cli", "generate", "demo", "training", "layouts"],
    "backends": [
        "processors",
        "report",
        "cli",
        "generate",
        "demo",
        "training",
        "checkpoints",
        "prompt",
        "projectors",
        "state_dict",
    ],
    "processors": ["backends", "patch", "report", "cli", "generate", "demo", "training"],
    "report": ["backends", "cli", "generate", "demo", "training"],
    "training": ["backends.comfy", "cli"],
    "demo": ["backends.comfy"],
    "generate": ["backends.comfy", "cli"],
}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_dependencies_point_one_way(room: str) -> None:
    files = files_of(room)
    assert files or room == "training", f"{room} is gone: change the table"
    assert offenders(files, *core(*FORBIDDEN[room])) == []


def test_the_backends_do_not_know_each_other() -> None:
    for comfy, diffusers in (("comfy", "diffusers"), ("comfy_lora", "diffusers_lora")):
        foreign = core("backends.diffusers", "backends.diffusers_lora"), core("backends.comfy", "backends.comfy_lora")
        assert offenders([CORE / f"backends/{comfy}.py"], *foreign[0]) == []
        assert offenders([CORE / f"backends/{diffusers}.py"], *foreign[1]) == []


def test_only_the_comfy_backend_and_the_host_room_know_the_comfy_backend() -> None:
    theirs = ("comfy.py", "comfy_lora.py")
    assert (
        offenders([p for p in sources(CORE) if p.name not in theirs], *core("backends.comfy", "backends.comfy_lora"))
        == []
    )
    assert (
        offenders(
            NOT_HOST, *core("backends.diffusers", "backends.diffusers_lora", "generate", "cli", "demo", "training")
        )
        == []
    )


def test_only_the_host_room_asks_comfyui() -> None:
    """comfy_api is the schema every node is written in; all else of the host goes through one room."""
    assert offenders(NOT_HOST, *(HOST_MODULES - {"comfy_api", "nodes"})) == []
    assert offenders(sources(NODES / "host"), "comfy", "folder_paths"), "a rule could not fail"


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
