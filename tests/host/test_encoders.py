"""Image encoders in every ComfyUI: SigLIP with its pooled vector, DINOv2's layers, PE-Core, two encoders at once."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from host.comfy_server import Host, find_hosts

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-5
LOOSER = {"SigLIP core": 2e-5, "SigLIP encode_image": 2e-5}
"""ComfyUI's SigLIP adds 1e-5 in its norms where transformers' adds 1e-6."""


@pytest.fixture(scope="module", params=find_hosts() or [None], ids=lambda host: host.path.name if host else "none")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    host: Host | None = request.param
    if host is None:
        pytest.skip("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")
    command = [
        str(host.python),
        str(HERE / "encoders_in_host.py"),
        str(host.path),
        str(tmp_path_factory.mktemp("encoders")),
    ]
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_encoder_sees_what_transformers_sees(rows: list[dict[str, Any]]) -> None:
    compared = {row["case"]: row["difference"] for row in rows if "difference" in row}
    assert len(compared) > 35
    for kind in (
        "SigLIP core pooled",
        "SigLIP ours pooled",
        "DINOv2 core layer 2 (70, 42)",
        "CLIP last",
        "PE-Core pe.pt",
    ):
        assert kind in compared
    allowed = {case: next((t for start, t in LOOSER.items() if case.startswith(start)), TOLERANCE) for case in compared}
    assert {case: value for case, value in compared.items() if not value <= allowed[case]} == {}


def test_wrong_and_missing_encoders_are_named(rows: list[dict[str, Any]]) -> None:
    said = {row["case"]: row["said"] for row in rows if "said" in row}
    assert "nothing.safetensors in models/clip_vision is no image encoder" in said["no encoder"]
    assert "connect Load CLIP Vision" in said["nothing connected"]
    assert "DINOv2 giant/14" in said["one is missing"]
    assert "model.safetensors of facebook/dinov2-giant" in said["one is missing"]
    assert "hidden states of width 768" in said["the wrong one"]
