from collections.abc import Callable
from typing import Any, ClassVar

from aiohttp import web

class PromptServer:
    instance: ClassVar[PromptServer]
    routes: web.RouteTableDef
    def send_progress_text(self, text: str, node_id: str) -> None: ...
    def add_on_prompt_handler(self, handler: Callable[[dict[str, Any]], dict[str, Any]]) -> None: ...
