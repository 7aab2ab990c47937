"""Texts in every encoding that people's editors write, and what is no text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ipadapter_core.errors import CorruptFileError, InvalidInputError, quoted, reason
from ipadapter_core.files.text import (
    MAX_DEPTH,
    NotUnicodeError,
    check_length,
    decode_text,
    parse_json,
    read_bytes,
    read_json,
    read_text,
)

TEXT = "a cat’s café – 猫 😀"
MARKED = {"utf-8-sig", "utf-16", "utf-32"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_is_read_whatever_its_form(encoding: str) -> None:
    assert decode_text(TEXT.encode(encoding), "a.txt") == TEXT


def test_big_endian_with_a_mark() -> None:
    assert decode_text("\ufeffcat".encode("utf-16-be"), "a.txt") == "cat"


def test_several_marks_and_windows_line_ends() -> None:
    """`copy a.txt + b.txt` and PowerShell's Out-File of marked text leave two."""
    assert decode_text("\ufeff\ufeffa\r\nb\rc\n".encode("utf-16-le"), "a.txt") == "a\nb\nc\n"
    assert decode_text(b"", "a.txt") == ""
    assert decode_text(b"\xef\xbb\xbf", "a.txt") == ""


@pytest.mark.parametrize(
    ("encoding", "text"), [("cp1252", "a cat’s café"), ("shift_jis", "赤い猫"), ("cp1251", "кошка")]
)
def test_a_code_page_is_an_error_until_it_is_named(encoding: str, text: str) -> None:
    content = text.encode(encoding)
    with pytest.raises(NotUnicodeError, match=r"'a\.txt' is not UTF-8 \(byte \d+ is 0x"):
        decode_text(content, "a.txt")
    assert decode_text(content, "a.txt", encoding) == text
    assert decode_text("naïve".encode(), "a.txt", encoding) == "naïve", "UTF-8 comes first"


def test_half_a_character_and_unknown_encodings() -> None:
    with pytest.raises(NotUnicodeError, match="no utf-16-le at byte"):
        decode_text("\ufeffcat".encode("utf-16-le") + b"\x00", "a.txt")
    with pytest.raises(InvalidInputError, match="there is no encoding 'klingon'"):
        decode_text(b"\xff\x41", "a.txt", "klingon")


def test_what_is_no_plain_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    for name in ("pipe", "loop", "gone", "/dev/zero", "a\0b", "x" * 5000, "."):
        with pytest.raises(InvalidInputError) as caught:
            read_text(tmp_path / name)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)
        assert "\0" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_text(tmp_path / "missing.txt")


def test_a_file_far_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CorruptFileError, match="1,099,511,627,776 bytes"):
        read_bytes(tmp_path / "large", limit=1000)


@pytest.mark.parametrize("encoding", sorted(MARKED))
def test_json_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('{"text": "猫"}'.encode(encoding))
    assert read_json(tmp_path / "a.json") == {"text": "猫"}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 60_000,
        "1" * 5000,
        "[1e400, NaN]",
        "Infinity",
        "{",
        "",
        '{"a": 1,}',
        "[" * 201 + "]" * 201,
    ],
)
def test_json_fails_in_one_sentence(text: str) -> None:
    with pytest.raises(CorruptFileError) as caught:
        parse_json(text, "list.json")
    assert len(str(caught.value)) < 300


def test_brackets_inside_strings_are_text() -> None:
    assert parse_json('["' + "[" * 1000 + '\\"[", 1]', "a.json")[1] == 1
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep, "a.json")


def test_messages_show_little_of_a_strangers_text() -> None:
    assert quoted("a\nb\x1b[31m\0") == r"'a\nb\x1b[31m\x00'"
    assert quoted("猫\ud800") == r"'猫\ud800'"
    assert len(quoted("x" * 10**7)) == 83
    assert len(quoted("\x00" * 10**7)) <= 83
    shown = reason(ValueError("one\n two\x07" + "x" * 10**6))
    assert shown.startswith(r"ValueError: one two\x07")
    assert len(shown) <= 160


def test_length_limits_name_both_numbers() -> None:
    assert check_length("abc", "selector", 3) == "abc"
    with pytest.raises(InvalidInputError, match=r"selector has 10,000,000 characters; at most 10,000 can be used"):
        check_length("x" * 10**7, "selector", 10_000)


def test_long_paths_are_cut_at_their_beginning(tmp_path: Path) -> None:
    """Two files in one long folder must not give one message."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    (folder / "a.json").write_bytes(b"caf\xe9")
    (folder / "b.json").write_text("[")
    for name, read, message in (
        ("a.json", read_json, "is not UTF-8"), ("b.json", read_json, "is not valid JSON"), ("c.json", read_text, "does not exist"),
    ):  # fmt: skip
        with pytest.raises((CorruptFileError, FileNotFoundError), match=f"^'…[a-z]+/{name}' {message}"):
            read(folder / name)
    assert quoted("x" * 90 + "y") == f"'{'x' * 80}…'"
