"""IPAdapterUnifiedLoader and its siblings, IPAdapterModelLoader."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ...ipadapter_core import ENCODERS, AdapterSpec, InvalidInputError
from ...ipadapter_core.backends.comfy.doors import comfy_layout
from ...ipadapter_core.downloads import DOWNLOADS
from ...ipadapter_core.images.faces import PROVIDERS
from ...ipadapter_core.known_files import KnownFile, base_of, choose_encoder, choose_file, known_file
from .. import host
from .pipeline import LegacyAdapter, pack, understand
from .sockets import ADAPTER, MODEL, Inputs, LegacyNode, choice, number


class IPAdapterModelLoader(LegacyNode):
    REPLACEMENT = "Load IP-Adapter"
    RETURN_TYPES = ("IPADAPTER",)
    FUNCTION = "load_ipadapter_model"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"ipadapter_file": (host.files.names("ipadapter"),)}}

    @classmethod
    def IS_CHANGED(cls, ipadapter_file: str) -> str:
        return host.files.fingerprint("ipadapter", ipadapter_file)

    def load_ipadapter_model(self, ipadapter_file: str) -> tuple[Any, ...]:
        return (LegacyAdapter(host.adapters.load(ipadapter_file)),)


class IPAdapterUnifiedLoader(LegacyNode):
    REPLACEMENT = "Load IP-Adapter, and Load CLIP Vision"
    RETURN_TYPES = ("MODEL", "IPADAPTER")
    RETURN_NAMES = ("model", "ipadapter")
    FUNCTION = "load_models"
    PRESETS = (
        "LIGHT - SD1.5 only (low strength)",
        "STANDARD (medium strength)",
        "VIT-G (medium strength)",
        "PLUS (high strength)",
        "PLUS FACE (portraits)",
        "FULL FACE - SD1.5 only (portraits stronger)",
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"model": MODEL, "preset": choice(cls.PRESETS)}, "optional": {"ipadapter": ADAPTER}}

    def load_models(
        self, model: Any, preset: str, lora_strength: float = 0.0, provider: str = "CPU", ipadapter: Any = None
    ) -> tuple[Any, ...]:
        """Any preset of the three loaders, as other packs call it."""
        file = find_adapter(model, preset)
        adapter = host.adapters.load(file)
        spec = adapter.weights.spec
        entry = known_file(preset, base_of(comfy_layout(model).token_dim))
        if lora_strength != 0 and entry.lora:
            model = host.lora.apply_by_host(model, find_lora(entry, adapter), lora_strength)
        earlier = understand(ipadapter) if ipadapter is not None else None
        feature = spec.format.feature
        if feature.encoded is None:  # needs no image encoder; one that is there already is handed on
            clip_vision, clip_file = (None if earlier is None else earlier.clip_vision), None
        else:
            clip_file = find_encoder(spec, file)
            clip_vision = host.clip_vision.load(clip_file)
        if feature.embedding is not None:
            insightface, runs_on = host.faces.load("buffalo_l", provider), provider
        else:
            insightface, runs_on = (None if earlier is None else earlier.insightface), None
        return model, pack(adapter, file, clip_vision, clip_file, insightface, runs_on)


class IPAdapterUnifiedLoaderFaceID(IPAdapterUnifiedLoader):
    RETURN_NAMES = ("MODEL", "ipadapter")
    PRESETS = (
        "FACEID",
        "FACEID PLUS - SD1.5 only",
        "FACEID PLUS V2",
        "FACEID PORTRAIT (style transfer)",
        "FACEID PORTRAIT UNNORM - SDXL only (strong)",
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": MODEL,
                "preset": choice(cls.PRESETS),
                "lora_strength": number(0.6, 0.0, 1.0, 0.01),
                "provider": choice(PROVIDERS),
            },
            "optional": {"ipadapter": ADAPTER},
        }


class IPAdapterInsightFaceLoader(LegacyNode):
    REPLACEMENT = "Load Face Model"
    RETURN_TYPES = ("INSIGHTFACE",)
    FUNCTION = "load_insightface"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"provider": choice(["CPU", "CUDA", "ROCM"])},
            "optional": {"model_name": choice(host.faces.PACKS)},  # since 2024-08-02
        }

    def load_insightface(self, provider: str, model_name: str = "buffalo_l") -> tuple[Any, ...]:
        return (host.faces.load(model_name, provider),)


class InsightFaceLoader(IPAdapterInsightFaceLoader):
    """The loader of before 2024-03-23."""

    FUNCTION = "load_insight_face"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"provider": choice(["CPU", "CUDA", "ROCM"])}}

    def load_insight_face(self, provider: str) -> tuple[Any, ...]:
        return self.load_insightface(provider)


def find_lora(entry: KnownFile, adapter: host.adapters.ManagedAdapter) -> dict[str, Tensor]:
    """The LoRA that belongs to a FaceID adapter: the file beside it that people have, else the one inside it."""
    files = [
        name for name in host.files.names("loras") if re.search(rf"({entry.lora})\.safetensors$", name, re.IGNORECASE)
    ]
    if files:
        return host.lora.load_tensors(files[0])
    weights = adapter.weights
    if weights.lora:
        return weights.loadable_lora()
    raise InvalidInputError(
        f"{weights.name} carries no LoRA, and {host.files.folder_of('loras')} holds none for it: put "
        f"{DOWNLOADS[entry.release.replace('.bin', '_lora.safetensors')].where} there, or set lora_strength to 0"
    )


class IPAdapterUnifiedLoaderCommunity(IPAdapterUnifiedLoader):
    PRESETS = ("Composition", "Kolors")


def find_adapter(model: Any, preset: str) -> str:
    """The file of a preset for this model. Raises InvalidInputError that names what is missing and where it belongs."""
    entry = known_file(preset, base_of(comfy_layout(model).token_dim))
    files = host.files.names("ipadapter")
    file = choose_file(entry, files, host.adapters.describe)
    if file is None:
        seen = f"found there: {', '.join(files[:8])}" if files else "that folder holds no adapter"
        raise InvalidInputError(
            f"no file for the preset {preset!r} in {host.files.folder_of('ipadapter')}; {seen}. Put {entry.download.where} there (any "
            "name will do if it is the only one of its kind), or choose a file with IPAdapter Model Loader"
        )
    return file


def find_encoder(spec: AdapterSpec, adapter: str) -> str:
    """The file of the image encoder that an adapter needs. Raises InvalidInputError like find_adapter()."""
    files = host.files.names("clip_vision")
    file = choose_encoder(spec, files, host.clip_vision.widths)
    if file is None:
        known = ENCODERS.get(spec.encoder)
        wanted = f"{known.name}: {', or '.join(known.files)}" if known else "the encoder that it was trained with"
        raise InvalidInputError(
            f"{adapter} needs an image encoder that {host.files.folder_of('clip_vision')} does not hold: {wanted}. "
            f"Found there: {', '.join(files[:8]) or 'nothing'}"
        )
    return file
