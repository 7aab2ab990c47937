"""How files spell modules: the one table of prefixes, and the one rule that makes names comparable.

Every trainer names a module by its path, with dots or underscores and a prefix of its own. Underscores cannot be turned
back into dots, so names are compared with underscores, against names made from the model (``targets.py``).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Component = Literal["denoiser", "te1", "te2", "te3"]
"""The denoiser (UNet or transformer) and the text encoders: CLIP-L, CLIP-G (or OpenCLIP-H), T5."""


class Prefix(NamedTuple):
    """What a key format puts before a module's name, the part of the model that it says, and the key format's name for people.

    ``key_format`` is "" where several key formats have the prefix; other signs of them tell them apart then (``_LAST_SIGNS``).
    """

    text: str
    part: Component
    key_format: str = ""


PREFIXES: tuple[Prefix, ...] = (
    Prefix("lycoris_", "denoiser", "SimpleTuner (LyCORIS)"),
    Prefix("lora_transformer_", "denoiser", "OneTrainer"),
    Prefix("lora_unet__", "denoiser", "kohya"),  # Wan-Fun's
    Prefix("lora_unet_", "denoiser", "kohya"),
    Prefix("lora_prior_unet_", "denoiser", "kohya"),  # Stable Cascade's stage C
    Prefix("lora_prior_te_", "te1", "kohya"),
    Prefix("lora_te1_", "te1", "kohya"),
    Prefix("lora_te2_", "te2", "kohya"),
    Prefix("lora_te3_", "te3", "kohya"),
    Prefix("lora_te_", "te1", "kohya"),
    Prefix("text_encoders.clip_l.", "te1"),
    Prefix("text_encoders.clip_h.", "te1"),
    Prefix("text_encoders.clip_g.", "te2"),
    Prefix("text_encoders.t5xxl.", "te3"),
    Prefix("text_encoders.", "te1"),  # others, by names of their own
    Prefix("text_encoder_2.", "te2"),
    Prefix("text_encoder_3.", "te3"),
    Prefix("text_encoder.", "te1"),
    Prefix("te1.", "te1"),
    Prefix("te2.", "te2"),
    Prefix("clip_l.", "te1"),  # the open model initiative's names, OneTrainer's until 2026
    Prefix("clip_h.", "te1"),
    Prefix("clip_g.", "te2"),
    Prefix("t5xxl.", "te3"),
    Prefix("t5.", "te3"),
    Prefix("unet.", "denoiser"),
    Prefix("transformer.", "denoiser"),
    Prefix("model.diffusion_model.", "denoiser"),
    Prefix("diffusion_model.", "denoiser"),
)
"""One that begins with another comes before it. Beyond that their order decides one thing: the first in a file names its key format."""

_WRAPPERS = ("base_model.model.", "module.", "lora.base_model.model.")
"""What PEFT and distributed training put in front of a model's names, and the Anima adapter in front of PEFT's."""

_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and checkpointing put before the name of any part they wrap."""

_NUMBERED = re.compile(r"^(?:ip_adapter\.)?(\d+)\.(to_[qkv]|to_out)$")


def canonical(stem: str) -> tuple[Component, str]:
    """Part and comparable name of a module: ``unet.down_blocks.0.….to_out`` → ``denoiser``, ``down_blocks_0_…_to_out_0``."""
    numbered = _NUMBERED.match(stem)
    if numbered is not None:  # in FaceID files: a number in the order of diffusers' attention processors
        return "denoiser", to_name(f"processor.{numbered[1]}.{numbered[2]}")
    component, path = part_and_path(stem)
    name = to_name(path)
    if component is None:  # saved from a bare text encoder
        if name.startswith(("text_model_", "encoder_layers_")):
            return "te1", name
        return ("te3" if name.startswith("encoder_block_") else "denoiser"), name
    if component == "te2" and name.startswith(("encoder_block_", "shared")):
        return "te3", name  # Flux has T5 in the second place
    return component, name


def part_and_path(stem: str) -> tuple[Component | None, str]:
    """The part that a prefix names, None without one, and the module's path in it, without what wrapped the model."""
    component: Component | None = None
    while True:
        stem = _unwrapped(stem)
        if component in ("te1", "te2", "te3"):
            return component, stem.removeprefix("transformer.")
        found = next((prefix for prefix in PREFIXES if stem.startswith(prefix.text)), None)
        if found is None or (component == "denoiser" and found.part != "denoiser"):
            return component, stem
        component, stem = found.part, stem[len(found.text) :]


def _unwrapped(stem: str) -> str:
    """A name without what is put around a whole model or a part of it."""
    for wrapped in _INSIDE:
        if wrapped in stem:
            stem = stem.replace(f"{wrapped}.", "").replace(f"{wrapped}_", "")
    while stem.startswith(_WRAPPERS):
        for wrapper in _WRAPPERS:
            stem = stem.removeprefix(wrapper)
    return stem


def to_name(path: str) -> str:
    """A module path as names are compared."""
    name = path.replace(".", "_")
    name = re.sub(r"_processor_(?=to_|add_)", "_", name)
    return name + "_0" if name.endswith("_to_out") else name


_OMI = ("clip_l.", "clip_g.", "t5.", "bundle_emb.")
_OMI_PARTS = (".qkv.0.", ".linear1.0.", ".attn.qkv.1.")
_FIRST_SIGNS = (
    ("ip_adapter.", "inside an IP-Adapter file"),
    ("lora.base_model.model.", "inside an IP-Adapter file"),
    ("_lora1.down", "XLabs"),
    (".processor.qkv_lora.", "XLabs"),
    (".processor.", "diffusers attention processors (old)"),
)
_LAST_SIGNS = (
    ("base_model.model.", "PEFT"),
    ("diffusion_model.", "generic (ComfyUI)"),
    (".lora_A.", "diffusers (PEFT)"),
    (".lora_linear_layer.", "diffusers"),
    (".lora.up", "diffusers"),
    ("_lora.up", "diffusers attention processors (old)"),
)
"""Parts of keys that tell a key format whatever its prefix is, and where no prefix does."""


def key_format_of(keys: list[str]) -> str:
    """A name for how a file spells its keys, for people."""
    if any(key.startswith(_OMI) or any(part in key for part in _OMI_PARTS) for key in keys):
        return "OneTrainer (OMI)"
    for sign, key_format in _FIRST_SIGNS:
        if any(sign in key for key in keys):
            return key_format
    stems = [_unwrapped(key) for key in keys]
    for prefix in PREFIXES:
        if prefix.key_format and any(stem.startswith(prefix.text) for stem in stems):
            return prefix.key_format
    return next((name for sign, name in _LAST_SIGNS if any(sign in key for key in keys)), "plain module names")
