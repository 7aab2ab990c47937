"""ComfyUI entry point of the image-prompt pack; everything else is in nodes/ and ipadapter_core/."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
