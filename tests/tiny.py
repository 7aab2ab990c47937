"""Tiny stand-ins for the files and models that people have: seeded, a few kilobytes each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# --- checkpoints -------------------------------------------------------------------------------------------------
# Keys and shapes are written out from the catalogue of released files, not taken from the code under test.

SD15_CHANNELS = (320, 320, 640, 640, *[1280] * 5, *[640] * 3, *[320] * 3, 1280)
SDXL_CHANNELS = (*[640] * 4, *[1280] * 20, *[1280] * 30, *[640] * 6, *[1280] * 10)


def adapter_shapes(
    family: str = "base",
    *,
    token_dim: int = 32,
    channels: tuple[int, ...] = (8, 8, 16),
    num_tokens: int = 4,
    feature_dim: int = 24,
    hidden_dim: int = 64,
    inner_dim: int = 128,
    ff_dim: int | None = None,
    depth: int = 2,
    face_dim: int = 12,
    lora_rank: int = 0,
    text_dim: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Flat key to shape of an adapter of the family "base", "plus", "full-face", "faceid" or "faceid-plus", or of one for transformers.

    With a LoRA of `lora_rank` inside, as FaceID files have it (the channels of self-attention are those of its cross one).
    `text_dim` is the width of the projector's tokens where the base model narrows them to `token_dim` (Kolors FaceID).
    """
    if family in ("xlabs", "xlabs-diffusers"):
        base = adapter_shapes("base", channels=(), token_dim=token_dim, num_tokens=num_tokens, feature_dim=feature_dim)
        if family == "xlabs":
            base = {key.replace("image_proj.", "ip_adapter_proj_model."): shape for key, shape in base.items()}
        for n, c in enumerate(channels):
            for part in "kv":
                layer = {
                    "xlabs": f"double_blocks.{n}.processor.ip_adapter_double_stream_{part}_proj",
                    "xlabs-diffusers": f"ip_adapter.{n}.to_{part}_ip",
                }[family]
                base |= {f"{layer}.weight": (c, token_dim), f"{layer}.bias": (c,)}
        return base
    if family in ("instantx", "instantx-resampler"):
        kind = "faceid" if family == "instantx" else "plus"
        sizes = {"hidden_dim": hidden_dim, "inner_dim": inner_dim, "ff_dim": ff_dim, "depth": depth}
        base = adapter_shapes(
            kind,
            channels=(),
            token_dim=token_dim,
            num_tokens=num_tokens,
            feature_dim=feature_dim,
            face_dim=feature_dim,
            **sizes,
        )  # pyright: ignore
        for n, c in enumerate(channels):
            base |= {f"ip_adapter.{n}.to_{part}_ip.weight": (c, token_dim) for part in "kv"}
        return base
    own = token_dim if text_dim is None else text_dim
    h, i, ff = hidden_dim, inner_dim, 4 * hidden_dim if ff_dim is None else ff_dim
    proj: dict[str, tuple[int, ...]]
    if family == "base":
        proj = {
            "proj.weight": (num_tokens * token_dim, feature_dim),
            "proj.bias": (num_tokens * token_dim,),
            "norm.weight": (token_dim,),
            "norm.bias": (token_dim,),
        }
    elif family == "plus":
        proj = {
            "latents": (1, num_tokens, h),
            "proj_in.weight": (h, feature_dim),
            "proj_in.bias": (h,),
            "proj_out.weight": (token_dim, h),
            "proj_out.bias": (token_dim,),
            "norm_out.weight": (token_dim,),
            "norm_out.bias": (token_dim,),
        }
        for n in range(depth):
            proj |= {
                f"layers.{n}.0.norm1.weight": (h,),
                f"layers.{n}.0.norm1.bias": (h,),
                f"layers.{n}.0.norm2.weight": (h,),
                f"layers.{n}.0.norm2.bias": (h,),
                f"layers.{n}.0.to_q.weight": (i, h),
                f"layers.{n}.0.to_kv.weight": (2 * i, h),
                f"layers.{n}.0.to_out.weight": (h, i),
                f"layers.{n}.1.0.weight": (h,),
                f"layers.{n}.1.0.bias": (h,),
                f"layers.{n}.1.1.weight": (ff, h),
                f"layers.{n}.1.3.weight": (h, ff),
            }
    elif family == "full-face":
        proj = {
            "proj.0.weight": (hidden_dim, feature_dim),
            "proj.0.bias": (hidden_dim,),
            "proj.2.weight": (token_dim, hidden_dim),
            "proj.2.bias": (token_dim,),
            "proj.3.weight": (token_dim,),
            "proj.3.bias": (token_dim,),
        }
    elif family in ("faceid", "faceid-plus"):
        proj = {
            "proj.0.weight": (2 * face_dim, face_dim),
            "proj.0.bias": (2 * face_dim,),
            "proj.2.weight": (num_tokens * own, 2 * face_dim),
            "proj.2.bias": (num_tokens * own,),
            "norm.weight": (own,),
            "norm.bias": (own,),
        }
        if family == "faceid-plus":
            sizes = {"token_dim": own, "num_tokens": 1, "feature_dim": feature_dim, "hidden_dim": own}
            inner, ff = (own, 4 * own) if ff_dim is None else (inner_dim, ff_dim)
            reader = adapter_shapes("plus", channels=(), inner_dim=inner, ff_dim=ff, depth=depth, **sizes)
            reader = {key.removeprefix("image_proj."): shape for key, shape in reader.items()}
            proj |= {f"perceiver_resampler.{key}": shape for key, shape in reader.items() if key != "latents"}
    else:
        raise ValueError(family)
    shapes = {f"image_proj.{key}": shape for key, shape in proj.items()}
    for n, c in enumerate(channels):
        shapes[f"ip_adapter.{2 * n + 1}.to_k_ip.weight"] = (c, token_dim)
        shapes[f"ip_adapter.{2 * n + 1}.to_v_ip.weight"] = (c, token_dim)
        for number, context in ((2 * n, c), (2 * n + 1, token_dim)) if lora_rank else ():
            for part, width in (("q", c), ("k", context), ("v", context), ("out", c)):
                shapes[f"ip_adapter.{number}.to_{part}_lora.down.weight"] = (lora_rank, width)
                shapes[f"ip_adapter.{number}.to_{part}_lora.up.weight"] = (c, lora_rank)
    return shapes


def fill(
    shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random tensors of these shapes: matrices with outputs of about unit size, norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if key.endswith("bias"):
            tensor *= 0.1
        elif len(shape) == 1:
            tensor = 1 + 0.1 * tensor
        elif len(shape) == 2:
            tensor /= shape[1] ** 0.5
        state[key] = tensor.to(dtype)
    return state


def tiny_state(
    family: str = "base", *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int | tuple[int, ...]
) -> dict[str, Tensor]:
    """A whole adapter of random weights under flat keys; `sizes` as in `adapter_shapes`."""
    return fill(adapter_shapes(family, **sizes), seed=seed, dtype=dtype)  # pyright: ignore[reportArgumentType]


def nested(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The same tensors as a released .bin holds them: {"image_proj": {…}, "ip_adapter": {…}}."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        group, rest = key.split(".", 1)
        groups.setdefault(group, {})[rest] = tensor
    return groups
