"""The command: files in, pictures and facts out; every mistake one line and an exit code."""

# pyright: basic, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from ipadapter_core.commands.cli import main
from ipadapter_core.model_folders import layout_in
from tiny import tiny_state
from tiny_folder import sd15_folder
from tiny_models import checkpoint_channels


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def strangers(model_folder: Path) -> dict[str, Path]:
    """Adapters that do not fit or need more, and a LoRA."""
    from safetensors.torch import save_file

    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    channels = tuple(checkpoint_channels(layout_in(model_folder)))
    states = {
        "faces": tiny_state("faceid", token_dim=32, channels=channels),
        "sdxl": tiny_state("base", token_dim=48, channels=channels),
        "lora": {f"{layer}.lora_down.weight": torch.ones(2, 32), f"{layer}.lora_up.weight": torch.ones(8, 2)},
    }
    for name, state in states.items():
        save_file({key: value.contiguous() for key, value in state.items()}, model_folder / f"{name}.safetensors")
    return {name: model_folder / f"{name}.safetensors" for name in states}


def run(folder: Path, out: Path, *more: str) -> int:
    return main(
        [
            "generate",
            "--model",
            str(folder),
            "--out",
            str(out),
            "--steps",
            "2",
            "--batch",
            "2",
            "--prompt",
            "a cat",
            *more,
        ]
    )


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_generate_writes_pictures_grid_and_facts(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(model_folder / "adapter.safetensors")
    images = [str(model_folder / "a.png"), str(model_folder / "grey.png")]
    assert (
        run(model_folder, tmp_path, "--adapter", adapter, "--image", *images, "--image-strengths", "1,0.5", "--json")
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert [Path(file).name for file in facts["files"]] == ["seed-000000.png", "seed-000001.png"]
    first = Image.open(facts["files"][0])
    assert first.size == (32, 32)
    assert [json.loads(first.text["ipadapter"])[name] for name in ("seed", "only")] == [[0, 1], 0]
    assert json.loads((tmp_path / "facts.json").read_text()) == facts
    assert Image.open(tmp_path / "grid.png").size == (68, 32)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_strength_zero_is_no_image_and_strength_one_is_not(model_folder: Path, tmp_path: Path) -> None:
    image = ["--adapter", str(model_folder / "adapter.safetensors"), "--image", str(model_folder / "a.png")]
    assert run(model_folder, tmp_path / "none") == 0
    assert run(model_folder, tmp_path / "zero", *image, "--strength", "0") == 0
    assert run(model_folder, tmp_path / "one", *image, "--strength", "1") == 0
    assert (
        run(
            model_folder,
            tmp_path / "half",
            *image,
            "--mask",
            str(model_folder / "mask.png"),
            "--preset",
            "style transfer",
        )
        == 0
    )
    none, zero, one = (pixels(tmp_path / name / "grid.png") for name in ("none", "zero", "one"))
    np.testing.assert_array_equal(none, zero)
    assert (none != one).any()
    assert (one != pixels(tmp_path / "half" / "grid.png")).any()


def test_inspect(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model_folder / "adapter.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["token_dim"], facts["feature_dim"]) == ("base", 32, 24)
    assert main(["inspect", str(model_folder / "adapter.safetensors")]) == 0
    assert "image tokens   4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image", "missing.png", "--adapter", "{adapter}"], "'missing.png' does not exist"),
        (["--image", "{adapter}", "--adapter", "{adapter}"], "cannot be read as a picture"),
        (["--image", "{a}"], "needs --adapter"),
        (["--image", "{a}", "--adapter", "{a}"], "a.png"),
        (["--adapter", "{adapter}"], "has no picture: give --image behind it"),
        (["--device", "cuda:99"], "the device 'cuda:99' cannot be used"),
        (["--device", "nonsense"], "the device 'nonsense' cannot be used"),
        (["--device", "meta"], "the device 'meta' cannot be used"),
        (["--denoise", "0.5"], "give it with --init"),
        (["--init", "{a}", "--denoise", "1.5"], "argument --denoise: '1.5' is no number from 0 to 1"),
        (["--init", "{a}", "--denoise", "0"], "denoise is 0"),
        (["--init", "{a}", "--denoise", "0.3"], "leaves none to sample"),
        (["--init", "{a}", "--inpaint-mask", "{mask}"], "they must have one size"),
        (["--seed", "1", "2", "3"], "got 3 seeds for 2 pictures"),
        (["--seed", "-1"], "argument --seed: '-1' is no whole number from 0 to 9223372036854775807"),
        (["--seed", str(2**64)], "is no whole number from 0"),
        (["--lora", "{a}"], "a.png"),
        (["--lora", "missing.safetensors:0.5"], "missing.safetensors does not exist"),
        (["--out", "{a}"], "cannot be the folder for pictures (File exists)"),
        (["--from", "{a}"], "holds no settings"),
        (["--from", "missing.png"], "'missing.png' does not exist"),
        (["--sites", "everywhere"], "cannot read 'everywhere'"),
        (["--image", "{a}", "--adapter", "{adapter}", "--sites", "t99: 1"], "'t99' matches no site"),
        (["--curve", "0:1, x"], "cannot read 'x'"),
        (["--model", "/nowhere"], "the model '/nowhere' does not exist"),
        (["--model", "."], "no model_index.json"),
        (["--sites", "output: 1"], "--sites says how a reference image acts: give one with --image"),
        (["--image", "{a}", "--adapter", "{adapter}", "--start", "0.9", "--end", "0.1"], "the image would never act"),
        (["--look-in", "{folder}"], "name the picture with --from"),
        (["--init", "{a}", "--denoise", "0.01", "--steps", "50"], "denoise 0.01 of 50 steps leaves none to sample"),
        (["--image", "{a}", "--adapter", "{adapter}", "--image-strengths", "1, 2"], "strengths"),
        (["--image", "{a}", "--adapter", "{adapter}", "--image-strengths", "x"], "cannot read 'x'"),
        (["--image", "{folder}", "--adapter", "{adapter}"], "is a folder; a file was expected"),
        (["--image", "{a}", "--adapter", "{folder}"], "is a folder"),
        (["--image", "{a}", "--adapter", "missing.safetensors"], "missing.safetensors does not exist"),
        (["--image", "{a}", "--adapter", "nobody/nothing:x.safetensors"], "the Hugging Face Hub is out of reach"),
        (["--image", "{a}", "--adapter", "{adapter}", "--image-encoder", "{folder}/nothing"], "nothing"),
        (["--image", "{a}", "--adapter", "{adapter}", "--mask", "{folder}"], "is a folder"),
        (
            ["--image", "{a}", "--adapter", "{adapter}", "--preset", "style transfer", "--sites", "up: 1"],
            "'up' matches no site",
        ),
        (["--image", "{a}", "--adapter", "{faces}"], "say with faces (--face-models)"),
        (["--image", "{a}", "--adapter", "{faces}", "--face-models", "{folder}"], "face"),
        (["--image", "{a}", "--adapter", "{sdxl}"], "Load an adapter made for this model"),
        (["--strength", "much"], "argument --strength: 'much' is no number"),
        (["--strength", "nan"], "'nan' is no number"),
        (["--start", "50"], "argument --start: '50' is no number from 0 to 1"),
        (["--guidance", "inf"], "'inf' is no number"),
        (["--true-guidance", "4"], "set guidance, and leave true guidance at 1"),
        (["--maps"], "--maps shows where reference images acted: give one with --image"),
        (["--image", "{a}", "--adapter", "{adapter}", "--maps", "{a}/x"], "cannot be the folder for maps"),
        (["--lora", "{lora}:1:everywhere"], "everywhere"),
        (["--lora", "{lora}:1:all: x"], "x"),
        (["--lora", "{folder}"], "is a folder"),
        (["--model", "{adapter}"], "holds no configs, tokenizers and text encoders"),
        (["--model", "{a}"], "models in one file are read as .safetensors"),
        (["--config", "{folder}"], "--config"),
        (["--out", "/proc/nothing"], "cannot be the folder for pictures"),
        (["--out", "a" * 300], "cannot be the folder for pictures (File name too long)"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2_before_a_model_is_loaded(
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    strangers: dict[str, Path],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr("ipadapter_core.model_folders.load_pipeline", Mock(side_effect=AssertionError("loaded")))
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=OSError("no net")))
    monkeypatch.chdir(tmp_path)
    files = {name: model_folder / f"{name}.png" for name in ("a", "mask")} | {
        "adapter": model_folder / "adapter.safetensors",
        "folder": model_folder,
        **strangers,
    }
    filled = [argument.format(**files) for argument in arguments]
    try:
        code = run(model_folder, tmp_path / "out/of/this", *filled)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert said in lines[0]
    assert not (tmp_path / "out").exists(), "nothing may be left behind"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("demo --out {a} --steps 1", 2, "cannot be the folder for the sheet (File exists)"),
        ("demo --out /proc/nothing", 2, "cannot be the folder for the sheet"),
        ("inspect {adapter} --config {folder}", 2, "give that with --model"),
        ("lora heatmap {lora} --out {folder}", 2, "does not end in .png"),
        ("lora heatmap {lora} --out {folder}/none/x.png", 2, "in none that exists"),
        ("lora heatmap {lora} --out /proc/x.png", 1, "'/proc/x.png' cannot be written (No such file or directory)"),
        ("lora resize missing.safetensors --out x.bin", 2, "does not end in .safetensors"),
        ("lora resize missing.safetensors --out {lora}", 2, "exists already"),
        ("lora extract missing.safetensors missing.safetensors --out {lora}", 2, "exists already"),
        ("lora merge {lora} --out x.safetensors --strengths x", 2, "cannot read 'x'"),
        ("lora convert {folder} --out x.safetensors", 1, "is a folder"),
        ("train", 2, "give a config file"),
        ("train {folder}", 1, "is a folder; a file was expected"),
        ("cache none.toml", 2, "'none.toml' does not exist"),
        ("export {adapter} {folder}", 2, "is a folder: name the file to write"),
        ("export {adapter} {adapter}", 2, "is the source itself: name another file"),
        ("export {adapter} none/x.bin", 1, "the folder none does not exist: create it first"),
        ("migrate {folder}", 1, "is a folder; a file was expected"),
    ],
)
def test_other_commands_say_in_a_line_what_is_wrong_before_they_compute(
    strangers: dict[str, Path],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr("ipadapter_core.demo.sheet.load_world", Mock(side_effect=AssertionError("loaded")))
    monkeypatch.chdir(tmp_path)
    names = {"a": model_folder / "a.png", "adapter": model_folder / "adapter.safetensors", "folder": model_folder}
    before = (model_folder / "adapter.safetensors").read_bytes()
    assert main(arguments.format(**names, **strangers).split()) == code
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert said in told
    assert list(tmp_path.iterdir()) == []
    assert (model_folder / "adapter.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--preset", "no such preset"],
        ["demo", "--steps", "0"],
        ["lora", "resize", "x", "--out", "y", "--rank", "-1"],
        ["lora", "resize", "x", "--out", "y", "--energy", "nan"],
        ["cache"],
        ["generate", "--steps", "0"],
        ["generate", "--width", "1000000"],
        ["generate", "--lora", "a.safetensors:much"],
        ["generate", "--no-such-option"],
        ["no such command"],
    ],
)
def test_usage_errors_are_one_line_and_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.rstrip().endswith("--help)")


