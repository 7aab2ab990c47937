"""The Hub: the cache first, then the network, and one sentence where neither has it. No test goes to the network."""

# pyright: basic, reportPrivateImportUsage=false

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ipadapter_core import image_prompt
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.hub import HubPlace, described, file_on_disk, folder_on_disk, model_on_disk, nothing_fetched
from ipadapter_core.model_folders import load_pipeline
from tiny_folder import sd15_folder


class FakeHub:
    """Repositories as folders: ``there`` is what the Hub has, ``cached`` what was fetched."""

    def __init__(self, root: Path) -> None:
        self.there, self.cached, self.online = root / "there", root / "cached", True
        self.asked: list[str] = []

    def _fetch(self, repository: str, files: list[str], local_files_only: bool) -> Path:
        source, target = self.there / repository, self.cached / repository
        if not local_files_only:
            if not self.online:
                raise LocalEntryNotFoundError("cannot reach it and\nnothing is cached")
            if not source.is_dir():
                raise huggingface_hub.errors.RepositoryNotFoundError("404", response=_response())
            self.asked.append(repository)
            for name in files:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, target / name)
        return target

    def hf_hub_download(self, repo_id: str, filename: str, revision: Any = None, local_files_only: bool = False) -> str:
        there = self.there / repo_id
        if not local_files_only and self.online and there.is_dir() and not (there / filename).is_file():
            raise EntryNotFoundError(f"404 {filename}")
        found = self._fetch(repo_id, [filename], local_files_only) / filename
        if not found.is_file():
            raise LocalEntryNotFoundError("not cached")
        return str(found)

    def snapshot_download(
        self, repo_id: str, *, allow_patterns: list[str], revision: Any = None, local_files_only: bool = False
    ) -> str:
        from fnmatch import fnmatch

        source = self.there / repo_id
        names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        wanted = [name for name in names if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        return str(self._fetch(repo_id, wanted, local_files_only))


def _response() -> Any:
    from unittest.mock import MagicMock

    return MagicMock()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])
    return fake


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_folder(tmp_path_factory)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("h94/IP-Adapter", HubPlace("h94/IP-Adapter")),
        ("h94/IP-Adapter:models/a.bin", HubPlace("h94/IP-Adapter", "models/a.bin")),
        ("h94/IP-Adapter@refs/pr/2:models", HubPlace("h94/IP-Adapter", "models", "refs/pr/2")),
        ("/h94/IP-Adapter", None),
        ("a/b/c", None),
        ("a.safetensors", None),
        ("C:/models/a.bin", None),
        ("C:\\models\\a.bin", None),
        ("h94/IP-Adapter:../a.bin", None),
        ("h94/IP-Adapter:/etc/passwd", None),
        ("../IP-Adapter:a", None),
        ("", None),
    ],
)
def test_what_names_a_place_on_the_hub(text: str, place: HubPlace | None) -> None:
    assert HubPlace.read(text) == place
    assert place is None or str(place) == text


