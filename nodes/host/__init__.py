"""Everything this pack asks of ComfyUI; no other file of the pack imports its modules (``comfy_api``'s schema aside).

Used by the names of its parts: ``host.adapters.apply(...)``, ``host.files.names("loras")``.
"""

from . import (
    access,
    adapters,
    by_need,
    clip_vision,
    demo,
    faces,
    files,
    frontend,
    inputs,
    lora,
    recording,
    routes,
    sampling,
    schema,
    training,
)

__all__ = [
    "access",
    "adapters",
    "by_need",
    "clip_vision",
    "demo",
    "faces",
    "files",
    "frontend",
    "inputs",
    "lora",
    "recording",
    "routes",
    "sampling",
    "schema",
    "training",
]
