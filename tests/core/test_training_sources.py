"""Folders, lists, tables and shards as people have them: every encoding, every spelling of names, damage, and hostile headers."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipadapter_core.errors import AdapterError, CorruptFileError, InvalidInputError
from ipadapter_core.features import PixelSpec
from ipadapter_core.training.captions import MAX_CAPTION
from ipadapter_core.training.collection import Collection, Findings, Sample, collect, group, hold_out, look
from ipadapter_core.training.config import DataConfig
from ipadapter_core.training.encode import Encoders
from ipadapter_core.training.order import Order
from ipadapter_core.training.sources import open_source
from ipadapter_core.training.stream import Stream
from tiny_training import picture, tiny_config

TEXT = "a cat’s café"


def data(path: Path | str, **more: Any) -> DataConfig:
    return DataConfig(path=str(path), min_side=16, resolution=32, **more)


def png(number: int = 0) -> bytes:
    out = io.BytesIO()
    picture(number).save(out, "PNG")
    return out.getvalue()


def gathered(path: Path | str, **more: Any) -> Collection:
    config = data(path, **more)
    source = open_source(config)
    return collect(look(source, config), config, str(path), source.notes)


def captions(path: Path | str, **more: Any) -> dict[str, str]:
    return {sample.name: sample.caption for sample in gathered(path, **more).samples}


def save(folder: Path, **files: bytes | str) -> Path:
    """Files by stem and extension: `a_txt` is a.txt."""
    folder.mkdir(exist_ok=True)
    for number, (name, content) in enumerate(files.items()):
        path = folder / name.replace("_", ".")
        path.write_bytes(png(number) if content == "" else content if isinstance(content, bytes) else content.encode())
    return folder


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


# --- captions ------------------------------------------------------------------------------------------------------------


def encoded() -> dict[str, bytes]:
    return {
        "plain": TEXT.encode(),
        "marked": b"\xef\xbb\xbf" + TEXT.encode(),
        "utf16": TEXT.encode("utf-16"),
        "big": b"\xfe\xff" + TEXT.encode("utf-16-be"),
        "unmarked": TEXT.encode("utf-16-le"),
        "utf32": TEXT.encode("utf-32"),
        "lines": b"\r\n " + TEXT.encode() + b" \r\n",
    }


def holders(folder: Path, texts: dict[str, bytes]) -> dict[str, str]:
    """The same captions beside pictures, in a shard, and in a shard that is streamed."""
    folder.mkdir()
    members: dict[str, bytes] = {}
    for number, (name, content) in enumerate(texts.items()):
        members |= {f"{name}.png": png(number), f"{name}.txt": content}
    for name, content in members.items():
        (folder / name).write_bytes(content)
    tar = shard(folder.parent / "a.tar", members)
    return {"folder": str(folder), "shard": str(tar), "stream": f"pipe:cat {tar}"}


@pytest.mark.parametrize("holder", ["folder", "shard", "stream"])
def test_captions_of_every_encoding_are_the_text(tmp_path: Path, holder: str) -> None:
    found = captions(holders(tmp_path / "p", encoded())[holder])
    assert set(found.values()) == {TEXT}
    assert len(found) == len(encoded())


@pytest.mark.parametrize("holder", ["folder", "shard", "stream"])
def test_what_is_not_utf_8_is_counted_named_and_left_out(tmp_path: Path, holder: str) -> None:
    texts = {
        "win": TEXT.encode("cp1252"),
        "jp": "猫が座る".encode("shift_jis"),
        "cut": "猫".encode()[:2],
        "fine": b"a cat",
    }
    path = holders(tmp_path / "p", texts)[holder]
    collection = gathered(path)
    assert [sample.caption for sample in collection.samples] == ["a cat"]
    said = collection.findings.describe()
    assert "3 with a caption that cannot be used, skipped" in said
    assert 'data.caption_encoding = "cp1252"' in said
    assert all(f"{name}.txt' is not UTF-8" in said for name in ("win", "jp", "cut"))
    read = captions(path, caption_encoding="cp1252")
    assert TEXT in read.values()
    assert "a cat" in read.values(), "UTF-8 stays UTF-8"


@pytest.mark.parametrize("name", ["cp9999", "base64", "a\0b", "undefined"])
def test_unknown_encodings_are_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match=r"data\.caption_encoding is .*no encoding of text"):
        open_source(data(save(tmp_path / "p", a_png=""), caption_encoding=name))


def test_empty_long_and_special_captions(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "p", a_png="", a_txt=" \r\n\t ", b_png="", b_txt="x" * (MAX_CAPTION + 1), c_png="", c_txt=b"x" * 2_000_000,
        d_png="", e_png="", e_txt="two\r\nlines",
    )  # fmt: skip
    os.mkfifo(folder / "d.txt")
    collection = gathered(folder)
    assert {sample.name: sample.caption for sample in collection.samples} == {"a.png": "", "e.png": "two\nlines"}
    assert collection.findings.uncaptioned == ["'a.png'"]
    too_long, too_large, pipe = collection.findings.captions
    assert "'b.txt' has a text of 20,001 characters; at most 20,000" in too_long
    assert "c.txt' has 2,000,000 bytes" in too_large
    assert "d.txt' is no plain file" in pipe


VALUES = {
    7: "7", 2.5: "2.5", True: "True", "  a cat ": "a cat", None: "", float("nan"): "", 10**300: "1" + "0" * 300,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["json", "jsonl", "shard", "datasets"])
def test_values_that_are_no_text(tmp_path: Path, kind: str) -> None:
    values: list[Any] = [*VALUES, ["a", "b"], {"en": "a"}, "half \ud800"]
    if kind == "datasets":  # whose columns have one type each
        import datasets

        for column, expected in (([7, None, 9], ["7", "", "9"]), ([2.5, float("nan")], ["2.5", ""]), ([["a"], ["b"]], [])):  # fmt: skip
            table = datasets.Dataset.from_dict({"image": [png(i) for i in range(len(column))], "text": column})
            folder = tmp_path / f"d{len(column)}{len(expected)}"
            table.cast_column("image", datasets.Image()).save_to_disk(str(folder))
            if expected:
                assert list(captions(folder).values()) == expected
            else:
                with pytest.raises(InvalidInputError, match="has a list where its text should be"):
                    captions(folder)
        return
    for number in range(len(values)):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    entries = [{"image_file": f"{n}.png", "text": value} for n, value in enumerate(values)]
    path = tmp_path / f"a.{kind}"
    if kind == "json":
        path.write_text(json.dumps(entries))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(entry) for entry in entries))
    else:
        members = {f"{n}.json": json.dumps(entry).encode() for n, entry in enumerate(entries)}
        path = shard(tmp_path / "a.tar", members | {f"{n}.png": png(n) for n in range(len(values))})
    collection = gathered(path)
    assert [sample.caption for sample in collection.samples] == list(VALUES.values())
    assert len(collection.findings.captions) == 3
    assert "has a list where its text should be" in collection.findings.captions[0]


# --- folders -------------------------------------------------------------------------------------------------------------


def test_all_endings_and_captions_of_any_case(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "p", a_jfif="", a_TXT="1", B_PNG="", b_Caption="2", c_JPE="", c_txt="3", d_AVIF="", d_CAPTION="4",
        E_png="", e_png="", e_txt="5",
    )  # fmt: skip
    assert captions(folder) == {"a.jfif": "1", "B.PNG": "2", "c.JPE": "3", "d.AVIF": "4", "e.png": "5", "E.png": ""}


def test_linked_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", x_png="", x_txt="far")
    (elsewhere / "deep").mkdir()
    save(elsewhere / "deep", y_png="")
    folder = save(tmp_path / "p", a_png="", b_png=png(7))
    (folder / "real").mkdir()
    save(folder / "real", r_png="")
    for name, target in (
        ("linked", elsewhere), ("again", elsewhere), ("loop", folder), ("up", tmp_path), ("root", "/"), ("z", folder / "real"),
        ("gone", tmp_path / "nowhere"),
    ):  # fmt: skip
        (folder / name).symlink_to(target)
    (elsewhere / "back").symlink_to(elsewhere)
    (folder / "l.png").symlink_to(elsewhere / "x.png")
    (folder / ".hidden").mkdir()
    save(folder / ".hidden", h_png="")
    save(folder, **{"._a_png": "", ".a_png": ""})
    found = captions(folder)
    assert sorted(found) == ["a.png", "again/deep/y.png", "again/x.png", "b.png", "l.png", "real/r.png"]


def test_everything_else_is_counted(tmp_path: Path) -> None:
    folder = save(tmp_path / "p", a_png="", a_txt="x", b_pdf="x", c_pdf="x", d_mp4="x", readme_txt="x", LICENSE="x")
    (folder / "a\nb.\x1b[31m").write_bytes(b"")
    (folder / "10_cat").mkdir()
    save(folder / "10_cat", q_png="")
    said = gathered(folder).findings.describe()
    assert said.splitlines()[-3:] == [
        "1 text files without a picture, not read: 'readme.txt'",
        "5 other files, not read: 2 '.pdf', 1 without an extension, 1 '.\\x1b[31m', 1 '.mp4'",
        "folders named as for kohya's repeats ('10_cat'): the numbers have no effect here, every picture is seen once per epoch",
    ]
    assert all(line.isprintable() for line in said.splitlines())


def test_special_files_and_names_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "p", a_png="")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(folder / "link.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "x\nFAKE LINE.png").write_bytes(b"no picture")
    (folder / os.fsdecode(b"\xff\xfe.png")).write_bytes(png(3))
    collection = gathered(folder)
    assert len(collection.samples) == 2
    assert len(collection.findings.unreadable) == 4
    assert "x\\nFAKE LINE.png" in collection.findings.describe()


def test_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "p", a_png="")
    (tmp_path / "l.json").write_text(json.dumps([{"image_file": "~/p/a.png"}]))
    assert list(captions("~/p")) == ["a.png"]
    assert list(captions("~/l.json")) == ["~/p/a.png"]


# --- lists ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "semicolons.csv", "tsv", "metadata.jsonl", "metadata.csv"])
def test_lists_of_every_kind_and_encoding(tmp_path: Path, kind: str, encoding: str) -> None:
    folder = save(tmp_path / "p", a_png="", b_png="", more_png="", b_txt="beside")
    separator = {"tsv": "\t", "semicolons.csv": ";"}.get(kind, ",")
    if "json" in kind:
        rows = [{"file_name": "a.png", "text": TEXT}, {"file_name": "b.png"}, {"file_name": "gone.png", "text": "x"}]
        text = json.dumps(rows, ensure_ascii=False) if kind == "json" else "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)  # fmt: skip
    else:
        text = "\r\n".join(separator.join(row) for row in (("file_name", "text"), ("a.png", f'"{TEXT}"'), ("b.png", ""), ("gone.png", "x")))  # fmt: skip
    name = kind if "metadata" in kind else f"list.{kind}"
    (folder / name).write_bytes(text.encode(encoding))
    path = folder if "metadata" in kind else folder / name
    if encoding == "cp1252":
        with pytest.raises(CorruptFileError, match=r"is not UTF-8 .*data\.caption_encoding = \"cp1252\""):
            captions(path)
    collection = gathered(path, caption_encoding="cp1252")
    expected = {"a.png": TEXT, "b.png": "beside" if "json" in kind else ""}
    assert {sample.name: sample.caption for sample in collection.samples} == expected
    assert len(collection.findings.unreadable) == 1
    assert "gone.png' does not exist" in collection.findings.unreadable[0]
    assert any("does not list, left out: 'more.png'" in note for note in collection.findings.notes) == ("metadata" in kind)  # fmt: skip


def test_tables_without_captions_take_those_beside(tmp_path: Path) -> None:
    folder = save(tmp_path / "p", a_png="", a_txt="one", b_png="", metadata_csv="file_name,size\na.png,3\nb.png,4\n")
    assert captions(folder) == {"a.png": "one", "b.png": ""}
    (folder / "metadata.csv").write_text('file_name,text\na.png,7\nb.png,"two\nlines, one cell"\n')
    assert captions(folder) == {"a.png": "7", "b.png": "two\nlines, one cell"}


def test_lists_of_windows_and_of_other_places(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, place in enumerate(("in/a.png", "b.png")):
        (tmp_path / place).write_bytes(png(number))
    (tmp_path / "lists").mkdir()
    names = ["..\\in\\a.png", str(tmp_path / "b.png"), "../b.png", "C:\\gone.png", "x" * 5000, "a\0b.png"]
    path = tmp_path / "lists/l.json"
    path.write_text(json.dumps([{"image_file": name, "subject": None, "reference_file": None} for name in names]))
    collection = gathered(path)
    assert [sample.name for sample in collection.samples] == names[:3]
    assert [sample.subject for sample in collection.samples] == ["", "", ""], "null is no subject named None"
    assert len(collection.findings.unreadable) == 3
    assert all(len(problem) < 400 and problem.isprintable() for problem in collection.findings.unreadable)


# --- shards --------------------------------------------------------------------------------------------------------------


def test_members_that_are_no_files_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in (("a.png", png()), ("a.txt", b"a cat"), ("._a.png", b"x"), ("b.mp3", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in (("s.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.png", tarfile.CHRTYPE), ("f.png", tarfile.FIFOTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    collection = gathered(path)
    assert [(sample.name, sample.caption) for sample in collection.samples] == [("a.tar/a", "a cat")]
    assert collection.findings.notes == ["6 other members of shards, not read: 5 'links, devices or hidden', 1 '.mp3'"]
    streamed = gathered(f"pipe:cat {path}")
    assert [(sample.name, sample.caption) for sample in streamed.samples] == [("a.tar/a", "a cat")]


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"0" * 11 + b"\0" + b" " * 8 + kind)  # fmt: skip
    block = bytearray(bytes(block).ljust(512, b"\0"))
    block[257:265] = b"ustar\x0000"
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


HUGE = b"\x80" + (2**60).to_bytes(11, "big")
HOSTILE = {
    "a picture of 2^60 bytes": header(b"a.png", HUGE),
    "a caption of 2^60 bytes": header(b"a.png", b"0") + header(b"a.txt", HUGE),
    "a header of 2^60 bytes": header(b"x", HUGE, b"x"),
    "a long name of 2^60 bytes": header(b"x", HUGE, b"L"),
    "a global header of 8 MB": header(b"x", b"40000000", b"g") + bytes(2**23),
    "a negative size": header(b"a.png", b"\xff" * 12),
    "a size that is no number": header(b"a.png", b"9x9"),
    "fields that are none": header(b"x", b"00000000020", b"x") + b"99 x".ljust(512, b"\0"),
    "a sparse map that is none": header(b"x", b"26", b"x") + b"22 GNU.sparse.major=1\n".ljust(512, b"\0") + header(b"a.png", b"4") + b"rubb".ljust(512, b"\0"),
    "nothing": b"",
    "zeros": bytes(10240),
    "text": b"no tar at all",
    "compressed": b"\x1f\x8b\x08" + bytes(20),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers_are_one_sentence(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a\x1b[31m.tar"
    path.write_bytes(HOSTILE[what])
    for place in (path, f"pipe:cat '{path}'"):
        with pytest.raises(AdapterError) as raised:
            gathered(place)
        assert str(raised.value).isprintable(), place
        assert len(str(raised.value)) < 500


def test_compressed_shards_say_so(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(save(tmp_path / "p", a_png="") / "a.png", "a.png")
    with pytest.raises(CorruptFileError, match="compressed shards cannot be read at random, unpack it first"):
        gathered(tmp_path / "a.tar")
    assert list(captions(f"pipe:cat {tmp_path}/a.tar")) == ["a.tar/a"], "streams can be compressed"


def test_texts_in_shards_that_cannot_be_used(tmp_path: Path) -> None:
    pairs = {
        "deep": b"[" * 100_000, "long": b'{"text": "' + b"x" * 2_000_000 + b'"}', "digits": b'{"text": ' + b"9" * 5000 + b"}",
        "list": b'{"text": ["a"]}', "fine": b'{"text": "fine", "subject": 7, "similarity": NaN}',
    }  # fmt: skip
    members: dict[str, bytes] = {}
    for number, (name, content) in enumerate(pairs.items()):
        members |= {f"{name}.png": png(number), f"{name}.json": content}
    members |= {"both.png": png(9), "both.json": b"[" * 100_000, "both.txt": b"both"}
    path = shard(tmp_path / "a.tar", members)
    for place in (path, f"pipe:cat {path}"):
        collection = gathered(place)
        assert {sample.name: sample.caption for sample in collection.samples} == {
            "a.tar/fine": "fine",
            "a.tar/both": "both",
        }
        assert [sample.subject for sample in collection.samples] == ["7", ""]
        assert len(collection.findings.captions) == 4


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_shards_raise_our_error_or_are_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(DAMAGED)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from([0, 512, 1024, len(content) - 3000])) + data.draw(st.integers(0, 511))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    path.write_bytes(content)
    messages: list[str] = []
    try:
        config = DataConfig(path=str(path))
        source = open_source(config)
        messages += [one.problem for one in look(source, config)] + list(source.notes)
    except CorruptFileError as error:
        messages.append(str(error))
    assert all(message.isprintable() for message in messages)


def _damaged() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (
            ("ünïcode/a.png", png()),
            ("ünïcode/a.json", b'{"text": "a"}'),
            ("b" * 120 + ".png", png()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


DAMAGED = _damaged()


def test_streams_leave_out_captions_that_cannot_be_used(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number, text in enumerate((b"one", "naïve".encode("cp1252"), b"two")):
        members |= {f"{number}.png": png(number), f"{number}.txt": text}
    path = shard(tmp_path / "a.tar", members)
    config = tiny_config(tmp_path, f"pipe:cat {path}", tmp_path / "out", watch__validation=0)  # type: ignore[arg-type]
    encoders: Any = object.__new__(Encoders)
    encoders.pixels = PixelSpec(28, (0.5,) * 3, (0.5,) * 3)
    stream = Stream(config, encoders, lambda texts: [[len(texts[0])]], 0, 1)
    records = list(open_source(config.data))
    for record, text in zip(records, ("one", None, "two"), strict=True):
        assert record.caption == text
        if text is None:
            with pytest.raises(CorruptFileError, match=r"1\.txt' is not UTF-8"):
                stream.item(record, (0, 0), 0)
        else:
            assert stream.item(record, (0, 0), 0).tokens == (len(text),)


# --- holding out ---------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    copies=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    validation=st.integers(0, 40),
    batch=st.integers(1, 5),
)
def test_whole_different_pictures_are_held_out_or_none(copies: list[int], validation: int, batch: int) -> None:
    samples = [
        Sample(f"{number}-{copy}", f"key {number}", "", (32, 32))
        for number, n in enumerate(copies)
        for copy in range(n)
    ]
    config = data("x")
    training, chosen, unseen = hold_out(group(samples, Findings(), config), validation, config)
    kept, held = {s.key for s in training.samples}, {s.key for s in chosen}
    assert kept
    assert len(held) == len(chosen) == min(validation, len(copies)), "no picture is validated on twice"
    if unseen:
        assert not kept & held
        assert 4 * len(held) <= len(copies)
        assert len(kept) == len(copies) - len(held)
    else:
        assert training.samples == samples
        assert validation == 0 or len(copies) < 4 * validation
    picks = Order(training, batch, 0, config).indices(3)
    assert len(picks) == batch