def test_what_is_on_this_machine_is_never_looked_for(hub: FakeHub, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    for find in (file_on_disk, folder_on_disk, model_on_disk):
        assert find("owner/name") == Path("owner/name")
    assert file_on_disk("nowhere/a.safetensors") == Path(
        "nowhere/a.safetensors"
    )  # a path, of which loaders say the rest
    assert hub.asked == []


def test_the_cache_comes_first_and_the_network_once(hub: FakeHub) -> None:
    (hub.there / "me/adapters/models").mkdir(parents=True)
    (hub.there / "me/adapters/models/a.bin").write_bytes(b"weights")
    for _ in range(2):
        assert file_on_disk("me/adapters:models/a.bin").read_bytes() == b"weights"
    assert hub.asked == ["me/adapters"]
    hub.online = False
    assert file_on_disk("me/adapters:models/a.bin").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("name", "online", "said"),
    [
        ("me/none:a.bin", True, "nothing on this machine, and the Hub has no such repository"),
        ("me/there:b.bin", True, "has not what 'me/there:b.bin' names"),
        ("me/there:folder", True, "has not what 'me/there:folder' names"),
        ("me/there:a.bin", False, r"out of reach .*\(hf download me/there a\.bin\)"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(hub: FakeHub, name: str, online: bool, said: str) -> None:
    (hub.there / "me/there").mkdir(parents=True)
    (hub.there / "me/there/a.bin").write_bytes(b"")
    hub.online = online
    with pytest.raises(InvalidInputError, match=said) as caught:
        folder_on_disk(name)
    assert "\n" not in str(caught.value)


def test_an_adapter_and_its_encoder_come_from_the_hub(hub: FakeHub, folder: Path, monkeypatch: Any) -> None:
    shutil.copytree(folder / "image_encoder", hub.there / "maker/encoder")
    (hub.there / "me/adapters").mkdir(parents=True)
    shutil.copy(folder / "adapter.safetensors", hub.there / "me/adapters")
    pipeline = load_pipeline(folder)
    monkeypatch.setattr(pipeline, "image_encoder", None)
    picture = folder / "a.png"
    arguments: dict[str, Any] = {"encoder": "maker/encoder"}
    image_prompt(pipeline, "me/adapters:adapter.safetensors", picture, **arguments).remove()
    assert hub.asked == ["me/adapters", "maker/encoder"]
    hub.online = False
    image_prompt(pipeline, "me/adapters:adapter.safetensors", picture, **arguments).remove()
    with pytest.raises(InvalidInputError, match="needs its image encoder"):
        image_prompt(pipeline, "me/adapters:adapter.safetensors", picture)


def test_a_published_encoder_is_fetched_for_adapters_of_the_hub_alone(
    hub: FakeHub, folder: Path, monkeypatch: Any
) -> None:
    from dataclasses import replace

    from ipadapter_core.features import ENCODERS

    known = replace(ENCODERS["ViT-H/14"], hidden_size=32, projection_dim=24)
    monkeypatch.setitem(ENCODERS, "ViT-H/14", known)
    shutil.copytree(folder / "image_encoder", hub.there / "h94/IP-Adapter/models/image_encoder")
    shutil.copy(folder / "adapter.safetensors", hub.there / "h94/IP-Adapter/models")
    pipeline = load_pipeline(folder)
    monkeypatch.setattr(pipeline, "image_encoder", None)
    local = hub.there / "alone.safetensors"
    shutil.copy(folder / "adapter.safetensors", local)
    with pytest.raises(InvalidInputError, match="needs its image encoder"):
        image_prompt(pipeline, local, folder / "a.png")
    assert hub.asked == []
    image_prompt(pipeline, "h94/IP-Adapter:models/adapter.safetensors", folder / "a.png").remove()
    assert hub.asked == ["h94/IP-Adapter"] * 2
    image_prompt(pipeline, local, folder / "a.png").remove()  # which is in the cache now
    assert hub.asked == ["h94/IP-Adapter"] * 2


def test_a_pipeline_is_fetched_by_diffusers_own_rule(hub: FakeHub, folder: Path, monkeypatch: Any) -> None:
    from diffusers import DiffusionPipeline

    calls: list[dict[str, Any]] = []

    def download(name: str, **arguments: Any) -> str:
        calls.append({"name": name, **arguments})
        if arguments.get("local_files_only"):
            raise OSError("not cached")
        return str(folder)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert model_on_disk("maker/model") == folder
    assert [call.get("local_files_only", False) for call in calls] == [True, False]
    assert all(call["use_safetensors"] is True for call in calls)
    assert not any(call.get("trust_remote_code") for call in calls)


def test_descriptions_have_no_weights(hub: FakeHub, folder: Path) -> None:
    shutil.copytree(folder, hub.there / "maker/model")
    found = described("maker/model")
    assert (found / "model_index.json").is_file()
    assert not list(found.rglob("*.safetensors"))


def test_a_transformers_file_is_described_with_all_but_the_transformer(
    hub: FakeHub, folder: Path, monkeypatch: Any
) -> None:
    from diffusers import DiffusionPipeline

    shutil.copytree(folder, hub.there / "maker/model")
    (hub.there / "maker/model/unet").rename(hub.there / "maker/model/transformer")
    calls: list[dict[str, Any]] = []

    def download(name: str, **arguments: Any) -> str:
        calls.append(arguments)
        return str(hub.there / name)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert described("maker/model") == hub.there / "maker/model"
    assert all(call["transformer"] is None for call in calls)


def test_what_strangers_name_is_not_fetched(hub: FakeHub) -> None:
    (hub.there / "me/adapters").mkdir(parents=True)
    (hub.there / "me/adapters/a.bin").write_bytes(b"")
    with nothing_fetched(), pytest.raises(InvalidInputError, match="not fetched unasked"):
        file_on_disk("me/adapters:a.bin")
    assert hub.asked == []
    file_on_disk("me/adapters:a.bin")
    with nothing_fetched():
        assert file_on_disk("me/adapters:a.bin").is_file()


def test_a_name_that_leads_nowhere_is_told_at_once(hub: FakeHub, monkeypatch: Any) -> None:
    """Without a connection the library asks six times, for half a minute, and says so each time."""

    def nowhere(*_: object) -> None:
        raise OSError(-2, "Name or service not known")

    (hub.there / "me/adapters").mkdir(parents=True)
    (hub.there / "me/adapters/a.bin").write_bytes(b"")
    monkeypatch.setattr("socket.getaddrinfo", nowhere)
    monkeypatch.setattr("ipadapter_core.hub.getproxies", dict)
    with pytest.raises(InvalidInputError, match=r"out of reach .*Name or service not known"):
        file_on_disk("me/adapters:a.bin")
    assert hub.asked == []
    monkeypatch.setattr("ipadapter_core.hub.getproxies", lambda: {"https": "proxy:3128"})
    assert file_on_disk("me/adapters:a.bin").is_file()


def test_the_command_inspects_what_is_on_the_hub(
    hub: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ipadapter_core.commands.cli import main

    (hub.there / "me/adapters").mkdir(parents=True)
    shutil.copy(folder / "adapter.safetensors", hub.there / "me/adapters")
    assert main(["inspect", "me/adapters:adapter.safetensors"]) == 0
    assert "image tokens   4" in capsys.readouterr().out
    hub.online = False
    assert main(["inspect", "me/adapters:other.safetensors"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
