"""Opening files: every container, nothing run, nothing read in vain, one clear sentence for each kind of bad file."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from ipadapter_core.errors import AdapterError, CorruptFileError, InvalidInputError, UnsafeFileError
from ipadapter_core.files import pickles, state_dict
from ipadapter_core.files.state_dict import StoredTensors, describe_state_dict, open_state_dict, open_tensors
from tiny import nested, tiny_state


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("extension", ["safetensors", "sft", "bin"])
def test_safetensors_whatever_the_extension(tmp_path: Path, extension: str) -> None:
    state = tiny_state("plus", dtype=torch.float16)
    path = tmp_path / f"a.{extension}"
    save_file(state, path, metadata={"encoder": "x"})
    opened = open_state_dict(path)
    assert equal(opened.tensors, state)
    assert opened.metadata == {"encoder": "x"}
    assert opened.name == path.name
    assert open_state_dict(str(path), name="mine").name == "mine"


@pytest.mark.parametrize("extension", ["bin", "pt", "pth", "ckpt", "safetensors"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles_whatever_the_extension(tmp_path: Path, extension: str, zipped: bool) -> None:
    state = tiny_state("base", dtype=torch.bfloat16)
    path = tmp_path / f"a.{extension}"
    torch.save(nested(state), path, _use_new_zipfile_serialization=zipped)
    assert equal(open_state_dict(path).tensors, state)


def test_a_mapping_is_flattened_and_only_tensors_remain() -> None:
    x = torch.ones(2, requires_grad=True)
    file = open_state_dict({"a": {"b": {"c": x}, 3: torch.zeros(1)}, "epoch": 7, "names": ["x"], "none": None})
    assert set(file.tensors) == {"a.b.c", "a.3"}
    assert not file.tensors["a.b.c"].requires_grad
    assert file.tensors["a.b.c"].data_ptr() == x.data_ptr()  # no copy


@pytest.mark.parametrize("container", ["safetensors", "zip", "legacy", "mapping"])
def test_describe_gives_keys_shapes_and_dtypes(tmp_path: Path, container: str) -> None:
    state = {**tiny_state("base", dtype=torch.float16), "scalar": torch.tensor(1.0), "empty": torch.zeros(0, 3)}
    path = tmp_path / "a.file"
    if container == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container == "zip")
    described = describe_state_dict(state if container == "mapping" else path).tensors
    assert all(tensor.is_meta for tensor in described.values())
    assert {k: (t.shape, t.dtype) for k, t in described.items()} == {k: (t.shape, t.dtype) for k, t in state.items()}


def test_describing_safetensors_reads_the_header_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 TB of weights in a sparse file: whoever reads or allocates them does not come back
    rows, columns = 2**20, 2**19
    header = json.dumps({"w": {"dtype": "F16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}})
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2 * rows * columns)
    read = 0
    original = Path.open

    def counting(self: Path, *args: object, **kwargs: object) -> object:
        opened = original(self, *args, **kwargs)  # pyright: ignore
        bare = opened.read

        class Counted:
            def __enter__(self) -> Counted:
                return self

            def __exit__(self, *_: object) -> None:
                opened.close()

            def read(self, size: int) -> bytes:
                nonlocal read
                read += size
                return bare(size)

        return Counted()

    monkeypatch.setattr(Path, "open", counting)
    assert describe_state_dict(path).tensors["w"].shape == (rows, columns)
    assert 0 < read <= len(header) + 200


# --- pickles that carry code -------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("how", ["zip", "legacy", "protocol 2", "protocol 4", "protocol 5", "renamed", "nested"])
@pytest.mark.parametrize("read", [open_state_dict, describe_state_dict])
def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path: Path, how: str, read: object) -> None:
    target = tmp_path / "was here"
    path = tmp_path / ("evil.safetensors" if how == "renamed" else "evil.bin")
    content = {"image_proj": {"x": Bomb(target)}} if how == "nested" else {"x": Bomb(target), "w": torch.ones(2)}
    if how.startswith("protocol"):
        path.write_bytes(pickle.dumps(content, protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(UnsafeFileError) as caught:
        read(path)  # pyright: ignore
    assert not target.exists()
    message = str(caught.value)
    assert path.name in message
    assert "mkdir" in message
    assert "safetensors" in message
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists()  # the bomb was live


def test_torchscript_is_a_program(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UnsafeFileError, match=r"script\.pt is a TorchScript program"):
        open_state_dict(path)


def test_a_tar_dressed_as_a_pickle_never_reaches_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "old.pt"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("\x80storages"))
    assert path.read_bytes()[:1] == b"\x80"
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with pytest.raises(UnsafeFileError, match="tar archive"):
        open_state_dict(path)


# --- bad files ---------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "html": (b"\n <!DOCTYPE html><html><body>Log in</body></html>", "web page"),
    "html2": (b"<html>" + b"x" * 100, "web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
    "json": (b'{"error": "Repository not found"}', "JSON"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 44642768\n", "git lfs pull"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 100, "GGUF"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 100, "gzip"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "picture"),
    "noise": (bytes(range(200, 255)) * 3, "does not begin like"),
    "short": (b"\x10\0\0", "does not begin like"),
    "text": (b"hello there, this is not a model", "does not begin like"),
}


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("read", [open_state_dict, describe_state_dict])
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, kind: str, extension: str, read: object) -> None:
    content, word = BAD[kind]
    path = tmp_path / f"file.{extension}"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError) as caught:
        read(path)  # pyright: ignore
    message = str(caught.value)
    assert path.name in message
    assert word in message
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("keep", [9, 60, 0.5, 0.999])
@pytest.mark.parametrize("container", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("read", [open_state_dict, describe_state_dict])
def test_truncated_files(tmp_path: Path, container: str, keep: float, read: object) -> None:
    path = tmp_path / "a.bin"
    if container == "safetensors":
        save_file(tiny_state("plus"), path)
    else:
        torch.save(nested(tiny_state("plus")), path, _use_new_zipfile_serialization=container == "zip")
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if keep < 1 else int(keep)])
    with pytest.raises(CorruptFileError, match=r"a\.bin.*download it again"):
        read(path)  # pyright: ignore


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


HEADERS: dict[str, tuple[object, bytes]] = {
    "cut JSON": (b'{"w": {"dtype"', b""),
    "deep JSON": (b'{"w": ' + b"[" * 100_000, b""),
    "huge number": (b'{"w": ' + b"9" * 5000 + b"}", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "entry is a number": ({"w": 1}, b""),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, b"abcd"),
    "shape of text": ({"w": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}, b"abcd"),
    "shape of bools": ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"abcd"),
    "negative shape": ({"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"abcd"),
    "three offsets": ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"abcd"),
    "backward offsets": ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"abcd"),
    "wrong size": ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"abcd"),
    "unknown dtype": ({"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, b"abcd"),
    "dtype is a list": ({"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"abcd"),
    "more data than said": ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"abcdefgh"),
    "zero times infinity": ({"w": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b""),
    "beyond 64 bits": ({"w": {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}}, b""),
    "exabytes": ({"w": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}}, b"abcd"),
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("read", [open_state_dict, describe_state_dict])
def test_damaged_safetensors_headers(tmp_path: Path, kind: str, read: object) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(*HEADERS[kind]))
    with pytest.raises(CorruptFileError, match=r"a\.safetensors"):
        read(path)  # pyright: ignore


def test_overlapping_tensors_are_refused_on_opening(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path.write_bytes(safetensors_bytes({"a": entry, "b": entry}, b"abcd"))
    with pytest.raises(CorruptFileError, match=r"a\.safetensors"):
        open_state_dict(path)


def test_metadata_that_is_not_text_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path.write_bytes(safetensors_bytes({"__metadata__": {"a": "b", "c": 1}, "w": entry}, b"abcd"))
    assert describe_state_dict(path).metadata == {"a": "b"}


def test_metadata_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path.write_bytes(safetensors_bytes({"__metadata__": {"\ud800": "a\udc00b 猫"}, "w": entry}, b"abcd"))
    opened = open_state_dict(path)
    save_file(opened.tensors, path, opened.metadata)
    assert open_state_dict(path).metadata == {"?": "a?b 猫"}


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.bin does not exist.*folder exists"):
        open_state_dict(tmp_path / "no.bin")
    with pytest.raises(FileNotFoundError, match="its folder does not exist either"):
        open_state_dict(tmp_path / "no" / "no.bin")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"is a folder.*x\.safetensors"):
        open_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (torch.ones(3), "single tensor"),
        ([torch.ones(3)], "holds a list"),
        ({"w": torch.ones(2, 2).to_sparse()}, "sparse"),
        ({"w": torch.ones(1).expand(10**12)}, "declares"),
        ({"w": torch.empty(5, device="meta")}, "meta tensors"),
    ],
    ids=["tensor", "list", "sparse", "expanded", "meta"],
)
def test_pickles_of_something_else(tmp_path: Path, content: object, word: str) -> None:
    path = tmp_path / "a.bin"
    torch.save(content, path)
    with pytest.raises(CorruptFileError, match=word):
        open_state_dict(path)


def test_pickles_that_never_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_dict, "MAX_ENTRIES", 1000)
    cycle: dict[str, object] = {}
    cycle["again"] = cycle
    layers: dict[str, object] = {"x": 1}
    for _ in range(7):
        layers = {str(n): layers for n in range(100)}  # 100^7 leaves in a few kilobytes
    wide = {f"k{n}": 0 for n in range(1001)}
    for name, content in {"cycle": cycle, "laughs": layers, "wide": wide}.items():
        path = tmp_path / f"{name}.bin"
        torch.save(content, path)
        with pytest.raises(CorruptFileError, match=name):
            open_state_dict(path)


def test_zip_archives_that_are_not_torchs(tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CorruptFileError, match=r"without PyTorch weights.*readme\.txt"):
        open_state_dict(other)
    saved, packed = tmp_path / "saved.bin", tmp_path / "packed.bin"
    torch.save({"w": torch.zeros(1000)}, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in source.namelist():
            archive.writestr(member, source.read(member))
    with pytest.raises(CorruptFileError, match="compressed again"):
        open_state_dict(packed)


def test_a_file_can_be_replaced_while_in_use(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    tensor = open_state_dict(path).tensors["w"]
    other = tmp_path / "b"
    other.write_bytes(save({"w": torch.zeros(1000)}))
    os.replace(other, path)
    assert tensor.sum() == 1000


@pytest.mark.parametrize("container", ["safetensors", "zip", "legacy"])
def test_a_file_can_be_truncated_in_place_while_in_use(tmp_path: Path, container: str) -> None:
    """Of a mapped file, looking at the numbers then would end the process (SIGBUS)."""
    path = tmp_path / "a.bin"
    state = {"w": torch.ones(100_000)}
    if container == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container == "zip")
    tensor = open_state_dict(path).tensors["w"]
    os.truncate(path, 0)
    assert tensor.sum() == 100_000


def test_tensors_read_one_at_a_time(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.bin")
    for source in (state, tmp_path / "a.safetensors", tmp_path / "a.bin"):
        stored = StoredTensors(source)
        assert stored.described.tensors["a"].shape == (2, 3)
        assert equal({key: stored.read(key) for key in state}, state)


def test_a_file_that_changes_between_two_tensors_is_no_mixture(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    stored = StoredTensors(path)
    assert stored.read("a").sum() == 4
    save_file({"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(4)}, path)
    with pytest.raises(CorruptFileError, match="was changed while it was read"):
        stored.read("b")


# --- pickles, read as data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool, protocol: int) -> None:
    base = torch.arange(24.0)
    marked = torch.ones(2)
    marked.note = "attributes travel along"  # pyright: ignore
    state: dict[str, object] = {
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "buffer": torch.nn.Linear(2, 3).state_dict(),
        "views": {"a": base[3:9].view(2, 3), "b": base.view(4, 6).T, "all": base},
        "marked": marked,
        "types": {
            str(dtype): torch.ones(3).to(dtype)
            for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint16)
        },
        "complex": torch.ones(2, dtype=torch.complex64),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "grad": torch.ones(2, requires_grad=True),
        "others": [
            1,
            2.5,
            None,
            True,
            "x",
            b"bytes",
            (1, 2),
            {3},
            torch.Size([1]),
            torch.device("cpu"),
            torch.float16,
            2**70,
        ],
        "counted": collections.Counter("aab"),
        7: torch.ones(1),
        (1, 2): "a key of another kind",
    }
    path = tmp_path / "a.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    read = open_state_dict(path).tensors
    assert equal(read, {key: tensor.detach() for key, tensor in open_state_dict(state).tensors.items()})
    assert read["views.a"].untyped_storage().data_ptr() == read["views.all"].untyped_storage().data_ptr()
    assert not any(tensor.requires_grad for tensor in read.values())
    described = describe_state_dict(path).tensors
    assert {k: (t.shape, t.dtype) for k, t in described.items()} == {k: (t.shape, t.dtype) for k, t in read.items()}


def archive(path: Path, pickled: bytes, **data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickled)
        for key, content in data.items():
            file.writestr(f"a/data/{key[1:]}", content)
    return path


def tensor_pickle(count: int, shape: int, stride: int = 1, offset: int = 0) -> bytes:
    """``{"w": tensor}`` as torch.save writes it, with sizes of one's own."""
    number = struct.Struct("<ci").pack
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(b"J", count) + b"tQ"
    view = number(b"J", offset) + number(b"J", shape) + b"\x85" + number(b"J", stride) + b"\x85"
    return b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89NtRs."


