"""What the documents show: Python runs as written, and every command line is one that the command understands."""

# pyright: basic

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ipadapter_core.commands import cli
from ipadapter_core.demo.world import FOLDER, load_world
from ipadapter_core.downloads import DOWNLOADS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not {"node_modules", ".venv", "tests"} & set(path.relative_to(ROOT).parts)
]
FILES = {
    "ip-adapter_sd15.safetensors": "adapters/ip-adapter-base.safetensors",
    "ip-adapter-plus_sd15.safetensors": "adapters/ip-adapter-plus.safetensors",
    "style.safetensors": "loras/demo-world-style.safetensors",
    "image_encoder": "image_encoder",
    "cat.png": "../references/leopard.png",
    "ink.png": "../references/owl.png",
    "mask.png": "../references/snail.png",
}
"""Files that snippets name, and what of the demo world stands for them."""
OF_COMMANDS = {
    "ip-adapter-plus_sdxl_vit-h.safetensors": "adapters/ip-adapter-plus.safetensors",
    "my-adapter.safetensors": "adapters/ip-adapter-base.safetensors",
    "my-plus.safetensors": "adapters/ip-adapter-plus.safetensors",
    "detail.safetensors": "loras/demo-world-style.safetensors",
    "path/to/diffusers-model": ".",
    "sdxl.safetensors": ".",
    "photo.png": "../references/turtle.png",
    "sky.png": "../references/snail.png",
    "region.png": "../references/snail.png",
    "left.png": "../references/snail.png",
}
"""What commands name besides: their models are folders of the demo world."""


def blocks(text: str, language: str) -> Iterator[tuple[int, str]]:
    """Line and text of every fenced block of a language."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start()) + 2, found[1]


def examples(path: Path) -> Iterator[tuple[int, str]]:
    """The same of the docstrings in a file, by the line where these begin."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield from ((node.body[0].lineno, block) for _, block in blocks(text, "python"))


