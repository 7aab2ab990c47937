"""``ipadapter migrate OLD.json``: a workflow of ComfyUI_IPAdapter_plus, or of rgthree's LoRA rows, with this pack's nodes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..console import file_argument
from ..errors import InvalidInputError, quoted
from ..legacy.migrate import migrate_graph
from ..legacy.migrate.files import read_graph
from . import Commands


def add_migrate(commands: Commands) -> None:
    p = commands.add_parser(
        "migrate",
        help="rewrite a workflow of other packs (ComfyUI_IPAdapter_plus, Power Lora Loader, …) with the nodes of this pack",
    )
    p.set_defaults(run=run_migrate)
    p.add_argument(
        "file", type=file_argument, help="workflow as ComfyUI saves or exports it, or a picture that carries one"
    )
    p.add_argument(
        "--out", type=file_argument, default=None, help="file to write; default: OLD.migrated.json beside it"
    )
    p.add_argument("--base", choices=("sd15", "sdxl"), default=None, help="model family; default: by checkpoint name")
    p.add_argument("--overwrite", action="store_true", help="let --out be the workflow itself")
    p.add_argument("--json", action="store_true", help="print the report as JSON")


def run_migrate(args: argparse.Namespace) -> None:
    file: Path = args.file
    made = migrate_graph(read_graph(file), args.base)
    out: Path = args.out or file.with_suffix(".migrated.json")
    _check_out(out, file, args.overwrite)
    if not args.json:
        print("\n".join(f"  {line}" for line in made.report))
    # ASCII with escapes: a lone half of a character, which JavaScript lets pass, has no UTF-8
    text = json.dumps(made.graph, indent=2) + "\n"
    try:
        out.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{quoted(out)} cannot be written ({error}): choose another place with --out") from None
    if args.json:
        print(json.dumps({"file": str(out), "report": made.report, "found": made.found, "rewritten": made.rewritten}))
        return
    print(f"written to {out}" if made.rewritten else f"written to {out} as it was: nothing could be rewritten")


def _check_out(out: Path, file: Path, overwrite: bool) -> None:
    try:
        same = out.exists() and out.samefile(file)
        other = out.exists() and not out.is_file()
    except (OSError, ValueError):
        return  # writing says why
    if same and not overwrite:
        raise InvalidInputError(f"{quoted(out)} is the workflow itself: name another file, or add --overwrite")
    if other:
        raise InvalidInputError(f"{quoted(out)} is no plain file: name another one")