def test_the_pickle_written_by_hand_is_one(tmp_path: Path) -> None:
    assert equal(open_state_dict(archive(tmp_path / "a.bin", tensor_pickle(2, 2), d0=struct.pack("<2f", 1, 2))).tensors,
                 {"w": torch.tensor([1.0, 2.0])})  # fmt: skip


LIES = {
    "a storage larger than its bytes": tensor_pickle(2_000_000_000, 4),
    "a tensor larger than its storage": tensor_pickle(4, 1000),
    "strides beyond the storage": tensor_pickle(4, 4, 2),
    "an offset beyond the storage": tensor_pickle(4, 4, 1, 1),
    "a negative offset": tensor_pickle(4, 2, 1, -1),
    "a negative stride": tensor_pickle(4, 2, -1, 3),
    "one number shown without end": tensor_pickle(4, 2**31 - 1, 0),
}


@pytest.mark.parametrize("lie", LIES)
def test_sizes_that_the_bytes_do_not_justify(tmp_path: Path, lie: str) -> None:
    path = archive(tmp_path / "a.bin", LIES[lie], d0=bytes(16))
    for read in (open_state_dict, describe_state_dict):
        with pytest.raises(CorruptFileError, match=r"^a\.bin "):
            read(path)


def nest(opening: bytes, closing: bytes, depth: int) -> bytes:
    return b"\x80\x02}X\x01\0\0\0k" + opening * depth + closing * depth + b"s."


