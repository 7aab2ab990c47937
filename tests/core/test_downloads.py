"""The table of public files: whole addresses, and every file that this pack names is in it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest

from ipadapter_core.downloads import DOWNLOADS, TWINS, Download, find_download
from ipadapter_core.known_files import KNOWN_FILES

FOLDERS = {
    "ipadapter", "clip_vision", "checkpoints", "diffusion_models", "text_encoders", "vae", "loras", "insightface/models"
}  # fmt: skip


@pytest.mark.parametrize("download", DOWNLOADS.values(), ids=lambda download: download.name)
def test_an_address_is_whole(download: Download) -> None:
    url = urlsplit(download.url)
    assert (url.scheme, url.query, url.fragment) == ("https", "", "")
    assert download.folder in FOLDERS
    assert re.fullmatch(r"[\w.+-]+\.(safetensors|bin|zip)", download.name)
    if url.hostname == "huggingface.co":
        assert re.fullmatch(r"/[\w.-]+/[\w.-]+/resolve/main/[\w./-]+", url.path)
    else:
        assert url.hostname == "github.com"
        assert "/releases/download/" in url.path
    there = url.path.rsplit("/", 1)[-1]
    assert there.rsplit(".", 1)[-1] == download.name.rsplit(".", 1)[-1], "another kind of file is downloaded"
    assert download.comes_as == ("" if there == download.name else there)
    assert download.url in download.where


def test_a_name_stands_for_one_file() -> None:
    assert len({download.url for download in DOWNLOADS.values()}) == len(DOWNLOADS)
    assert all(name == download.name for name, download in DOWNLOADS.items())


def test_every_known_adapter_can_be_downloaded() -> None:
    for entry in KNOWN_FILES:
        assert entry.download.folder == "ipadapter", entry.release
        if entry.lora:
            assert entry.release.replace(".bin", "_lora.safetensors") in DOWNLOADS
    for pickle, twin in TWINS.items():
        assert DOWNLOADS[pickle].name.endswith(".bin")
        assert DOWNLOADS[twin].name.endswith(".safetensors")


def test_a_file_is_found_by_its_name_in_any_folder() -> None:
    assert find_download("sd15/ip-adapter_sd15.safetensors") is DOWNLOADS["ip-adapter_sd15.safetensors"]
    assert find_download("sd15\\ip-adapter_sd15.safetensors") is DOWNLOADS["ip-adapter_sd15.safetensors"]
    assert find_download("my_adapter.safetensors") is None