def snippets() -> dict[str, str]:
    found: dict[str, str] = {}
    for path in DOCUMENTS:
        if path.name == "http.md":
            continue  # wants a ComfyUI: tests/host/test_routes.py
        for line, text in blocks(path.read_text(encoding="utf-8"), "python"):
            found[f"{path.relative_to(ROOT)}:{line}"] = text
    for folder in ("ipadapter_core", "nodes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, text in examples(path):
                found[f"{path.relative_to(ROOT)}:{line}"] = text
    return found


def command_lines() -> Iterator[tuple[str, str]]:
    """Place and text of every command of ours in the documents' shell blocks."""
    for path in DOCUMENTS:
        for number, text in blocks(path.read_text(encoding="utf-8"), "bash"):
            for at, line in enumerate(text.replace("\\\n", " ").splitlines()):
                for part in line.split("&&"):
                    if found := re.search(r"(?:^|\s)(?:ipadapter|-m ipadapter_core) (.*)", part):
                        yield f"{path.relative_to(ROOT)}:{number + at}", found[1]


def mentions() -> Iterator[tuple[str, str]]:
    """Place and text of every command of ours that running text mentions."""
    for path in DOCUMENTS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for found in re.finditer(r"`ipadapter ([^`]+)`", line):
                yield f"{path.relative_to(ROOT)}:{number}", found[1]


SNIPPETS = snippets()
COMMANDS = {f"{place} {text}": text for place, text in command_lines()}
MENTIONS = {f"{place} {text}": text for place, text in mentions()}


def test_the_documents_are_read() -> None:
    places = {place.split(":")[0] for place in SNIPPETS}
    assert {"README.md", "ipadapter_core/__init__.py"} <= places
    assert {"README.md", "ipadapter_core/training/README.md"} <= {place.split(":")[0] for place in COMMANDS}
    assert len(MENTIONS) > 5


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What snippets take for granted, on the demo world; the folder of the test has the files that they name."""
    for name, source in FILES.items():
        copy = shutil.copytree if (FOLDER / source).is_dir() else shutil.copyfile
        copy(FOLDER / source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    world = load_world()
    pipeline = world.pipeline

    class OneStep(type(pipeline)):
        def __call__(self, prompt: str) -> Any:
            return super().__call__(prompt, num_inference_steps=1)

    monkeypatch.setattr(pipeline, "__class__", OneStep)
    return {"pipeline": pipeline, "unet": pipeline.unet, "image": torch.rand(1, 40, 30, 3)}


@pytest.mark.parametrize("place", SNIPPETS)
def test_python_runs_as_written(place: str, names: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "as_written.py"
    script.write_text(SNIPPETS[place], encoding="utf-8")
    runpy.run_path(str(script), names)


LINKS = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert [link for link in LINKS.findall(text) if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("place", COMMANDS)
def test_command_lines_are_understood(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert callable(cli._parse(shlex.split(COMMANDS[place], comments=True)).run)


NOT_RUN = {
    "demo": "a minute of drawing and measuring: tests/core/test_demo.py",
    "train run.toml": "a training: tests/core/test_training_run.py",
    "train try.toml": "a training: tests/core/test_training_run.py",
    "generate --model stable-diffusion-v1-5": "fetches a model from the Hub: tests/core/test_hub.py",
    "export my-adapter.safetensors out/my-adapter.safetensors --push": "writes to the Hub: tests/core/test_sharing.py",
    "lora extract": "wants two checkpoints: tests/core/test_lora_tools.py",
}
"""Beginnings of commands that are not run here, and why."""
GUIDES = [ROOT / "README.md", *sorted((ROOT / "nodes/web/docs/guides").glob("*.md"))]
RUN = {
    place: text
    for place, text in COMMANDS.items()
    if place.split(":")[0] in {path.relative_to(ROOT).as_posix() for path in GUIDES}
    and not text.startswith((*NOT_RUN,))
}


def test_commands_that_are_not_run_are_there() -> None:
    assert [start for start in NOT_RUN if not any(text.startswith(start) for text in COMMANDS.values())] == []
    assert len(RUN) > 15


@pytest.fixture(scope="module")
def at_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that commands of the guides name, each of the demo world; what a command makes stays for the next."""
    folder = tmp_path_factory.mktemp("home")
    for name, source in {**FILES, **OF_COMMANDS}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (FOLDER / source).is_dir() else shutil.copyfile
        copy(FOLDER / source, folder / name)
    (folder / "out").mkdir()
    (folder / "old_workflow.json").write_text('{"nodes": [], "links": []}')
    return folder


@pytest.mark.parametrize("place", RUN)
def test_commands_of_the_guides_run(place: str, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, with two steps where a picture is drawn."""
    monkeypatch.chdir(at_home)
    words = shlex.split(RUN[place], comments=True)
    assert cli.main([*words, *(["--steps", "2"] if words[0] == "generate" else [])]) == 0


@pytest.mark.parametrize("place", MENTIONS)
def test_commands_that_texts_mention_are_there(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli._parse([*shlex.split(MENTIONS[place]), "--help"])
    assert ended.value.code == 0
    command = " ".join(MENTIONS[place].split()[: 2 if MENTIONS[place].startswith("lora ") else 1])
    assert f"usage: ipadapter {command}" in capsys.readouterr().out


TROUBLE = ROOT / "nodes/web/docs/guides/troubleshooting.md"


def strings_of_the_code() -> str:
    """Every text that the code can print, a line each; \0 stands for what is filled in."""
    found: list[str] = []
    for path in (one for folder in ("ipadapter_core", "nodes") for one in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def quoted_errors() -> list[str]:
    """Sentences in the first column of the tables of that page."""
    rows = re.findall(r"^\| (\*.+?\*) \|", TROUBLE.read_text(encoding="utf-8"), re.MULTILINE)
    return [sentence for row in rows for sentence in re.findall(r"\*(.+?)\*(?:, |$)", row)]


def test_errors_that_a_page_explains_are_errors_of_the_code() -> None:
    code, sentences = strings_of_the_code(), quoted_errors()
    assert len(sentences) > 50

    def is_there(sentence: str) -> bool:
        parts = [re.escape(part.strip()) for part in sentence.strip("… ").split("…")]
        return re.search(r"[^\n]*?".join(parts), code) is not None

    assert [sentence for sentence in sentences if not is_there(sentence)] == []
    assert not is_there("the model is a …, which is of no family that this pack ever heard of")


PUBLIC = ("ipadapter_core", "ipadapter_core.lora", "ipadapter_core.backends.diffusers")
"""Modules of the Python reference."""


def undocumented(module: str) -> Iterator[str]:
    """Names that the reference shows without a word about them."""
    shown = importlib.import_module(module)
    for name in shown.__all__:
        value = getattr(shown, name)
        if inspect.isfunction(value) and not value.__doc__:
            yield name
        if inspect.isclass(value) and value.__module__.startswith("ipadapter_core"):
            written = inspect.getdoc(value) or ""
            if not written or written.startswith(f"{value.__name__}("):  # dataclasses write their own
                yield name
            for part, member in vars(value).items():
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if not part.startswith("_") and inspect.isfunction(function) and not function.__doc__:
                    yield f"{name}.{part}"


@pytest.mark.parametrize("module", PUBLIC)
def test_all_that_is_public_is_documented(module: str) -> None:
    assert list(undocumented(module)) == []


def test_every_node_has_a_wish_and_a_place_on_the_site() -> None:
    pages = {page.name for page in (ROOT / "nodes/web/docs").glob("ImagePrompt*.md")}
    assert len(pages) > 25
    for table in ("nodes/web/docs/guides/which_node.md", "nodes/web/mkdocs.yml"):
        text = (ROOT / table).read_text(encoding="utf-8")
        assert [page for page in sorted(pages) if page not in text] == [], table
    readme = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .replace("Save, Load, Combine Image Prompts", "Save Image Prompt, Load Image Prompt, Combine Image Prompts")
    )
    titles = [(ROOT / "nodes/web/docs" / page).read_text(encoding="utf-8").split("\n")[0][2:] for page in sorted(pages)]
    assert [title for title in titles if title not in readme] == []


def download_rows() -> str:
    """What the guide to files says of public ones, from their table."""
    rows = ["| file | folder of `models` | |", "|---|---|---|"]
    for one in DOWNLOADS.values():
        notes = ", ".join(filter(None, (f"there it is called {one.comes_as}" if one.comes_as else "", one.note)))
        rows.append(f"| [{one.name}]({one.url}) | {one.folder} | {notes} |")
    return "\n".join(rows) + "\n"


def test_addresses_of_public_files_are_those_of_the_table() -> None:
    assert download_rows() in (ROOT / "nodes/web/docs/guides/files.md").read_text(encoding="utf-8")


def test_the_gallery_says_of_every_preset_what_it_does() -> None:
    from ipadapter_core.attention.presets import MEANINGS

    page = (ROOT / "nodes/web/docs/guides/presets.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]*\|$", page, re.MULTILINE)
    assert dict(rows[1:]) == MEANINGS


def test_the_picture_of_the_presets_has_a_cell_for_each() -> None:
    """Drawn by ``python -m ipadapter_core.demo.presets_sheet nodes/web/docs``; the list in a node cuts it up."""
    from PIL import Image

    from ipadapter_core.attention.presets import PRESETS
    from ipadapter_core.demo.presets_sheet import CELL, COLUMNS, GAP, LABEL

    file = ROOT / "nodes/web/docs/presets.webp"
    assert file.stat().st_size < 80_000
    assert all(picture.stat().st_size < 250_000 for picture in file.parent.glob("*.webp"))
    with Image.open(file) as picture:
        assert picture.size == (COLUMNS * (CELL + GAP), -(-(4 + len(PRESETS)) // COLUMNS) * (CELL + LABEL + GAP))
    script = (ROOT / "nodes/web/preset_pictures.js").read_text(encoding="utf-8")
    assert f"= [{COLUMNS}, {CELL}, {LABEL}, {GAP}, 4];" in script
