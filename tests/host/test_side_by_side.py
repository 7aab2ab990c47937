"""Every old class type gives the old pack's output: compared with the pack itself, or with numbers recorded from such a run.

`IPADAPTER_PLUS_PATH` names a checkout of ComfyUI_IPAdapter_plus; without it the recorded fingerprints are compared.
Record anew with `RECORD_GOLDEN=1` (and the old pack at hand).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from host.comfy_server import find_hosts

HERE = Path(__file__).resolve().parent
OLD = os.environ.get("IPADAPTER_PLUS_PATH")
TOLERANCE = 1e-4  # fp32; the two differ in the order of sums only
GOLDEN_TOLERANCE = 2e-3  # other processors, other kernels; every case moves the output by more than 1e-2


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_old_class_types_give_the_old_packs_output(kind: str, model_cache: Path, tmp_path: Path) -> None:
    hosts = find_hosts()
    if not hosts:
        pytest.skip("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")
    golden_file = HERE / f"golden_{kind}.json"
    if not OLD and not golden_file.exists():
        pytest.skip(f"no {golden_file.name}, and no old pack at $IPADAPTER_PLUS_PATH")
    rows = run(hosts[0], kind, model_cache, old_packs(tmp_path) if OLD else [f"-g{golden_file}"])
    still = [row["case"] for row in rows if row["effect"] is not None and row["effect"] < 1e-2]
    assert still == [], "the image hardly acts in these cases, so equality would prove nothing"
    if OLD:
        compared = [row for row in rows if "difference" in row]  # the first version's only where git has it
        differ = [(row["case"], row["difference"]) for row in compared if not row["difference"] < TOLERANCE]
        assert differ == []
        if os.environ.get("RECORD_GOLDEN"):
            kept = [row for row in rows if row["recorded"]]
            lines = [f"{json.dumps(row['case'])}: {json.dumps(row['numbers'])}" for row in kept]
            golden_file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    golden = json.loads(golden_file.read_text()) if golden_file.exists() else {}
    numbers = {row["case"]: row["numbers"] for row in rows}
    assert golden.keys() <= numbers.keys(), "record the golden numbers anew, from a run beside the old pack"
    assert [case for case in golden if not close(numbers[case], golden[case])] == []


FIRST_VERSION = "6a411dc"
"""The old pack's last commit before its rewrite of 2024-03-23."""


def old_packs(folder: Path) -> list[str]:
    """The checkout, and beside it the first version out of its history where that is there."""
    assert OLD is not None
    first = folder / "first"
    first.mkdir()
    packed = subprocess.run(["git", "-C", OLD, "archive", FIRST_VERSION], capture_output=True, check=False)
    if packed.returncode != 0:
        return [OLD]
    subprocess.run(["tar", "x", "-C", str(first)], input=packed.stdout, check=True)
    return [OLD, str(first)]


def run(host: Any, kind: str, models: Path, more: list[str]) -> list[dict[str, Any]]:
    command = [str(host.python), str(HERE / "side_by_side.py"), str(host.path), str(models), kind, *more]
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=9000)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def close(numbers: list[float], golden: list[float]) -> bool:
    scale = max(1.0, *(abs(value) for value in golden))
    return len(numbers) == len(golden) and all(
        abs(a - b) <= GOLDEN_TOLERANCE * scale for a, b in zip(numbers, golden, strict=True)
    )
