"""``tests/gpu/check.py``: a section gives its rows, and one that dies or hangs costs no others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gpu import check


@pytest.fixture
def settings(tmp_path: Path) -> check.Settings:
    return check.Settings(True, False, tmp_path / "no ComfyUI", None, tmp_path)


def test_the_smallest_part_gives_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"diffusers": (check.Part("in_diffusers.py", 100, ("--only", "one site")),)}
    monkeypatch.setattr(check, "SECTIONS", parts)
    monkeypatch.setattr(sys, "argv", ["check.py", "--toy", "--json", str(tmp_path / "table.json")])
    assert check.main() == 0, capsys.readouterr().out
    told = json.loads((tmp_path / "table.json").read_text())
    rows = {row["name"].removeprefix("diffusers, one site, fp32: "): row for row in told["rows"]}
    judged = {name for name, row in rows.items() if row["passed"]}
    assert {"ours next to diffusers' own", "ours: operations added per site", "ours: synchronisations added"} <= judged
    assert rows["ours: operations added per site"]["value"] > 3, "nothing ran"
    assert rows["recorded as a CUDA graph"]["why"] == "needs CUDA"
    assert all(row["passed"] is not False for row in rows.values())


@pytest.mark.parametrize(
    ("end", "why"), [("raise SystemExit('no more')", "ended with 1: no more"), ("time.sleep(60)", "stopped after 3 s")]
)
def test_a_part_that_dies_or_hangs_costs_its_own_rows(
    settings: check.Settings, tmp_path: Path, end: str, why: str
) -> None:
    row = json.dumps({"name": "first", "value": 1.0, "unit": "", "bound": None, "passed": True, "why": ""})
    script = tmp_path / "part.py"
    script.write_text(f"import time\nprint('greeting')\nprint({check.ROW + row!r}, flush=True)\n{end}\n")
    rows = list(check.rows_of(check.Part(str(script), 3), settings, 3))
    assert [(row["name"], row["passed"]) for row in rows] == [("first", True), (str(script), False)]
    assert rows[1]["why"] == why


def test_without_a_comfyui_it_says_so(settings: check.Settings) -> None:
    (row,) = check.rows_of(check.SECTIONS["comfy"][0], settings, 10)
    assert row["passed"] is None
    assert "there is no ComfyUI at" in row["why"]


def test_a_figure_passes_up_to_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    from gpu import rows

    rows.show("within", 1.0, "", 1.0)
    rows.show("beyond", 1.1, "", 1.0)
    rows.show("no number", float("nan"), "", 1.0)
    rows.show("free", 7.0, "")
    rows.attempt("broken", lambda: 1 // 0)
    printed = [json.loads(line.removeprefix(rows.ROW)) for line in capsys.readouterr().out.splitlines()]
    assert [row["passed"] for row in printed] == [True, False, False, None, False]
    assert printed[-1]["why"].startswith("ZeroDivisionError")
