"""Everything this pack asks of ComfyUI: model folders, memory management, CLIP vision, attention."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import comfy.clip_vision
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import comfy.weight_adapter
import folder_paths
import numpy as np
import torch
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..ipadapter_core import (
    AdapterError,
    AdapterPatch,
    AdapterSpec,
    AdapterWeights,
    ImageFeatures,
    ImagePrompt,
    InvalidInputError,
    RegionMask,
    Rules,
    WeightSchedule,
    bake,
    describe_adapter,
    encode_image_prompt,
    load_adapter,
    rules_for,
)
from ..ipadapter_core.backends import comfy as backend
from ..ipadapter_core.backends import comfy_lora as lora_backend
from ..ipadapter_core.checkpoints import as_version
from ..ipadapter_core.faces import FaceAnalyzer, open_face_model
from ..ipadapter_core.lora import LoRAWeights, load_lora
from ..ipadapter_core.lora.patch import LoRAPatch, Mode, choose_mode
from ..ipadapter_core.state_dict import describe_state_dict
from ..ipadapter_core.training.config import parse_config, parse_overrides
from ..ipadapter_core.training.job import run_job

FOLDER = "ipadapter"


def register_model_folder() -> None:
    """Make ``models/ipadapter`` and ``output/ipadapter`` known, besides what others registered under the same name."""
    for base in (folder_paths.models_dir, folder_paths.get_output_directory()):
        path = os.path.join(base, FOLDER)
        if path not in folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))[0]:
            folder_paths.add_model_folder_path(FOLDER, path)
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | folder_paths.supported_pt_extensions)


def adapter_files() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


@dataclass(eq=False)
class ManagedAdapter:
    """An adapter whose weights ComfyUI's memory manager moves and unloads."""

    weights: AdapterWeights
    patcher: comfy.model_patcher.ModelPatcher

    def to_device(self) -> AdapterWeights:
        """The weights, on the compute device until the memory manager needs the room."""
        comfy.model_management.load_models_gpu([self.patcher])
        return self.weights


_LOADED: WeakValueDictionary[tuple[str, int, int], ManagedAdapter] = WeakValueDictionary()


def load_ip_adapter(file: str) -> ManagedAdapter:
    """One copy per file, however many nodes load it; a changed file is read again."""
    path = folder_paths.get_full_path_or_raise(FOLDER, file)
    stat = os.stat(path)
    key = (path, stat.st_mtime_ns, stat.st_size)
    adapter = _LOADED.get(key)
    if adapter is None:
        adapter = _LOADED[key] = manage(path, file)
    return adapter


def manage(source: str | Mapping[str, object], name: str) -> ManagedAdapter:
    """Load an adapter's file or state dict and hand its weights to the memory manager."""
    device = comfy.model_management.get_torch_device()
    half = comfy.model_management.should_use_fp16(device)
    weights = load_adapter(source, name=name, dtype=torch.float16 if half else torch.float32)
    # Plain modules in a plain patcher: dynamic (per-layer) loading buys nothing for layers that run once per prompt.
    patcher = comfy.model_patcher.ModelPatcher(
        weights.module, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )
    return ManagedAdapter(weights, patcher)


def of_version(adapter: ManagedAdapter, version: int) -> ManagedAdapter:
    """A FaceID Plus adapter read as version 1 or 2 (other families as they are); the weights are shared."""
    spec = adapter.weights.spec
    if spec.options.get("version") in (None, version):
        return adapter
    return ManagedAdapter(as_version(adapter.weights, version), adapter.patcher)


_DESCRIBED: dict[tuple[str, int, int], AdapterSpec | None] = {}


def describe_file(file: str) -> AdapterSpec | None:
    """What a file of the adapters' folder is, without its numbers; None if it is no adapter."""
    path = folder_paths.get_full_path_or_raise(FOLDER, file)
    stat = os.stat(path)
    key = (path, stat.st_mtime_ns, stat.st_size)
    if key not in _DESCRIBED:
        try:
            _DESCRIBED[key] = describe_adapter(path, name=file)
        except (AdapterError, OSError):
            _DESCRIBED[key] = None
    return _DESCRIBED[key]