# --- consoles, pipes and names ------------------------------------------------------------------------------------------------


def on_console(monkeypatch: pytest.MonkeyPatch, encoding: str, arguments: list[str]) -> tuple[int, str, str]:
    """A command whose output is piped on a console with a code page: exit code, output, errors."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        code = main(arguments)
    for stream in streams:
        stream.flush()
    return code, *(cast(io.BytesIO, stream.buffer).getvalue().decode(encoding) for stream in streams)


@pytest.mark.parametrize("encoding", ["ascii", "cp1251", "cp1252", "cp437", "cp949", "utf-8"])
def test_every_console_can_show_every_text(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    from safetensors.torch import save_file

    strange = os.fsdecode(b"caf\xe9.safetensors")  # a name in another encoding
    lora = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(2, 4)}
    lora["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"] = torch.ones(4, 2)
    save_file(lora, tmp_path / "lora.safetensors")
    for name in ("猫×😀.safetensors", strange):
        shutil.copy(model_folder / "adapter.safetensors", tmp_path / name)
        code, out, _ = on_console(monkeypatch, encoding, ["inspect", str(tmp_path / name)])
        assert code == 0
        assert "image tokens   4" in out
        shutil.copy(tmp_path / "lora.safetensors", tmp_path / name)
        assert on_console(monkeypatch, encoding, ["lora", "inspect", str(tmp_path / name)])[0] == 0
        code, _, err = on_console(monkeypatch, encoding, ["inspect", str(tmp_path / f"no {name}")])
        assert code == 2
        assert "does not exist" in err
    code, out, _ = on_console(monkeypatch, encoding, ["train", "--example", "sd15-lora"])
    assert code == 0
    assert ("√rank" in out) == (encoding in ("cp437", "cp949", "utf-8"))
    if encoding == "ascii":
        assert "\\u732b\\xd7\\U0001f600" in on_console(monkeypatch, encoding, ["inspect", str(tmp_path / "猫×😀")])[2]


@pytest.mark.parametrize(
    "arguments", [["train", "--example", "sd15-base"], ["--help"], ["inspect", "{adapter}", "--json"]]
)
def test_a_reader_that_is_gone_ends_a_command_quietly(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert main([one.format(adapter=model_folder / "adapter.safetensors") for one in arguments]) == 141
    assert capsys.readouterr().err == ""


def test_output_that_goes_to_a_full_disk_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main(["train", "--example", "sd15-base"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the output cannot be written (OSError: [Errno 28] No space left on device)" in said


def test_memory_that_runs_out_and_system_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        OSError(36, "File name too long", "x"),
    ]
    for error in (*errors, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        monkeypatch.setattr("ipadapter_core.commands.cli.describe_adapter", Mock(side_effect=error))
        assert main(["inspect", "x"]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("ipadapter_core.commands.cli.describe_adapter", Mock(side_effect=RuntimeError("a bug")))
    assert main(["inspect", "x"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "RuntimeError: a bug" in said
    monkeypatch.setenv("IPADAPTER_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["inspect", "x"])


def test_a_disk_that_is_full_is_one_line_and_leaves_no_half_picture(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Image.Image, place: Path, **_: object) -> None:
        Path(place).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert run(model_folder, tmp_path) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("cannot be written (No space left on device): choose another place, or make room")
    assert list(tmp_path.iterdir()) == []


def test_versions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert f"torch {torch.__version__.split('+')[0]}" in capsys.readouterr().out


def test_home_is_a_tilde_in_arguments(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_folder))
    assert main(["inspect", "~/adapter.safetensors"]) == 0
    assert main(["inspect", "~/none.safetensors"]) == 2
