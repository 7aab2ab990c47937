"""What names and paths of strangers may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ipadapter_core.errors import InvalidInputError
from ipadapter_core.files.access import MAX_NAME, Places, check_local, listed_folders, plain_name, plain_path

NAMES = (
    "my-adapter", "my adapter", "v1.2", "Müller", "猫", "🦊", "👨‍👩‍👧", "مى\u200cخواهم", "a" * MAX_NAME, "x.earlier-1", "console", "com",
    "(a) {b} 'c' & $d %year%", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
)  # fmt: skip
NO_NAMES = (
    "", " ", "\t", "a\nb", "a\0b", "a\x7fb", "a\x85b", "a\u2028b", "a\u202eb", "\ud800", "../up", "..", ".", "a/b", "a\\b", "/etc/passwd",
    "C:x", "a:stream", "-rf", "--help", ".hidden", " a", "a ", "a.", "[x]*", "a?", "a*", "[input]", "x [output]", '"a"', "a|b", "a<b", "a>b",
    "con", "CON.txt", "nul", "aux.safetensors", "com1", "LPT9.x", "com¹", "CONIN$", "a" * (MAX_NAME + 1), "🦊" * 60,
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_people(name: str, tmp_path: Path) -> None:
    assert plain_name(name) == name
    (tmp_path / f"{name}-00001000-ema.safetensors.unfinished").touch()


@pytest.mark.parametrize("name", NO_NAMES)
def test_no_names(name: str) -> None:
    with pytest.raises(InvalidInputError, match="must be a plain file name") as error:
        plain_name(name)
    message = str(error.value)
    assert message.isprintable(), message
    assert len(message) < 400


def test_prefixes_are_paths_of_names() -> None:
    assert plain_path("a/b c/%year%", "filename_prefix") == "a/b c/%year%"
    assert plain_path("a\\b", "filename_prefix") == "a/b", "as Windows writes it"
    for bad in (
        "",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        "a/..",
        "\\\\host\\share",
        "C:\\x",
        "%date:yyyy%",
        "a" * 5000,
    ):
        with pytest.raises(InvalidInputError):
            plain_path(bad, "filename_prefix")


@pytest.mark.parametrize(
    "path",
    [
        "pipe:touch x",
        " PIPE:ls",
        "http://127.0.0.1/x.tar",
        "file:///etc/passwd",
        "s3://a",
        "a\0b",
        "a\nb",
        "\ud800",
        "x" * 5000,
    ],
)
def test_only_this_machine(path: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        check_local(path, "pictures")
    assert str(error.value).isprintable()


def test_a_path_stays_below_its_places(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "sub", outside, tmp_path / "inner"):
        folder.mkdir(parents=True)
    (outside / "secret.png").touch()
    (inside / "leads out").symlink_to(outside)
    (inside / "leads in").symlink_to(inside / "sub")
    (inside / "loop").symlink_to(inside / "loop")
    places = Places([inside], " (HINT)")
    for fine in (inside, inside / "sub", inside / "sub/none yet", inside / "leads in/x", inside / "loop"):
        assert places.check(fine, "pictures") == fine
    for bad in (
        outside, outside / "secret.png", inside / "../out", inside / "sub/../..", inside / "leads out", inside / "leads out/secret.png",
        tmp_path, tmp_path / "inner", "/", "//host/share", "\\\\host\\share", f"{inside}\\..\\..\\x", f"{inside}\0", f"{inside}/{'x' * 5000}/..",
    ):  # fmt: skip
        with pytest.raises(InvalidInputError, match="HINT"):
            places.check(bad, "pictures")


def test_the_owner_may_link_the_place_itself(tmp_path: Path) -> None:
    (tmp_path / "disk/sub").mkdir(parents=True)
    (tmp_path / "input").symlink_to(tmp_path / "disk")
    places = Places([tmp_path / "input"])
    assert places.check(tmp_path / "input/sub", "pictures") == tmp_path / "input/sub"
    assert places.check(tmp_path / "disk/sub", "pictures") == tmp_path / "disk/sub", "the same folder by its own name"


def test_names_outside_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places([tmp_path])
    looked: list[str] = []
    monkeypatch.setattr(os.path, "realpath", lambda path: looked.append(str(path)) or path)
    with pytest.raises(InvalidInputError):
        places.check("//host/share/x", "pictures")
    assert looked == []
    places.check(tmp_path / "x", "pictures")
    assert looked


def test_the_list_of_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert listed_folders("# mine\n\n  /data/pictures \r\n~/drawings\n") == ["/data/pictures", "/home/me/drawings"]
