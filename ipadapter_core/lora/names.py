"""How files spell modules and tensors: the one table of suffixes, and the one rule that makes names comparable.

Every trainer names a module by its path, with dots or underscores and a prefix of its own. Underscores cannot be turned
back into dots, so names are compared with underscores, against names made from the model (``targets.py``).
"""

from __future__ import annotations

import re

from .weights import Component

# What follows the module's name → the tensor's role. Checked in order; the first that matches wins.
SUFFIXES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$", "magnitude"),  # PEFT
        (r"\.dora_scale$", "dora_scale"),  # LyCORIS, kohya, OneTrainer
        (r"\.lora_([AB])(?:\.(?!bias)[^.]+)?\.bias$", "lora_bias"),  # PEFT with lora_bias, BFL control
        (r"\.lora_A(?:\.[^.]+)?(?:\.weight)?$", "down"),  # PEFT, with or without an adapter name
        (r"\.lora_B(?:\.[^.]+)?(?:\.weight)?$", "up"),
        (r"\.lora_down\.weight$", "down"),  # kohya
        (r"\.lora_up\.weight$", "up"),
        (r"\.lora_mid\.weight$", "mid"),
        (r"(?:\.lora_linear_layer|\.lora|_lora)\.down\.weight$", "down"),  # diffusers, old and oldest
        (r"(?:\.lora_linear_layer|\.lora|_lora)\.up\.weight$", "up"),
        (r"(?:\.lora_linear_layer|\.lora|_lora)\.alpha$", "alpha"),
        (r"(?<=_lora[12])\.down\.weight$", "down"),  # XLabs: the number says picture or text, so it stays in the name
        (r"(?<=_lora[12])\.up\.weight$", "up"),
        (r"\.alpha$", "alpha"),
        (r"\.hada_(w1_a|w1_b|w2_a|w2_b|t1|t2)$", r"hada_\1"),
        (r"\.lokr_(w1|w1_a|w1_b|w2|w2_a|w2_b|t1|t2)$", r"lokr_\1"),
        (r"\.(a1|a2|b1|b2|bm)\.weight$", r"glora_\1"),
        (r"\.oft_blocks$", "oft_blocks"),
        (r"\.rescale$", "rescale"),
        (r"\.diff$", "diff"),
        (r"\.diff_b$", "diff_b"),
        (r"\.set_weight$", "set_weight"),
        (r"\.w_norm$", "w_norm"),
        (r"\.b_norm$", "b_norm"),
        (r"\.on_input$", "on_input"),
    )
)

PREFIXES: tuple[tuple[str, Component], ...] = (
    ("lora_te1_", "te1"),
    ("lora_te2_", "te2"),
    ("lora_te3_", "te3"),
    ("lora_te_", "te1"),
    ("lora_unet_", "unet"),
    ("lora_transformer_", "unet"),
    ("lycoris_", "unet"),
    ("text_encoders.clip_l.transformer.", "te1"),
    ("text_encoders.clip_h.transformer.", "te1"),
    ("text_encoders.clip_g.transformer.", "te2"),
    ("text_encoders.t5xxl.transformer.", "te3"),
    ("text_encoder_2.", "te2"),
    ("text_encoder_3.", "te3"),
    ("text_encoder.", "te1"),
    ("te1.", "te1"),
    ("te2.", "te2"),
    ("unet.", "unet"),
    ("transformer.", "unet"),
    ("diffusion_model.", "unet"),
)

_WRAPPERS = ("base_model.model.", "model.diffusion_model.", "unet.base_model.model.")
_NUMBERED = re.compile(r"^(?:ip_adapter\.)?(\d+)\.(to_[qkv]|to_out)$")


def split_key(key: str) -> tuple[str, str] | None:
    """Module and role of a tensor's key; None if no algorithm has such a tensor."""
    for pattern, role in SUFFIXES:
        match = pattern.search(key)
        if match is not None:
            return key[: match.start()], match.expand(role)
    return None


def canonical(stem: str) -> tuple[Component, str]:
    """Part and comparable name of a module: ``unet.down_blocks.0.….to_out`` → ``unet``, ``down_blocks_0_…_to_out_0``."""
    numbered = _NUMBERED.match(stem)
    if numbered is not None:  # in FaceID files: a number in the order of diffusers' attention processors
        return "unet", to_name(f"processor.{numbered[1]}.{numbered[2]}")
    component: Component = "unet"
    for wrapper in _WRAPPERS:
        stem = stem.removeprefix(wrapper)
    for prefix, part in PREFIXES:
        if stem.startswith(prefix):
            component, stem = part, stem.removeprefix(prefix)
            break
    return component, to_name(stem.removeprefix("base_model.model."))


def to_name(path: str) -> str:
    """A module path in the spelling in which names are compared."""
    name = path.replace(".", "_")
    name = re.sub(r"_processor_(?=to_|add_)", "_", name)
    return name + "_0" if name.endswith("_to_out") else name


def spelling_of(keys: list[str]) -> str:
    """A name for how a file spells its keys, for people."""
    for sign, spelling in (
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
            return spelling
    return "plain module names"
