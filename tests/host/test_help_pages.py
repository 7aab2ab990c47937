"""Every node of today has a help page, whose tables are what its schema says."""

from __future__ import annotations

import urllib.request

from host.comfy_server import PACK_NAME, ComfyServer
from host.help_pages import stale


def test_help_pages_say_what_the_schemas_say(server: ComfyServer) -> None:
    wrong = [path.name for path, _ in stale(server.object_info(), PACK_NAME)]
    assert wrong == [], "write missing pages, then run python tests/host/help_pages.py"
    with urllib.request.urlopen(f"{server.url}/extensions/{PACK_NAME}/docs/ImagePromptApply.md", timeout=60) as page:
        assert page.read().startswith(b"# Apply Adapter to Model")
