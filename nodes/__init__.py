"""The one list of node classes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..ipadapter_core import AdapterError
from ..ipadapter_core.legacy.migrate import REPLACEMENTS
from . import host
from .apply_adapter_to_model import ApplyAdapterToModel
from .apply_face_lora import ApplyFaceLoRA
from .apply_image_to_model import ApplyImageToModel
from .apply_tiled_image import ApplyTiledImageToModel
from .combine_image_prompts import CombineImagePrompts
from .demo_world import DemoWorld
from .encode_face_prompt import EncodeFacePrompt
from .encode_image_prompt import EncodeImagePrompt
from .extract_lora import ExtractLoRA
from .inspect_adapter import InspectAdapter
from .inspect_lora import InspectLoRA
from .legacy import LEGACY_NODES
from .load_face_model import LoadFaceModel
from .load_image_encoder import LoadImageEncoder
from .load_image_prompt import LoadImagePrompt
from .load_ip_adapter import LoadIPAdapter
from .load_models import LoadImagePromptModels
from .lora_rows import LoRARows
from .lora_stack import LoRAStack
from .lora_strength import LoRAStrength
from .noise_image import NoiseImage
from .preview_region import PreviewRegion
from .record_attention import RecordAttention
from .save_image_prompt import SaveImagePrompt
from .save_lora import SaveLoRA
from .schedule_adapter import AdapterSchedule
from .show_attention import ShowAttention
from .train_ip_adapter import TrainIPAdapter
from .train_lora import TrainLoRA

NODES: list[type[io.ComfyNode]] = [
    LoadIPAdapter,
    EncodeImagePrompt,
    CombineImagePrompts,
    SaveImagePrompt,
    LoadImagePrompt,
    NoiseImage,
    ApplyAdapterToModel,
    ApplyImageToModel,
    ApplyTiledImageToModel,
    AdapterSchedule,
    InspectAdapter,
    PreviewRegion,
    RecordAttention,
    ShowAttention,
    LoadFaceModel,
    EncodeFacePrompt,
    ApplyFaceLoRA,
    LoRAStrength,
    LoRAStack,
    LoRARows,
    InspectLoRA,
    SaveLoRA,
    ExtractLoRA,
    TrainIPAdapter,
    TrainLoRA,
    LoadImageEncoder,
    LoadImagePromptModels,
    DemoWorld,
]

for node in NODES:
    host.inputs.check_inputs(node, "execute")
for old_node, _ in LEGACY_NODES.values():
    host.inputs.check_inputs(old_node, old_node.FUNCTION)


class ImagePromptExtension(ComfyExtension):
    async def on_load(self) -> None:
        await host.frontend.register_replacements(REPLACEMENTS)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def comfy_entrypoint() -> ImagePromptExtension:
    host.files.register_folders()
    host.frontend.name_errors_shortly([AdapterError])
    host.routes.register()
    if host.frontend.wants_old_names():
        host.frontend.register_nodes(LEGACY_NODES)
    return ImagePromptExtension()