def doubled(step: bytes, times: int) -> bytes:
    """A nest whose every level holds the level below twice."""
    return b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + step for n in range(times))


BOMBS = {
    "a hash that takes for ever": b"\x80\x02})" + doubled(b"\x86", 60) + b"K\x01s.",
    "a text of a nest": b"\x80\x02c" + b"torch\nFloatStorage\n)" + doubled(b"\x86", 60) + b"R.",
    "a name of a nest": b"\x80\x04)" + doubled(b"\x86", 60) + b"X\x01\0\0\0x\x93.",
    "deep tuples as a key": b"\x80\x02})" + b"\x85" * 15_000 + b"K\x01s.",
    "deep lists": nest(b"]", b"a", 15_000),
    "deep tables": nest(b"}X\x01\0\0\0k", b"s", 15_000),
    "a number of a megabyte": b"\x80\x02}\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20 + b"K\x01s.",
    "a text longer than the file": b"\x80\x02\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "bytes longer than the file": b"\x80\x02\x8e" + struct.pack("<Q", 2**40) + b"abc.",
    "millions of steps": b"\x80\x02" + b"N0" * 25_001 + b".",
    "no end": b"\x80\x02}",
    "nothing on the stack": b"\x80\x02R.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "an instance": b"\x80\x02(ios\nsystem\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "attributes of a name": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
    "itself": b"\x80\x02}q\0X\x01\0\0\0kh\0s.",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare"])
def test_pickles_that_would_never_end(tmp_path: Path, bomb: str, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPCODES", 50_000)
    path = tmp_path / "a.bin"
    if zipped:
        archive(path, BOMBS[bomb])
    else:
        path.write_bytes(BOMBS[bomb])
    for read in (open_state_dict, describe_state_dict, open_tensors):
        if zipped and ("as a key" in bomb or "hash" in bomb):
            if read is not open_tensors:
                assert not read(path).tensors  # pyright: ignore
            continue
        with pytest.raises(AdapterError) as caught:
            read(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


def test_torch_never_sees_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "a.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    assert set(open_state_dict(tmp_path / "a.bin").tensors) == {"w"}


def test_archives_that_say_more_than_they_hold(tmp_path: Path) -> None:
    saved = io.BytesIO()
    torch.save({"w": torch.zeros(1000)}, saved)
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as file:
        for number in range(20_000):
            file.writestr(f"a/{'x' * 400}{number}", b"")
    with pytest.raises(CorruptFileError, match="more members"):
        open_state_dict(path)
    with zipfile.ZipFile(saved) as good, zipfile.ZipFile(path, "w") as file:
        for name in good.namelist():
            file.writestr(name, good.read(name))
        file.writestr("other/data.pkl", b"\x80\x02}.")
    with pytest.raises(CorruptFileError, match="without PyTorch weights"):
        open_state_dict(path)
    raw = bytearray(saved.getvalue())
    at = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"archive/data/0"))
    raw[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)  # the sizes of a member in the archive's list
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match="more than its"):
        open_state_dict(path)
    raw[at + 20 : at + 28] = struct.pack("<II", 4000, 4000)
    raw[at + 42 : at + 46] = struct.pack("<I", len(raw) - 40)  # where it lies
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match="does not lie inside"):
        open_state_dict(path)


