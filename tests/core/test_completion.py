"""Completion of the shell, asked of the shell itself."""

# pyright: basic

from __future__ import annotations

import subprocess

import pytest

from ipadapter_core.attention.presets import PRESETS
from ipadapter_core.commands.cli import main
from ipadapter_core.commands.completion import SHELLS


def script_for(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def completed(script: str, words: list[str]) -> list[str]:
    """What bash offers for the last of the words."""
    line = " ".join(f"{word!r}" for word in words)
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _ipadapter; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["gen"], ["generate"]),
        (["lora", "in"], ["inspect"]),
        (["generate", "--true"], ["--true-guidance"]),
        (["generate", "--image", "a.png", "--preset", "style t"], ["style\\ transfer", "style\\ transfer\\ precise"]),
        (["generate", "--dtype", ""], ["auto", "float32", "float16", "bfloat16"]),
        (["lora", "convert", "x.safetensors", "--key"], ["--key-format"]),
        (["completion", ""], [*SHELLS, "-h", "--help"]),
        (["generate", "--image", "ow"], []),  # file names are bash's own to complete
        (["inspect", "--js"], ["--json"]),
        (["--vers"], ["--version"]),
    ],
)
def test_bash_offers_what_can_come_next(
    words: list[str], offered: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed(script_for("bash", capsys), ["ipadapter", *words]) == offered


def test_every_shell_knows_every_command_and_choice(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in SHELLS:
        script = script_for(shell, capsys)
        for word in ("generate", "heatmap", "image-strengths", "completion", *PRESETS):
            assert word in script, f"{shell} does not know {word}"
    assert script_for("zsh", capsys).startswith("autoload")
