"""Makes the shared ComfyUI servers available here."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("host.servers")
