"""Tiny random image encoders in the published file formats, and what they should see."""

from __future__ import annotations

import cmath
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor


def _randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        spread = torch.randn(weight.shape, generator=generator)
        weight.data = (
            1 + 0.3 * spread
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "lambda1"))
            else spread * 0.1
        )
    return model.eval().requires_grad_(False)


def siglip(folder: Path, *, width: int = 32, heads: int = 2, layers: int = 3, side: int = 56, patch: int = 14) -> Any:
    """transformers' SiglipVisionModel, saved in ``folder``."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads, image_size=side, patch_size=patch
    )  # fmt: skip
    model = _randomised(SiglipVisionModel(config))
    model.save_pretrained(folder)
    return model


def dinov2(
    folder: Path, *, gated: bool = True, width: int = 64, layers: int = 3, side: int = 70, ratio: int = 1
) -> Any:
    """transformers' Dinov2Model, saved in ``folder``."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64), image_size=side, patch_size=14,
        use_swiglu_ffn=gated, mlp_ratio=ratio,
    )  # fmt: skip
    model = _randomised(Dinov2Model(config))
    model.save_pretrained(folder)
    return model


def pe_core(file: Path, *, width: int = 384, layers: int = 2, side: int = 5, patch: int = 14) -> dict[str, Tensor]:
    """The tensors of a PE-Core vision tower with a class token, saved as ``file``."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, 3, patch, patch), "class_embedding": (width,), "positional_embedding": (side * side + 1, width),
        "ln_pre.weight": (width,), "ln_pre.bias": (width,), "ln_post.weight": (width,), "ln_post.bias": (width,),
        "proj": (width, 8), "attn_pool.probe": (1, 1, width), "attn_pool.layernorm.weight": (width,),
    }  # fmt: skip
    for i in range(layers):
        for name, rows, columns in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", 64, width),
            ("mlp.c_proj", width, 64),
        ):
            shapes |= {
                f"transformer.resblocks.{i}.{name}.weight": (rows, columns),
                f"transformer.resblocks.{i}.{name}.bias": (rows,),
            }
        for name in ("ln_1", "ln_2"):
            shapes |= {f"transformer.resblocks.{i}.{name}.{part}": (width,) for part in ("weight", "bias")}
        shapes |= {f"transformer.resblocks.{i}.attn.in_proj_weight": (3 * width, width)}
        shapes |= {f"transformer.resblocks.{i}.attn.in_proj_bias": (3 * width,)}
    generator = torch.Generator().manual_seed(1)
    state = {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}
    for key in state:
        if "ln_" in key and key.endswith("weight"):
            state[key] += 1
    save_file(state, file)
    return state


def pe_reference(state: dict[str, Tensor], pixels: Tensor, *, heads: int) -> Tensor:
    """PE-Core token by token: what facebookresearch/perception_models computes, with the rotation as complex numbers."""
    width = state["class_embedding"].shape[0]
    x = F.conv2d(pixels, state["conv1.weight"], stride=state["conv1.weight"].shape[-1])
    rows, columns = x.shape[-2:]
    x = torch.cat([state["class_embedding"].expand(len(x), 1, width), x.flatten(2).mT], 1)
    positions = state["positional_embedding"]
    side = round((len(positions) - 1) ** 0.5)
    if (rows, columns) != (side, side):
        grid = positions[1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (rows, columns), mode="bilinear", align_corners=False)
        positions = torch.cat([positions[:1], grid.flatten(2)[0].T])
    x = F.layer_norm(x + positions, (width,), state["ln_pre.weight"], state["ln_pre.bias"])

    def turned(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()).clone()  # b h l d/2
        for token in range(1, t.shape[2]):
            row, column = divmod(token - 1, columns)
            for pair in range(pairs.shape[-1]):
                half = pairs.shape[-1] // 2
                place = column + 1 if pair < half else row + 1
                angle = place * 10000.0 ** (-(pair % half) / half)
                pairs[:, :, token, pair] *= cmath.exp(1j * angle)
        return torch.view_as_real(pairs).flatten(-2)

    blocks = sum(key.endswith("in_proj_weight") for key in state)
    for i in range(blocks):
        part = {key.removeprefix(f"transformer.resblocks.{i}."): t for key, t in state.items()}
        y = F.layer_norm(x, (width,), part["ln_1.weight"], part["ln_1.bias"])
        q, k, v = (
            (y @ w.T + b).unflatten(-1, (heads, -1)).transpose(1, 2)
            for w, b in zip(part["attn.in_proj_weight"].chunk(3), part["attn.in_proj_bias"].chunk(3), strict=True)
        )
        scores = turned(q) @ turned(k).mT / q.shape[-1] ** 0.5
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ part["attn.out_proj.weight"].T + part["attn.out_proj.bias"]
        y = F.layer_norm(x, (width,), part["ln_2.weight"], part["ln_2.bias"])
        y = F.gelu(y @ part["mlp.c_fc.weight"].T + part["mlp.c_fc.bias"])
        x = x + y @ part["mlp.c_proj.weight"].T + part["mlp.c_proj.bias"]
    return F.layer_norm(x, (width,), state["ln_post.weight"], state["ln_post.bias"])
