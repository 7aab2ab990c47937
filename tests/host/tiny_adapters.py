"""IP-Adapter files that fit the shrunk checkpoints and TestClipVision: keys as in the real files, random weights.

Layer i of the checkpoint order (down, up, middle last) has the key number 2 i + 1. Projections keep the variance, so
image tokens weigh as much in attention as text tokens and strength 1 visibly changes a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from host.shrunk import UNETS, cross_attention_widths

VISION_HIDDEN, VISION_PROJECTION, VISION_TOKENS = 32, 24, 17  # TestClipVision
BASE_TOKENS, FACE = 4, 512
PLUS_QUERIES, PLUS_WIDTH, PLUS_HEADS, PLUS_DEPTH, HEAD_DIM = 16, 64, 2, 2, 64

Linear = Callable[[int, int], Tensor]  # (rows, columns) -> a random weight


def build_adapter(family: str, unet: str, folder: Path, *, seed: int = 0, suffix: str = ".safetensors") -> Path:
    """A `family` ("base", "plus", "faceid") adapter for UNETS[unet] in `folder`; .safetensors is flat, .bin the nested pickle."""
    path = folder / f"tiny_{family}_{unet}_s{seed}{suffix}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_tensors(family, unet, seed=seed)
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        groups = ("image_proj", "ip_adapter")
        torch.save({g: {k[len(g) + 1 :]: v for k, v in state.items() if k.startswith(g + ".")} for g in groups}, path)
    return path


def build_prompt(folder: Path) -> Path:
    """What Save Image Prompt writes for a plus adapter and TestClipVision: two references and one of no image."""
    path = folder / "tiny_prompt.ipadpt.safetensors"
    if not path.exists():
        tokens = torch.randn(3, VISION_TOKENS, VISION_HIDDEN, generator=torch.Generator().manual_seed(5))
        save_file({"embeds": tokens[:2].clone(), "negative": tokens[2:].clone()}, path, {"feature": "penultimate"})
    return path


def build_encoder(folder: Path) -> Path:
    """A file with the widths of TestClipVision, by which it is picked for an adapter; the test pack loads that in its place."""
    path = folder / "test_clip_vision_by_widths.safetensors"
    if not path.exists():
        widths = {"class_embedding": (VISION_HIDDEN,), "visual_projection.weight": (VISION_PROJECTION, VISION_HIDDEN)}
        save_file({key: torch.zeros(shape) for key, shape in widths.items()}, path)
    return path


def adapter_tensors(family: str, unet: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Flat keys and fp16 tensors of an adapter."""
    shape = UNETS[unet]
    generator = torch.Generator().manual_seed(1000 + seed)

    def linear(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    build = {"base": _image_proj, "plus": _resampler, "faceid": _face_mlp}[family]
    state = {f"image_proj.{key}": value for key, value in build(shape.text_width, linear).items()}
    for i, width in enumerate(cross_attention_widths(shape)):
        state[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = linear(width, shape.text_width)
        state[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = linear(width, shape.text_width)
        if family == "faceid":
            state |= _lora_inside(i, width, shape.text_width, linear)
    return {key: value.half().contiguous() for key, value in state.items()}


def _image_proj(text_width: int, linear: Linear) -> dict[str, Tensor]:
    rows = BASE_TOKENS * text_width
    return {"proj.weight": linear(rows, VISION_PROJECTION), "proj.bias": 0.1 * linear(rows, 1)[:, 0]} | _norm(
        "norm", text_width
    )


def _face_mlp(text_width: int, linear: Linear) -> dict[str, Tensor]:
    rows = BASE_TOKENS * text_width
    state = {"proj.0.weight": linear(2 * FACE, FACE), "proj.0.bias": torch.zeros(2 * FACE)}
    state |= {"proj.2.weight": linear(rows, 2 * FACE), "proj.2.bias": torch.zeros(rows)}
    return state | _norm("norm", text_width)


def _lora_inside(index: int, width: int, text_width: int, linear: Linear) -> dict[str, Tensor]:
    """The LoRA of self- and cross-attention that FaceID files carry, of rank 2."""
    state: dict[str, Tensor] = {}
    for number, context in ((2 * index, width), (2 * index + 1, text_width)):
        for part, columns in (("q", width), ("k", context), ("v", context), ("out", width)):
            state[f"ip_adapter.{number}.to_{part}_lora.down.weight"] = linear(2, columns)
            state[f"ip_adapter.{number}.to_{part}_lora.up.weight"] = linear(width, 2)
    return state


def _resampler(text_width: int, linear: Linear) -> dict[str, Tensor]:
    width, inner = PLUS_WIDTH, PLUS_HEADS * HEAD_DIM
    state = {
        "latents": linear(PLUS_QUERIES, width)[None],
        "proj_in.weight": linear(width, VISION_HIDDEN),
        "proj_in.bias": torch.zeros(width),
        "proj_out.weight": linear(text_width, width),
        "proj_out.bias": torch.zeros(text_width),
    }
    state |= _norm("norm_out", text_width)
    for i in range(PLUS_DEPTH):
        layer = f"layers.{i}"
        state |= _norm(f"{layer}.0.norm1", width) | _norm(f"{layer}.0.norm2", width) | _norm(f"{layer}.1.0", width)
        state[f"{layer}.0.to_q.weight"] = linear(inner, width)
        state[f"{layer}.0.to_kv.weight"] = linear(2 * inner, width)
        state[f"{layer}.0.to_out.weight"] = linear(width, inner)
        state[f"{layer}.1.1.weight"] = linear(4 * width, width)
        state[f"{layer}.1.3.weight"] = linear(width, 4 * width)
    return state


def _norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
