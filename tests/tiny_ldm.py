"""A diffusers folder as one file in the original (LDM) layout, by the names in diffusers' conversion scripts."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ipadapter_core.model_folders import load_pipeline

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def save_single_file(folder: Path, file: Path, kind: str) -> Path:
    """Write the models of a diffusers folder (kind "sd15", "sd2" or "sdxl") as one .safetensors."""
    pipeline = load_pipeline(folder)
    layers = pipeline.unet.config.layers_per_block
    state = {f"model.diffusion_model.{unet_name(k, layers)}": v for k, v in pipeline.unet.state_dict().items()}
    levels = len(pipeline.vae.config.block_out_channels)
    for key, value in pipeline.vae.state_dict().items():
        name = vae_name(key, levels)
        square = ".attn_1." in name and name.endswith("weight") and value.ndim == 2
        state[f"first_stage_model.{name}"] = value[..., None, None] if square else value
    text = pipeline.text_encoder.state_dict()
    if kind == "sd2":
        state |= {f"cond_stage_model.model.{key}": value for key, value in open_clip(text).items()}
    else:
        prefix = "conditioner.embedders.0.transformer." if kind == "sdxl" else "cond_stage_model.transformer."
        state |= {
            prefix + (key if key.startswith("text_model.") else f"text_model.{key}"): v for key, v in text.items()
        }
    if kind == "sdxl":
        second = open_clip(pipeline.text_encoder_2.state_dict())
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    save_file({key: value.clone().contiguous() for key, value in state.items()}, file)
    return file


def unet_name(key: str, layers: int) -> str:
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(ours + "."):
            return theirs + key[len(ours) :]
    match = re.fullmatch(
        r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key
    )
    assert match, key
    where, part, number, rest = match[1], match[3], int(match[4]), match[5]
    block = int(match[2] or 0)
    if part == "resnets":
        name, _, end = rest.partition(".")
        rest = f"{RESNET[name]}.{end}"
    column = {"resnets": 0, "attentions": 1}.get(part)
    if where == "mid":
        return f"middle_block.{1 if part == 'attentions' else 2 * number}.{rest}"
    if part == "downsamplers":
        return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{(layers + 1) * block + layers}.2.{rest}"
    if where == "down":
        return f"input_blocks.{(layers + 1) * block + number + 1}.{column}.{rest}"
    return f"output_blocks.{(layers + 1) * block + number}.{column}.{rest}"


def vae_name(key: str, levels: int) -> str:
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for ours, theirs in VAE_ATTENTION.items():
        key = key.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)


def open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers CLIP text model's weights under open_clip's names, q, k and v in one."""
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    width = state["final_layer_norm.weight"].shape[0]
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T if "text_projection.weight" in state else torch.eye(width),
    }
    for key, value in state.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            continue
        block, name, end = f"transformer.resblocks.{match[1]}", match[2], match[3]
        if name in OPEN_CLIP:
            out[f"{block}.{OPEN_CLIP[name]}.{end}"] = value
        elif name == "self_attn.q_proj":
            three = [state[f"encoder.layers.{match[1]}.self_attn.{one}_proj.{end}"] for one in "qkv"]
            out[f"{block}.attn.in_proj_{end}"] = torch.cat(three)
    return out
