from collections.abc import Callable
from typing import Any, ClassVar

class PromptServer:
    instance: ClassVar[PromptServer]
    def send_progress_text(self, text: str, node_id: str) -> None: ...
    def add_on_prompt_handler(self, handler: Callable[[dict[str, Any]], dict[str, Any]]) -> None: ...
