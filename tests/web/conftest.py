"""One editor per host and session, on the servers that all host tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from host.comfy_server import ComfyServer

if TYPE_CHECKING:
    from web.browser import Editor


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("host.servers")


@pytest.fixture(scope="session")
def editor(server: ComfyServer) -> Iterator[Editor]:
    """The host's editor in Chromium, without errors so far. Without Chromium or playwright the test says so and skips."""
    pytest.importorskip("playwright", reason="no playwright: pip install playwright (its browsers are not needed)")
    from web import browser

    if browser.CHROMIUM is None:
        pytest.skip("no Chromium: apt install chromium, or name one in $IMAGE_PROMPT_CHROMIUM")
    with browser.editor(server) as opened:
        yield opened