def folder_of(kind: str) -> str:
    """Where files of a kind belong: the first folder of its name."""
    return folder_paths.get_folder_paths(kind)[0]


def clip_vision_files() -> list[str]:
    return folder_paths.get_filename_list("clip_vision")


def clip_vision_widths(file: str) -> tuple[int, int] | None:
    """Hidden size and projection width of an image encoder's file; None if it is none."""
    try:
        shapes = describe_state_dict(folder_paths.get_full_path_or_raise("clip_vision", file)).tensors
    except (AdapterError, OSError):
        return None
    hidden = next((t.shape[0] for k, t in shapes.items() if k.endswith("class_embedding")), None)
    width = next((t.shape for k, t in shapes.items() if k.endswith(("visual_projection.weight", "visual.proj"))), None)
    if hidden is None or width is None:
        return None
    return int(hidden), int(width[0] if width[1] == hidden else width[1])


_CLIP_VISION: WeakValueDictionary[tuple[str, int, int], Any] = WeakValueDictionary()


def load_clip_vision(file: str) -> Any:
    """ComfyUI's CLIP_VISION of a file, one copy however many nodes load it."""
    path = folder_paths.get_full_path_or_raise("clip_vision", file)
    stat = os.stat(path)
    key = (path, stat.st_mtime_ns, stat.st_size)
    model = _CLIP_VISION.get(key)
    if model is None:
        model = comfy.clip_vision.load(path)
        if model is None:
            raise InvalidInputError(f"{file} in models/clip_vision is no image encoder that ComfyUI knows")
        _CLIP_VISION[key] = model
    return model


def load_lora_tensors(file: str) -> dict[str, Tensor]:
    return comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", file), safe_load=True)


def apply_lora_by_host(model: Any, lora: dict[str, Tensor], strength: float) -> Any:
    """The model with a LoRA by ComfyUI's own loader."""
    return comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0)[0]


_FACE_MODELS: dict[tuple[str, str], FaceAnalyzer] = {}


def load_face_model(pack: str, provider: str) -> FaceAnalyzer:
    """A face model of ``models/insightface``, one copy per pack and provider."""
    key = (pack, provider)
    if key not in _FACE_MODELS:
        root = Path(folder_paths.models_dir) / "insightface"
        _FACE_MODELS[key] = open_face_model(root, pack, provider)
    return _FACE_MODELS[key]


