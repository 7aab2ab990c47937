"""Shrunk SD3 and Flux checkpoints for ComfyUI's UNETLoader, by their original names, and LoRAs and adapters for them.

The host reads every size off the shapes (Flux's from 0.13 on): two blocks of each kind, 128 channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from host.tiny_adapters import VISION_PROJECTION
from tiny import tiny_state
from tiny_towers import siglip

WIDTH, TEXT, POOLED = 128, 64, 32
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def sd3_shapes() -> Shapes:
    yield "x_embedder.proj", (WIDTH, 16, 2, 2)
    yield "context_embedder", (WIDTH, TEXT)
    yield from _mlp("t_embedder.mlp", ("0", "2"), 256, WIDTH)
    yield from _mlp("y_embedder.mlp", ("0", "2"), POOLED, WIDTH)
    for i in range(2):
        for side in ("x_block", "context_block"):
            last = side == "context_block" and i == 1  # the text is not needed after the last block
            stem = f"joint_blocks.{i}.{side}"
            yield f"{stem}.attn.qkv", (3 * WIDTH, WIDTH)
            yield f"{stem}.adaLN_modulation.1", ((2 if last else 6) * WIDTH, WIDTH)
            if not last:
                yield f"{stem}.attn.proj", (WIDTH, WIDTH)
                yield from _mlp(f"{stem}.mlp", ("fc1", "fc2"), WIDTH, 4 * WIDTH, WIDTH)
    yield "final_layer.linear", (64, WIDTH)
    yield "final_layer.adaLN_modulation.1", (2 * WIDTH, WIDTH)


def flux_shapes() -> Shapes:
    yield "img_in", (WIDTH, 64)
    yield "txt_in", (WIDTH, TEXT)
    for name, columns in (("time_in", 256), ("vector_in", POOLED), ("guidance_in", 256)):
        yield from _mlp(name, ("in_layer", "out_layer"), columns, WIDTH)
    for i in range(2):
        for side in ("img", "txt"):
            stem = f"double_blocks.{i}.{side}"
            yield f"{stem}_mod.lin", (6 * WIDTH, WIDTH)
            yield f"{stem}_attn.qkv", (3 * WIDTH, WIDTH)
            yield f"{stem}_attn.proj", (WIDTH, WIDTH)
            yield from _mlp(f"{stem}_mlp", ("0", "2"), WIDTH, 4 * WIDTH, WIDTH)
        yield f"single_blocks.{i}.linear1", (7 * WIDTH, WIDTH)
        yield f"single_blocks.{i}.linear2", (WIDTH, 5 * WIDTH)
        yield f"single_blocks.{i}.modulation.lin", (3 * WIDTH, WIDTH)
    yield "final_layer.linear", (64, WIDTH)
    yield "final_layer.adaLN_modulation.1", (2 * WIDTH, WIDTH)


def _mlp(stem: str, names: tuple[str, str], columns: int, inner: int, rows: int | None = None) -> Shapes:
    yield f"{stem}.{names[0]}", (inner, columns)
    yield f"{stem}.{names[1]}", (rows or inner, inner)


SHAPES = {"sd3": sd3_shapes, "flux": flux_shapes}


def build_transformer(kind: str, folder: Path, *, scaled: bool = False) -> Path:
    """A checkpoint of random weights, fp16; ``scaled``: the blocks' matrices in fp8 with a scale each, as ComfyUI has them."""
    path = folder / f"shrunk_{kind}{'_scaled' * scaled}.safetensors"
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, shape in SHAPES[kind]():
        columns = torch.Size(shape[1:]).numel()
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / columns**0.5
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) / 10
        if kind == "flux" and (name.endswith("_attn.qkv") or name.endswith("linear1")):
            norm = f"{name.removesuffix('.qkv').removesuffix('.linear1')}.norm"
            state |= {f"{norm}.{part}_norm.scale": torch.ones(WIDTH) for part in ("query", "key")}
    if kind == "sd3":
        state["pos_embed"] = torch.randn(1, 16 * 16, WIDTH, generator=generator)
    state = {key: value.half() for key, value in state.items()}
    if scaled:
        for key in [k for k, t in state.items() if "_blocks." in k and t.ndim == 2]:
            stem, weight = key.removesuffix(".weight"), state[key].float()
            scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            state[key] = (weight / scale).to(torch.float8_e4m3fn)
            state[f"{stem}.weight_scale"] = scale
            state[f"{stem}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    save_file(state, path)
    return path


SIGLIP_WIDTH = 768
"""A file of a tower tells nothing of its heads, so it must be as wide as a published one."""
ANIMA_WIDTH, ANIMA_TEXT, ANIMA_BLOCKS = 64, 32, 3
"""Of TestAnima."""
ADAPTERS = {  # family: its layers' channels, and the sizes of its projector
    "xlabs": ((WIDTH,) * 2, {"token_dim": TEXT, "num_tokens": 4, "feature_dim": VISION_PROJECTION}),
    "instantx": ((WIDTH,) * 4, {"token_dim": TEXT, "num_tokens": 6, "feature_dim": SIGLIP_WIDTH}),
    "sd3.5": (
        (WIDTH,) * 2,
        {"token_dim": WIDTH, "num_tokens": 5, "feature_dim": SIGLIP_WIDTH, "hidden_dim": 64, "inner_dim": 128, "depth": 2},
    ),
    "anima-character": (
        (ANIMA_WIDTH,) * ANIMA_BLOCKS,
        {"token_dim": SIGLIP_WIDTH, "hidden_dim": ANIMA_WIDTH, "lora_rank": 2, "text_dim": ANIMA_TEXT},
    ),
}  # fmt: skip


def build_transformer_adapter(family: str, folder: Path, *, seed: int = 0) -> Path:
    """An adapter of random weights for the shrunk Flux or SD3 or TestAnima, under the keys of the published file."""
    path = folder / f"tiny_{family}_s{seed}.safetensors"
    channels, sizes = ADAPTERS[family]
    save_file(tiny_state(family, seed=seed, channels=channels, **sizes), path)
    return path


def build_siglip(folder: Path, *, side: int = 56) -> Path:
    """A SigLIP of three layers with its pooling head, in one file; it sees pictures of ``side`` pixels as 4 x 4 patches."""
    place = folder / f"siglip_{side}"
    siglip(place, width=SIGLIP_WIDTH, heads=12, side=side, patch=side // 4)
    return place / "model.safetensors"


def build_transformer_loras(kind: str, folder: Path) -> dict[str, Path]:
    """One LoRA on the attentions of the pictures' side, spelled by kohya's trainer (fused) and by diffusers (apart).

    Their numbers are the same: diffusers' q, k and v share the down matrix. "dora" is kohya's with magnitudes.
    """
    generator = torch.Generator().manual_seed(1)
    fused: dict[str, Tensor] = {}
    apart: dict[str, Tensor] = {}
    for i in range(2):
        name = f"joint_blocks.{i}.x_block.attn" if kind == "sd3" else f"double_blocks.{i}.img_attn"
        theirs = f"transformer.transformer_blocks.{i}.attn"
        for layer, parts in (("qkv", ("to_q", "to_k", "to_v")), ("proj", ("to_out.0",))):
            down = torch.randn(4, WIDTH, generator=generator) / WIDTH**0.5
            up = torch.randn(len(parts) * WIDTH, 4, generator=generator) / 2
            stem = "lora_unet_" + f"{name}.{layer}".replace(".", "_")
            fused |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(4.0),
            }
            for part, rows in zip(parts, up.split(WIDTH), strict=True):
                apart |= {
                    f"{theirs}.{part}.lora_A.weight": down.clone(),
                    f"{theirs}.{part}.lora_B.weight": rows.clone(),
                }
    magnitudes = {
        key.replace("lora_up.weight", "dora_scale"): torch.full((len(t), 1), 1.3)
        for key, t in fused.items()
        if "lora_up" in key
    }
    files: dict[str, Path] = {}
    for spelling, tensors in {"kohya": fused, "diffusers": apart, "dora": fused | magnitudes}.items():
        files[spelling] = folder / f"lora_{kind}_{spelling}.safetensors"
        save_file(tensors, files[spelling])
    return files
