"""Opening files: every container, nothing run, nothing read in vain, one clear sentence for each kind of bad file."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from ipadapter_core import state_dict
from ipadapter_core.errors import CorruptFileError, InvalidInputError, UnsafeFileError
from ipadapter_core.state_dict import describe_state_dict, open_state_dict
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


def test_a_mapped_file_can_be_replaced_while_in_use(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    tensor = open_state_dict(path).tensors["w"]
    other = tmp_path / "b"
    other.write_bytes(save({"w": torch.zeros(1000)}))
    os.replace(other, path)
    assert tensor.sum() == 1000
