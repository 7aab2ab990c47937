"""How files spell modules: the one table of prefixes, and the one rule that makes names comparable.

Every trainer names a module by its path, with dots or underscores and a prefix of its own. Underscores cannot be turned
back into dots, so names are compared with underscores, against names made from the model (``targets.py``).
"""

from __future__ import annotations

import re
from typing import Literal

Component = Literal["unet", "te1", "te2", "te3"]
"""The denoiser (UNet or transformer) and the text encoders: CLIP-L, CLIP-G (or OpenCLIP-H), T5."""

PREFIXES: tuple[tuple[str, Component], ...] = (
    ("lora_te1_", "te1"),
    ("lora_te2_", "te2"),
    ("lora_te3_", "te3"),
    ("lora_te_", "te1"),
    ("lora_unet_", "unet"),
    ("lora_transformer_", "unet"),
    ("lycoris_", "unet"),
    ("text_encoders.clip_l.", "te1"),
    ("text_encoders.clip_h.", "te1"),
    ("text_encoders.clip_g.", "te2"),
    ("text_encoders.t5xxl.", "te3"),
    ("text_encoder_2.", "te2"),
    ("text_encoder_3.", "te3"),
    ("text_encoder.", "te1"),
    ("te1.", "te1"),
    ("te2.", "te2"),
    ("clip_l.", "te1"),  # the open model initiative's names, OneTrainer's until 2026
    ("clip_h.", "te1"),
    ("clip_g.", "te2"),
    ("t5xxl.", "te3"),
    ("t5.", "te3"),
    ("unet.", "unet"),
    ("transformer.", "unet"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
)

_WRAPPERS = ("base_model.model.", "module.")
"""What PEFT and distributed training put in front of a model's names."""

_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and checkpointing put before the name of any part they wrap."""

_NUMBERED = re.compile(r"^(?:ip_adapter\.)?(\d+)\.(to_[qkv]|to_out)$")


def canonical(stem: str) -> tuple[Component, str]:
    """Part and comparable name of a module: ``unet.down_blocks.0.….to_out`` → ``unet``, ``down_blocks_0_…_to_out_0``."""
    numbered = _NUMBERED.match(stem)
    if numbered is not None:  # in FaceID files: a number in the order of diffusers' attention processors
        return "unet", to_name(f"processor.{numbered[1]}.{numbered[2]}")
    component, path = part_and_path(stem)
    name = to_name(path)
    if component is None:  # saved from a bare text encoder
        if name.startswith(("text_model_", "encoder_layers_")):
            return "te1", name
        return ("te3" if name.startswith("encoder_block_") else "unet"), name
    if component == "te2" and name.startswith(("encoder_block_", "shared")):
        return "te3", name  # Flux has T5 in the second place
    return component, name


def part_and_path(stem: str) -> tuple[Component | None, str]:
    """The part that a prefix names, None without one, and the module's path in it, without what wrapped the model."""
    for wrapped in _INSIDE:
        if wrapped in stem:
            stem = stem.replace(f"{wrapped}.", "").replace(f"{wrapped}_", "")
    component: Component | None = None
    found: tuple[str, Component] | None
    while True:
        for wrapper in _WRAPPERS:
            if stem.startswith(wrapper):
                stem = stem[len(wrapper) :]
                break
        else:
            if component in ("te1", "te2", "te3"):
                return component, stem.removeprefix("transformer.")
            found = next(((prefix, part) for prefix, part in PREFIXES if stem.startswith(prefix)), None)
            if found is None or (component == "unet" and found[1] != "unet"):
                return component, stem
            component, stem = found[1], stem[len(found[0]) :]


def to_name(path: str) -> str:
    """A module path as names are compared."""
    name = path.replace(".", "_")
    name = re.sub(r"_processor_(?=to_|add_)", "_", name)
    return name + "_0" if name.endswith("_to_out") else name


_OMI = ("clip_l.", "clip_g.", "t5.", "bundle_emb.")
_OMI_PARTS = (".qkv.0.", ".linear1.0.", ".attn.qkv.1.")


def key_format_of(keys: list[str]) -> str:
    """A name for how a file spells its keys, for people."""
    if any(key.startswith(_OMI) or any(part in key for part in _OMI_PARTS) for key in keys):
        return "OneTrainer (OMI)"
    for sign, key_format in (
        ("ip_adapter.", "inside an IP-Adapter file"),
        ("_lora1.down", "XLabs"),
        (".processor.qkv_lora.", "XLabs"),
        (".processor.", "diffusers attention processors (old)"),
        ("lycoris_", "SimpleTuner (LyCORIS)"),
        ("lora_transformer_", "OneTrainer"),
        ("lora_unet_", "kohya"),
        ("lora_te", "kohya"),
        ("base_model.model.", "PEFT"),
        ("diffusion_model.", "generic (ComfyUI)"),
        (".lora_A.", "diffusers (PEFT)"),
        (".lora_linear_layer.", "diffusers"),
        (".lora.up", "diffusers"),
        ("_lora.up", "diffusers attention processors (old)"),
    ):
        if any(sign in key for key in keys):
            return key_format
    return "plain module names"
