"""IPAdapterUnifiedLoader and its siblings, IPAdapterModelLoader."""

from __future__ import annotations

from typing import Any

from ...ipadapter_core import ENCODERS, AdapterSpec, InvalidInputError
from ...ipadapter_core.backends.comfy import comfy_layout
from ...ipadapter_core.known_files import base_of, choose_encoder, choose_file, known_file
from .. import host
from .pipeline import LegacyAdapter, pack, understand
from .sockets import ADAPTER, MODEL, Inputs, LegacyNode, choice


class IPAdapterModelLoader(LegacyNode):
    REPLACEMENT = "Load IP-Adapter"
    RETURN_TYPES = ("IPADAPTER",)
    FUNCTION = "load_ipadapter_model"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"ipadapter_file": (host.adapter_files(),)}}

    @classmethod
    def IS_CHANGED(cls, ipadapter_file: str) -> str:
        return host.adapter_fingerprint(ipadapter_file)

    def load_ipadapter_model(self, ipadapter_file: str) -> tuple[Any, ...]:
        return (LegacyAdapter(host.load_ip_adapter(ipadapter_file)),)


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

    def load_models(self, model: Any, preset: str, ipadapter: Any = None) -> tuple[Any, ...]:
        file = find_adapter(model, preset)
        adapter = host.load_ip_adapter(file)
        insightface = understand(ipadapter).insightface if ipadapter is not None else None
        clip_file = find_encoder(adapter.weights.spec, file)
        return model, pack(adapter, file, host.load_clip_vision(clip_file), clip_file, insightface, None)


class IPAdapterUnifiedLoaderCommunity(IPAdapterUnifiedLoader):
    PRESETS = ("Composition", "Kolors")


def find_adapter(model: Any, preset: str) -> str:
    """The file of a preset for this model. Raises InvalidInputError that names what is missing and where it belongs."""
    entry = known_file(preset, base_of(comfy_layout(model).token_dim))
    files = host.adapter_files()
    file = choose_file(entry, files, host.describe_file)
    if file is None:
        seen = f"found there: {', '.join(files[:8])}" if files else "that folder holds no adapter"
        raise InvalidInputError(
            f"no file for the preset {preset!r} in {host.folder_of(host.FOLDER)}; {seen}. Put {entry.release} there (any name "
            "will do if it is the only one of its kind), or choose a file with IPAdapter Model Loader"
        )
    return file


def find_encoder(spec: AdapterSpec, adapter: str) -> str:
    """The file of the image encoder that an adapter needs. Raises InvalidInputError like find_adapter()."""
    files = host.clip_vision_files()
    file = choose_encoder(spec, files, host.clip_vision_widths)
    if file is None:
        known = ENCODERS.get(spec.encoder)
        wanted = f"{known.name}: {', or '.join(known.files)}" if known else "the encoder that it was trained with"
        raise InvalidInputError(
            f"{adapter} needs an image encoder that {host.folder_of('clip_vision')} does not hold: {wanted}. "
            f"Found there: {', '.join(files[:8]) or 'nothing'}"
        )
    return file
