from . import io as io
from . import ui as ui

class _NodeReplacement:
    async def register(self, node_replace: io.NodeReplace) -> None: ...

class ComfyAPI:
    node_replacement: _NodeReplacement

class ComfyExtension:
    async def on_load(self) -> None: ...
    async def get_node_list(self) -> list[type[io.ComfyNode]]: ...
