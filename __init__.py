"""ComfyUI entry point of the image-prompt pack; everything else is in nodes/ and ipadapter_core/."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./nodes/web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