def unique_save_path(prefix: str, extension: str) -> str:
    """A new file ``<prefix>_00001<extension>`` in the output folder."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    while os.path.exists(path := os.path.join(folder, f"{name}_{counter:05}{extension}")):
        counter += 1
    return path


def input_files(extensions: tuple[str, ...]) -> list[str]:
    """Files of these extensions anywhere below the input folder."""
    root = folder_paths.get_input_directory()
    found = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    return sorted(os.path.relpath(path, root) for path in found if path.endswith(extensions))


def input_path(name: str) -> str:
    return folder_paths.get_annotated_filepath(name)


def register_nodes(classes: Mapping[str, tuple[type, str]]) -> list[str]:
    """Add V1 node classes (with their display names) under names that nobody has taken; returns those taken.

    ComfyUI loads either V1 or V3 nodes of a pack, and a name that two packs declare goes to the one loaded last: a
    drop-in must not take a name from the pack it stands in for.
    """
    import nodes as host_nodes

    package = __name__.rsplit(".", 2)[0]  # this pack as ComfyUI imported it: its folder, dots written as _x_
    module = "custom_nodes." + os.path.basename(package.replace("_x_", "."))
    taken = [name for name in classes if name in host_nodes.NODE_CLASS_MAPPINGS]
    for name, (node, title) in classes.items():
        if name not in taken:
            node.RELATIVE_PYTHON_MODULE = module
            host_nodes.NODE_CLASS_MAPPINGS[name] = node
            host_nodes.NODE_DISPLAY_NAME_MAPPINGS[name] = title
    return taken


def adapter_fingerprint(file: str) -> str:
    stat = os.stat(folder_paths.get_full_path_or_raise(FOLDER, file))
    return f"{file} {stat.st_mtime_ns} {stat.st_size}"


class ClipVisionEncoder:
    """ComfyUI's CLIP_VISION as the core's ImageEncoder."""

    def __init__(self, clip_vision: Any) -> None:
        self._clip_vision = clip_vision
        model = clip_vision.model
        embeddings = getattr(getattr(model, "vision_model", None), "embeddings", None)
        if embeddings is None:
            raise InvalidInputError(
                f"the CLIP vision input is a {type(model).__name__}; image prompts need a CLIP or SigLIP vision model, such as "
                "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors in models/clip_vision"
            )
        self.hidden_size = int(embeddings.patch_embedding.weight.shape[0])
        projection = getattr(model.visual_projection, "weight", None)
        self.projection_dim = self.hidden_size if projection is None else int(projection.shape[0])
        self.image_size = int(clip_vision.image_size)
        self.mean = tuple(clip_vision.image_mean)
        self.std = tuple(clip_vision.image_std)
        self.name = f"CLIP vision model ({self.hidden_size} wide, {self.image_size} px)"

    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        comfy.model_management.load_models_gpu([self._clip_vision.patcher])
        pixels = pixel_values.to(self._clip_vision.load_device, torch.float32)
        _, penultimate, embeds, *_ = self._clip_vision.model(pixel_values=pixels, intermediate_output=-2)
        device = comfy.model_management.intermediate_device()
        return ImageFeatures(image_embeds=embeds.to(device), penultimate=penultimate.to(device))


def encode(adapter: ManagedAdapter, clip_vision: Any, images: Tensor, **options: Any) -> ImagePrompt:
    """encode_image_prompt with ComfyUI's encoder, memory manager and progress bar."""
    encoder = ClipVisionEncoder(clip_vision)
    rules = rules_for(options.pop("compatibility", "correct"))
    return encode_image_prompt(adapter.to_device(), encoder, images, progress=progress_bar(), rules=rules, **options)


def progress_bar() -> Callable[[int, int], None]:
    bars: list[comfy.utils.ProgressBar] = []

    def report(done: int, total: int) -> None:
        if not bars:
            bars.append(comfy.utils.ProgressBar(total))
        bars[0].update_absolute(done, total)

    return report


def show_in_node(text: str, node_id: str) -> None:
    """Let the frontend write ``text`` into the node: of the ui output it shows texts of a few core nodes only."""
    PromptServer.instance.send_progress_text(text, node_id)


def apply(
    model: Any,
    adapter: ManagedAdapter,
    prompt: ImagePrompt,
    schedule: WeightSchedule,
    mask: Tensor | None,
    rules: Rules | None = None,
) -> tuple[Any, AdapterPatch]:
    """Bake the prompt for this model and hook it onto a clone."""
    layout = backend.comfy_layout(model)
    rules = rules or rules_for("correct")
    region = None if mask is None else RegionMask.from_tensor(mask, clamp=not rules.stretched_masks)
    patch = bake(adapter.weights, prompt, layout, schedule, region, prepare=adapter.to_device, rules=rules)
    return backend.apply(model, patch, attention), patch


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """The host's attention, looked up at the call: launch options and other packs may replace it."""
    return comfy.ldm.modules.attention.optimized_attention(*args, **kwargs)


# --- LoRA --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class LoadedLoRA:
    """A LoRA file, shared by all nodes that name it."""

    weights: LoRAWeights


_LORAS: WeakValueDictionary[tuple[str, int, int], LoadedLoRA] = WeakValueDictionary()


def lora_files() -> list[str]:
    return folder_paths.get_filename_list("loras")


def lora_fingerprint(*files: str) -> str:
    stats = ((file, os.stat(folder_paths.get_full_path_or_raise("loras", file))) for file in files)
    return " ".join(f"{file} {stat.st_mtime_ns} {stat.st_size}" for file, stat in stats)


