"""``ipadapter migrate OLD.json``: a workflow of ComfyUI_IPAdapter_plus with this pack's nodes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .console import file_argument
from .errors import CorruptFileError
from .migrate import migrate


def add_migrate(commands: Any) -> None:
    p = commands.add_parser("migrate", help="rewrite a workflow of ComfyUI_IPAdapter_plus with the nodes of this pack")
    p.set_defaults(run=run_migrate)
    p.add_argument("file", type=file_argument, help="workflow as ComfyUI's menu saves it")
    p.add_argument(
        "--out", type=file_argument, default=None, help="file to write; default: OLD.migrated.json beside it"
    )
    p.add_argument("--base", choices=("sd15", "sdxl"), default=None, help="model family; default: by checkpoint name")
    p.add_argument("--json", action="store_true", help="print the report as JSON")


def run_migrate(args: argparse.Namespace) -> None:
    try:
        workflow = json.loads(args.file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{args.file} is no JSON file ({error}): save the workflow anew") from None
    new, report = migrate(workflow if isinstance(workflow, dict) else {}, args.base)
    out: Path = args.out or args.file.with_suffix(".migrated.json")
    out.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps({"file": str(out), "report": report}))
        return
    print("\n".join([*(f"  {line}" for line in report), f"written to {out}"]))
