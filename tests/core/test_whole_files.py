"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dying import dies
from ipadapter_core.files.whole import written_whole


def test_the_file_has_its_name_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with written_whole(target) as place:
        place.write_text("new")
        assert not target.exists()
        assert place.parent == tmp_path, "a rename between disks would be a copy"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail() -> None:
        with written_whole(target) as place:
            place.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_kill_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def killed() -> None:
        with written_whole(target) as place:
            place.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert dies(killed) == signal.SIGKILL
    assert target.read_text() == "old"
    (left,) = (path for path in tmp_path.iterdir() if path != target)
    assert left.match(".*.tmp"), "what a training's folder is cleaned of"


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with written_whole(target) as first, written_whole(target) as second:
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first", "the one that ended last"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_numbers_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("sync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), replace(*paths)))
    with written_whole(tmp_path / "file") as place:
        place.write_text("new")
        done.append("written")
    assert done == ["written", "sync", "rename"]


def test_others_can_read_it_where_they_can_read_other_files(tmp_path: Path) -> None:
    """Whatever the writer does: safetensors' own leaves files that only their owner can read."""
    (tmp_path / "plain").touch()
    with written_whole(tmp_path / "file.safetensors") as place:
        save_file({"x": torch.zeros(1)}, place)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_the_longest_names_have_room(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 255)
    with written_whole(target) as place:
        place.write_text("new")
    assert target.read_text() == "new"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "no" / "file"):
        raise AssertionError("nothing can be written")
