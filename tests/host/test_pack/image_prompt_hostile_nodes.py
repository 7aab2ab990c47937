"""Test-only nodes: any value on a link, where ComfyUI checks nothing, and who answers HTTP. V1 style, which every version loads."""

from __future__ import annotations

import json

from comfy.comfy_types import IO
from server import PromptServer


class TestAnything:
    """The value of a JSON text, on a link that fits every input."""

    CATEGORY = "tests"
    RETURN_TYPES = (IO.ANY,)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    def make(self, text):
        return (json.loads(text),)


class TestRoutes:
    """Modules of all that answers HTTP: handlers of routes and middlewares."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def tell(self):
        app = PromptServer.instance.app
        handlers = [*(route.handler for route in app.router.routes()), *app.middlewares]
        return {"ui": {"text": sorted({str(getattr(handler, "__module__", "")) for handler in handlers})}}


NODE_CLASS_MAPPINGS = {"TestAnything": TestAnything, "TestRoutes": TestRoutes}
