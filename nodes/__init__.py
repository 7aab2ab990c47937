"""The one list of node classes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import host
from .apply_adapter_to_model import ApplyAdapterToModel
from .combine_image_prompts import CombineImagePrompts
from .encode_image_prompt import EncodeImagePrompt
from .inspect_adapter import InspectAdapter
from .legacy import LEGACY_NODES
from .load_ip_adapter import LoadIPAdapter
from .schedule_adapter import AdapterSchedule

NODES: list[type[io.ComfyNode]] = [
    LoadIPAdapter,
    EncodeImagePrompt,
    CombineImagePrompts,
    ApplyAdapterToModel,
    AdapterSchedule,
    InspectAdapter,
]


class ImagePromptExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def comfy_entrypoint() -> ImagePromptExtension:
    host.register_model_folder()
    host.register_nodes(LEGACY_NODES)
    return ImagePromptExtension()
