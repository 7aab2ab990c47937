"""Fixtures of every test that needs a running ComfyUI: one server per host and session.

A plugin rather than a conftest, so that tests/host and tests/workflows share the same servers.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from host.comfy_server import ComfyServer, Host, find_hosts
from host.shrunk import build_checkpoint

HOSTS = find_hosts()
newest = pytest.mark.parametrize(
    "server", HOSTS[:1] or [None], indirect=True, ids=lambda host: host.name if host else "no-comfyui"
)
"""A test that shows nothing more on an older host."""
# ComfyUI's own Python has no diffusers; trainings run with the tests'
os.environ.setdefault("IPADAPTER_TRAIN_PYTHON", sys.executable)


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """Folder that keeps the generated checkpoints between sessions; $IMAGE_PROMPT_TEST_CACHE moves it."""
    default = Path(tempfile.gettempdir()) / f"ipadapter-studio-models-{os.environ.get('USER', 'tests')}"
    folder = Path(os.environ.get("IMAGE_PROMPT_TEST_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def server_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Host], ComfyServer]]:
    """Gives a host's running server, started when it is first asked for; all end with the session.

    A fixture with the hosts as ``params`` holds one of them at a time: under ``--dist loadfile``, where a worker takes file
    after file and every file asks for all hosts, it would start each of them in each file, for eight seconds.
    """
    with ExitStack() as running:

        @cache
        def start(host: Host) -> ComfyServer:
            return running.enter_context(ComfyServer(host, tmp_path_factory.mktemp(host.name)))

        yield start


@pytest.fixture(scope="session", params=HOSTS or [None], ids=lambda host: host.name if host else "no-comfyui")
def server(request: pytest.FixtureRequest, server_of: Callable[[Host], ComfyServer]) -> ComfyServer:
    """A running ComfyUI with our pack and the test pack; the test runs once per host found."""
    host: Host | None = request.param
    if host is None:
        pytest.skip("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")
    return server_of(host)


@pytest.fixture(scope="session")
def sd15(server: ComfyServer, model_cache: Path) -> str:
    """Name of a shrunk SD1.5 checkpoint (real topology, 16 cross-attention layers) on the server."""
    return server.add_model("checkpoints", build_checkpoint("sd15", model_cache))


@pytest.fixture(scope="session")
def sd15_small(server: ComfyServer, model_cache: Path) -> str:
    """Name of a smaller SD1.5-class checkpoint (7 cross-attention layers, two resolutions) on the server."""
    return server.add_model("checkpoints", build_checkpoint("sd15_small", model_cache))


@pytest.fixture(scope="session")
def sdxl_small(server: ComfyServer, model_cache: Path) -> str:
    """Name of a shrunk SDXL-class checkpoint (Segmind-Vega-like, 16 cross-attention layers) on the server."""
    return server.add_model("checkpoints", build_checkpoint("sdxl_small", model_cache))


@pytest.fixture(scope="session")
def sdxl(server: ComfyServer, model_cache: Path) -> str:
    """Name of a shrunk SDXL checkpoint (real topology, 70 cross-attention layers, 570 MB) on the server."""
    return server.add_model("checkpoints", build_checkpoint("sdxl", model_cache))


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for tiny adapter files; each is built once per session."""
    return tmp_path_factory.mktemp("adapters")