# --- what a header may say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["twice", "gap", "flood", "numbers", "long"])
def test_headers_that_say_too_much(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    path = tmp_path / "a.safetensors"
    monkeypatch.setattr(state_dict, "MAX_ENTRIES", 1000)
    headers = {
        "twice": f'{{"w":{entry},"w":{entry}}}',
        "gap": '{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        "flood": "{" + ",".join(f'"{n}":{{}}' for n in range(1001)) + "}",
        "numbers": f'{{"w":{{"dtype":"F32","shape":[{"1," * 100_000}1],"data_offsets":[0,4]}}}}',
        "long": f'{{"w":{entry}}}',
    }
    if case == "long":
        monkeypatch.setattr(state_dict, "MAX_HEADER_BYTES", 20)
    path.write_bytes(safetensors_bytes(headers[case].encode(), b"abcd" * (2 if case == "gap" else 1)))
    for read in (open_state_dict, describe_state_dict):
        with pytest.raises(CorruptFileError) as caught:
            read(path)
        assert len(str(caught.value)) < 400


WILD_NAMES = ["a\nb", "a\x1b[31mb", "a\0b", "\x7f", "a\u2028b", "\ud800", "x" * 2000]


@pytest.mark.parametrize("key", WILD_NAMES, ids=ascii)
@pytest.mark.parametrize("container", ["safetensors", "zip", "mapping"])
def test_names_of_tensors_are_lines_of_text(tmp_path: Path, key: str, container: str) -> None:
    path = tmp_path / "a.bin"
    source: object = path
    if container == "safetensors":
        header = json.dumps({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
        path.write_bytes(safetensors_bytes(header.encode(), b"abcd"))
    elif container == "zip":
        torch.save({"n": {key: torch.ones(1)}}, path)
    else:
        source = {key: torch.ones(1)}
    with pytest.raises(CorruptFileError, match="no line of text") as caught:
        open_state_dict(source)  # pyright: ignore
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("read", [open_state_dict, describe_state_dict, open_tensors, StoredTensors])
def test_what_is_no_plain_file_is_refused_before_it_is_opened(tmp_path: Path, read: object) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "loop.bin").symlink_to(tmp_path / "loop.bin")
    (tmp_path / "gone.bin").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.bin").mkdir()
    for name in ("pipe.bin", "loop.bin", "gone.bin", "folder.bin", "/dev/zero", "nul\0.bin", "x" * 5000, "a/" * 2500):
        with pytest.raises((AdapterError, FileNotFoundError)) as caught:
            read(tmp_path / name)  # pyright: ignore
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600
