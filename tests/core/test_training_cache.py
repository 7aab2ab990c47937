"""A cache that other programs changed: before a run, or while it reads."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ipadapter_core.errors import CorruptFileError
from ipadapter_core.training import RunConfig, build_cache, train
from ipadapter_core.training.adapter_trainee import AdapterStep
from ipadapter_core.training.cache import Cache
from ipadapter_core.training.tensor_files import TensorReader, bytes_of, write_tensors
from tiny_training import save_model, save_pictures, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def filled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """The config of a run over four pictures, and its cache."""
    root = tmp_path_factory.mktemp("filled")
    pictures = save_pictures(root / "pictures", 4)
    config = tiny_config(
        model, pictures, root / "out", data__cache=str(root / "cache"), train__steps=3, watch__validation=0
    )
    build_cache(config)
    (folder,) = (root / "cache").iterdir()
    return config, folder


def copied(filled: tuple[RunConfig, Path], tmp_path: Path) -> tuple[RunConfig, Path]:
    config, folder = filled
    shutil.copytree(folder, tmp_path / "cache" / folder.name)
    moved = replace(config, data=replace(config.data, cache=str(tmp_path / "cache")))
    moved = replace(moved, output=replace(moved.output, folder=str(tmp_path / "out")))
    return moved, tmp_path / "cache" / folder.name


def with_latents(folder: Path) -> Path:
    (shard,) = (p for p in folder.glob("shard-*.safetensors") if "latents" in p.with_suffix(".json").read_text())
    return shard


def changed_number(shard: Path) -> None:
    file, content = TensorReader(shard), bytearray(shard.read_bytes())
    name = next(name for name in file.names() if name.endswith(".latents"))
    place = content.index(bytes_of(file.read(name)))
    content[place + 3] ^= 0x40
    shard.write_bytes(content)


def other_shapes(shard: Path) -> None:
    """A whole file of the same keys, whose tensors are all empty."""
    write_tensors(shard, {name: torch.empty(0) for name in TensorReader(shard).names()})


def swapped(shard: Path) -> None:
    """A whole file in which two pictures have one another's latents."""
    file = TensorReader(shard)
    tensors = {name: file.read(name) for name in file.names()}
    a, b = [name for name in tensors if name.endswith(".latents")][:2]
    tensors[a], tensors[b] = tensors[b], tensors[a]
    write_tensors(shard, tensors)


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def overwritten(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.write(os.urandom(shard.stat().st_size))


DAMAGES = [changed_number, other_shapes, swapped, cut, overwritten, Path.unlink, lambda shard: os.truncate(shard, 0)]


@pytest.mark.parametrize("damage", DAMAGES[:-2])
def test_a_changed_cache_is_refused(filled: tuple[RunConfig, Path], tmp_path: Path, damage: Any) -> None:
    config, folder = copied(filled, tmp_path)
    damage(with_latents(folder))
    with pytest.raises(
        CorruptFileError, match=r"was changed or is damaged .* delete it and its \.json, the cache fills"
    ) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    with_latents(folder).with_suffix(".json").unlink()
    assert train(config).step == 3, "and it is filled again"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cache_that_changes_during_the_run_is_an_error_and_no_crash(
    filled: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, workers: int
) -> None:
    config, folder = copied(filled, tmp_path)
    config = replace(config, data=replace(config.data, workers=workers), train=replace(config.train, steps=30))
    original, calls = AdapterStep.forward, [0]

    def changing(self: AdapterStep, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            damage(with_latents(folder))
        return original(self, *args)

    monkeypatch.setattr(AdapterStep, "forward", changing)
    if damage is Path.unlink:
        assert train(config).step == 30, "what is open is there until it is closed"
    else:
        with pytest.raises(CorruptFileError, match="was changed or is damaged"):
            train(config)


def test_notes_of_samples_are_believed_only_whole(filled: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, folder = copied(filled, tmp_path)
    samples = folder / "samples-0.jsonl"
    cache = Cache(config.data.cache, json.loads((folder / "settings.json").read_text()))
    cache.refresh()
    assert len(cache.known()) == 4
    lines = samples.read_bytes().splitlines(keepends=True)
    keys = [json.loads(line)["key"].encode() for line in lines]
    lines[0] = lines[0].replace(keys[0], keys[1])
    lines[1] = lines[1][:20]
    samples.write_bytes(b"".join(lines[:2]) + b"\n[]\n3\n\xff\xfe\n" + b"[" * 300_000 + b"\n{}\n" + lines[2])
    assert len(cache.known()) == 1
    for bad in ("[]", "3", "{", '{"a": "b"}', "[" * 10_000):
        max(folder.glob("shard-*.json")).write_text(bad)
        cache.refresh()
    os.mkfifo(folder / "samples-1.jsonl")
    os.mkfifo(folder / "shard-9-000000.json")
    with pytest.raises(CorruptFileError, match="lacks nothing; start again"):
        cache.read("nothing")
    assert len(build_cache(config).samples) == 4


def test_a_cache_without_checksums_gives_way_to_a_new_one(
    filled: tuple[RunConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = copied(filled, tmp_path)
    settings = json.loads((folder / "settings.json").read_text())
    del settings["checksums"]
    (folder / "settings.json").write_text(json.dumps(settings))
    folder.rename(folder.with_name("old"))
    build_cache(config)
    assert "made with other settings, a new one begins (checksums: None → crc32)" in capsys.readouterr().err