def lora_path(file: str) -> str:
    return folder_paths.get_full_path_or_raise("loras", file)


def checkpoint_files() -> list[str]:
    return folder_paths.get_filename_list("checkpoints")


def checkpoint_path(file: str) -> str:
    return folder_paths.get_full_path_or_raise("checkpoints", file)


def load_lora_file(file: str) -> LoadedLoRA:
    """One copy per file, however many nodes name it; a changed file is read again."""
    path = lora_path(file)
    stat = os.stat(path)
    key = (path, stat.st_mtime_ns, stat.st_size)
    found = _LORAS.get(key)
    if found is None:
        found = _LORAS[key] = LoadedLoRA(load_lora(path, name=file))
    return found


class MergedUpdates(comfy.weight_adapter.WeightAdapterBase):
    """All our LoRAs on one parameter, as the host's own kind of patch; it calls this whenever it patches the weight."""

    name = "image_prompt_lora"

    def __init__(self, loaded_keys: object, weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights  # the host may rebuild the patch from these two

    @classmethod
    def of(cls, parts: tuple[lora_backend.Part, ...]) -> MergedUpdates:
        return cls(set(), parts)

    @property
    def parts(self) -> tuple[lora_backend.Part, ...]:
        return self.weights

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: object,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: object = None,
    ) -> Tensor:
        change = lora_backend.merge_parts(weight.to(intermediate_dtype), self.parts)
        weight += function(strength * change).to(weight.dtype)
        return weight


def apply_lora(
    model: Any | None, clip: Any | None, loaded: LoadedLoRA, mode: Mode, **settings: Any
) -> tuple[Any | None, Any | None, str]:
    """A LoRA on clones of MODEL and CLIP, and a text that says what was done. ``settings`` are those of LoRAPatch."""
    placed = lora_backend.place(loaded.weights, model, None if clip is None else clip.cond_stage_model)
    patch = LoRAPatch(placed, **settings)
    lines = [placed.summary()]
    if model is not None and patch.strength != 0:
        choice = choose_mode([patch], mode, quantised=_quantised(model), offloaded=_offloaded(model))
        lines.append(f"runs {choice.mode}: {choice.reason}")
        if choice.mode == "live":
            model = lora_backend.apply_live(model, patch, attention)
        else:
            model = lora_backend.apply_merged(model, patch, ("unet",), MergedUpdates.of)
        lines.append(patch.selector.table(p.target for p in placed.of("unet")))
        lost = patch.selector.unmatched(p.target for p in placed.placements)
        if lost:
            lines.append(f"selector entries that match no layer of this LoRA: {', '.join(lost)}")
    if clip is not None and patch.strength_for("te1") != 0:
        clip = clip.clone()
        clip.patcher = lora_backend.apply_merged(clip.patcher, patch, ("te1", "te2", "te3"), MergedUpdates.of)
    return model, clip, "\n".join(lines)


def _quantised(model: Any) -> bool:
    return model.model_dtype().itemsize < 2


def _offloaded(model: Any) -> bool:
    states = (comfy.model_management.VRAMState.LOW_VRAM, comfy.model_management.VRAMState.NO_VRAM)
    dynamic = getattr(model, "is_dynamic", None)
    return comfy.model_management.vram_state in states or bool(dynamic is not None and dynamic())


def output_file(prefix: str, folder: str = "loras") -> str:
    """A new file name under output/loras, counted up as the host counts."""
    path, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, os.path.join(folder_paths.get_output_directory(), folder)
    )
    return os.path.join(path, f"{name}_{counter:05}_.safetensors")


def picture_tensor(picture: Any) -> Tensor:
    """A Pillow picture as an IMAGE, 1 y x c in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


# --- training ---------------------------------------------------------------------------------------------------------

INSIDE = "inside the base model's folder"
TRAIN_PYTHON = "IPADAPTER_TRAIN_PYTHON"
"""Environment variable: the Python that trains, where ComfyUI's own lacks diffusers and accelerate."""


