"""Check and measure everything that a GPU decides, in one command and under eight minutes; at toy scale also on a CPU.

    python tests/gpu/check.py [--toy] [--only comfy,diffusers,trainer,world] [--json FILE] [--host COMFY] [--old PACK] [--bare]

No network and no weights are needed. Sections are processes of their own with a time limit each: one that fails costs its own rows. ComfyUI is
``--host``, else $COMFYUI_PATH, else ``~/comfy/ComfyUI``, run by $COMFYUI_PYTHON, its own ``.venv``, or this Python. ``--old`` (else
$IPADAPTER_PLUS_PATH) is ComfyUI_IPAdapter_plus, measured beside ours. ``--bare``: as on a machine that lacks what ComfyUI
needs for videos and its server. Without CUDA the scale is a toy's by itself. Ends with 1 if a row did not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROW = "ROW "
WHOLE = 470.0
"""Seconds for all sections together on a GPU; a toy run on a busy CPU may take twice as long."""


@dataclass(frozen=True)
class Part:
    """One process of a section: its file, what else it is told, and its seconds at most on a GPU."""

    file: str
    seconds: float
    arguments: tuple[str, ...] = ()


SECTIONS: dict[str, tuple[Part, ...]] = {
    "comfy": (
        Part("in_comfy.py", 60, ("reference",)),
        Part("in_comfy.py", 130, ("standard",)),
        Part("in_comfy.py", 110, ("dynamic",)),
        Part("in_comfy.py", 30, ("novram",)),
    ),
    "diffusers": (Part("in_diffusers.py", 120),),
    "trainer": (Part("trainer.py", 110),),
    "world": (Part("world.py", 50),),
}
HOSTED = "in_comfy.py"


@dataclass(frozen=True)
class Settings:
    toy: bool
    bare: bool
    host: Path
    old: Path | None
    folder: Path

    def command(self, part: Part) -> list[str]:
        more = ["--toy"] * self.toy
        if part.file != HOSTED:
            return [sys.executable, str(HERE / part.file), *part.arguments, *more]
        own = self.host / ".venv/bin/python"
        python = os.environ.get("COMFYUI_PYTHON") or (str(own) if own.exists() else sys.executable)
        more += ["--bare"] * self.bare + (["--old", str(self.old)] if self.old else [])
        return [python, str(HERE / part.file), str(self.host), str(self.folder), *part.arguments, *more]


def failed(name: str, why: str, passed: bool | None = False) -> dict[str, Any]:
    return {"name": name, "value": None, "unit": "", "bound": None, "passed": passed, "why": why}


def rows_of(part: Part, settings: Settings, seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of one process as they come, and one more if it did not end well or in time."""
    name = " ".join([part.file, *part.arguments])
    if part.file == HOSTED and not (settings.host / "comfy").is_dir():
        yield failed(name, f"there is no ComfyUI at {settings.host}; give --host", None)
        return
    if seconds <= 1:
        yield failed(name, "no time was left for it")
        return
    # what another environment put there is not the host's
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if settings.toy:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log = settings.folder / f"{name.replace(' ', '-')}.log"
    with log.open("w") as errors:
        child = subprocess.Popen(
            settings.command(part), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith(ROW):
                    yield json.loads(line.removeprefix(ROW))
            child.wait()
        finally:
            timer.cancel()
            child.kill()
            child.wait()
    if late.is_set():
        yield failed(name, f"stopped after {seconds:.0f} s")
    elif child.returncode != 0:
        yield failed(
            name, f"ended with {child.returncode}: {(log.read_text().strip().splitlines() or ['no output'])[-1]}"
        )


def line_of(row: dict[str, Any]) -> str:
    verdict = {True: "ok", False: "FAILED", None: ""}[row["passed"]]
    value = "-" if row["value"] is None else f"{row['value']:.4g}"
    bound = "" if row["bound"] is None else f"<= {row['bound']:.3g}"
    told = row["why"] if row["value"] is None else row["unit"]
    return f"{row['name']:<92} {value:>10} {bound:>9} {verdict:>6}  {told}".rstrip()


def card() -> tuple[str, bool]:
    """What computes, and whether it is a CUDA device."""
    import torch

    there = torch.cuda.is_available()
    name = (
        torch.cuda.get_device_name()
        if there
        else f"CPU, {os.cpu_count()} cores ({platform.processor() or platform.machine()})"
    )
    return f"{name}, torch {torch.__version__}", there


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="the small scale; by itself without CUDA")
    parser.add_argument("--only", default="", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--host", type=Path, default=Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI"))
    parser.add_argument("--old", type=Path, default=os.environ.get("IPADAPTER_PLUS_PATH"))
    parser.add_argument("--bare", action="store_true", help="hide what a bare machine has not")
    args = parser.parse_args()
    chosen = [name for name in args.only.split(",") if name] or list(SECTIONS)
    unknown = sorted(set(chosen) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    computes, there = card()
    toy = args.toy or not there
    print(f"{computes}{', toy scale' if toy else ''}", flush=True)
    begun, rows = time.perf_counter(), list[dict[str, Any]]()
    patience = 4.0 if toy else 1.0
    with tempfile.TemporaryDirectory() as folder:
        old = None if args.old is None else Path(args.old).expanduser()
        settings = Settings(toy, args.bare, args.host.expanduser(), old, Path(folder))
        for section in chosen:
            for part in SECTIONS[section]:
                left = patience * WHOLE - (time.perf_counter() - begun)
                for row in rows_of(part, settings, min(patience * part.seconds, left)):
                    rows.append({"section": section, **row})
                    print(line_of(row), flush=True)
    spent = time.perf_counter() - begun
    passed, wrong = (sum(row["passed"] is truth for row in rows) for truth in (True, False))
    print(f"{passed} passed, {wrong} failed, {len(rows) - passed - wrong} without a bound; {spent:.0f} s on {computes}")
    if args.json:
        told = {"device": computes, "toy": toy, "seconds": round(spent, 1), "rows": rows}
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