def model_folders(marker: str, *kinds: str) -> dict[str, Path]:
    """Folders with a file `marker` right below models/<kind>, by name."""
    found: dict[str, Path] = {}
    for kind in kinds:
        for root in folder_paths.get_folder_paths(kind):
            for file in sorted(Path(root).glob(f"*/{marker}")):
                found.setdefault(file.parent.name, file.parent)
    return found


def base_models() -> dict[str, Path]:
    return model_folders("model_index.json", "diffusers")


def image_encoders() -> dict[str, Path]:
    return model_folders("config.json", "clip_vision", "diffusers")


def adapter_path(file: str) -> str:
    return folder_paths.get_full_path_or_raise(FOLDER, file)


def training_folder(name: str) -> Path:
    """Where a training of that name keeps its states: beside, not inside, the folder that Load IP-Adapter lists."""
    if not name or Path(name).name != name or name.startswith("."):
        raise InvalidInputError(f"name is {name!r}; it must be a plain file name such as my-adapter")
    return Path(folder_paths.get_output_directory()) / "ipadapter_training" / name


def pictures_folder(path: str) -> str:
    """A folder, list or shards as given, or inside ComfyUI's input directory."""
    if "://" in path or path.startswith("pipe:") or os.path.isabs(path):
        return path
    return os.path.join(folder_paths.get_input_directory(), path)


def save_pictures(images: Tensor, captions: list[str], folder: Path) -> str:
    """Images `b y x c` from the graph as a folder that a training reads."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        pixels = (image[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")
        (folder / f"{i:06d}.txt").write_text(captions[i if len(captions) > 1 else 0], encoding="utf-8")
    return str(folder)


def train(values: dict[str, dict[str, object]], changes: list[str], name: str, node_id: str) -> str:
    """Run a training in another process, with this node's progress bar and previews; returns the name to load it by."""
    config = parse_overrides(changes, parse_config(values, "Train IP-Adapter"))
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    report = _training_progress(node_id)
    result = run_job(
        config,
        python=os.environ.get(TRAIN_PYTHON) or sys.executable,
        on_event=report,
        check=comfy.model_management.throw_exception_if_processing_interrupted,
    )
    target = Path(folder_paths.get_output_directory()) / FOLDER / f"{name}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    shutil.copyfile(result, unfinished)
    os.replace(unfinished, target)
    return target.name


def _training_progress(node_id: str) -> Callable[[dict[str, Any]], None]:
    """Progress bar and previews, and in the node a line of text: what happened last, or how the losses stand."""
    texts: dict[str, str] = {}
    bar = comfy.utils.ProgressBar(1)
    preview: list[Any] = [None]

    def report(event: dict[str, Any]) -> None:
        shown = event.get("file") if event["event"] in ("sheet", "plot") else None
        if shown and os.path.isfile(shown):
            with Image.open(shown) as picture:
                preview[0] = ("PNG", picture.convert("RGB"), 1024)
        text = _in_words(event)
        if text:
            texts[event["event"]] = text
            show_in_node("\n".join(texts.values()), node_id)
        if "steps" in event:
            bar.update_absolute(event["step"], event["steps"], preview[0])
            preview[0] = None

    return report


def _in_words(event: dict[str, Any]) -> str:
    match event["event"]:
        case "note":
            return event["text"]
        case "step":
            left = (event["steps"] - event["step"]) * event["seconds_per_step"] / 60
            return f"step {event['step']} of {event['steps']}, loss {event['loss']:.4f}, {left:.0f} minutes left"
        case "validation":
            gains = (
                f"{key.replace('_', ' ')} {event[key]:+.4f}" for key in ("image_gain", "reference_gain") if key in event
            )
            return f"validation {event['validation']:.4f}, {', '.join(gains)}"
        case _:
            return ""


def read_picture(path: Path) -> Tensor:
    """A picture as IMAGE `1 y x 3`; one grey pixel if there is none."""
    if not path.is_file():
        return torch.full((1, 1, 1, 3), 0.5)
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
