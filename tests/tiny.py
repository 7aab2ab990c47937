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
    if family in TRANSFORMERS:
        return transformer_shapes(
            family, token_dim=token_dim, channels=channels, num_tokens=num_tokens, feature_dim=feature_dim,
            hidden_dim=hidden_dim, inner_dim=inner_dim, ff_dim=ff_dim, depth=depth, lora_rank=lora_rank,
            text_dim=text_dim or 20,
        )  # fmt: skip
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


TRANSFORMERS = (
    "xlabs", "xlabs-diffusers", "instantx", "instantx-resampler", "instantcharacter", "sd3.5", "anima-character", "anima-pe",
)  # fmt: skip


def transformer_shapes(
    family: str,
    *,
    token_dim: int,
    channels: tuple[int, ...],
    num_tokens: int,
    feature_dim: int,
    hidden_dim: int,
    inner_dim: int,
    ff_dim: int | None,
    depth: int,
    lora_rank: int,
    text_dim: int,
) -> dict[str, tuple[int, ...]]:
    """Key to shape of an adapter for a transformer, see reference dit-adapters.md; norms are of heads of 64 or 128 where they fit."""
    h, i, ff = hidden_dim, inner_dim, 4 * hidden_dim if ff_dim is None else ff_dim

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def head(width: int) -> int:
        """Channels of a head: the published ones', or those of a tiny model of two heads."""
        published = 64 if family == "sd3.5" else 128
        return published if width % published == 0 else width // 2

    def timed(group: str, features: int) -> dict[str, tuple[int, ...]]:
        sizes = {
            "token_dim": token_dim,
            "num_tokens": num_tokens,
            "feature_dim": features,
            "hidden_dim": h,
            "inner_dim": i,
        }
        plus = adapter_shapes("plus", channels=(), ff_dim=ff, depth=depth, **sizes)
        shapes = {group + key.removeprefix("image_proj."): shape for key, shape in plus.items()}
        for n in range(depth):
            shapes |= linear(f"{group}layers.{n}.2.1", 4 * h, h)
        return (
            shapes | linear(f"{group}time_embedding.linear_1", h, 320) | linear(f"{group}time_embedding.linear_2", h, h)
        )

    shapes: dict[str, tuple[int, ...]] = {}
    if family.startswith("xlabs"):
        group = "ip_adapter_proj_model" if family == "xlabs" else "image_proj"
        shapes |= linear(f"{group}.proj", num_tokens * token_dim, feature_dim) | norm(f"{group}.norm", token_dim)
        layer = (
            "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj"
            if family == "xlabs"
            else "ip_adapter.{}.to_{}_ip"
        )
        for n, c in enumerate(channels):
            for part in "kv":
                shapes |= linear(layer.format(n, part), c, token_dim)
    elif family == "instantx":
        shapes |= linear("image_proj.proj.0", 2 * feature_dim, feature_dim)
        shapes |= linear("image_proj.proj.2", num_tokens * token_dim, 2 * feature_dim) | norm(
            "image_proj.norm", token_dim
        )
    elif family == "instantx-resampler":
        sizes = {"token_dim": token_dim, "num_tokens": num_tokens, "feature_dim": feature_dim, "hidden_dim": h}
        shapes |= adapter_shapes("plus", channels=(), inner_dim=i, ff_dim=ff, depth=depth, **sizes)
    elif family == "sd3.5":
        shapes |= timed("image_proj.", feature_dim)
        for n, c in enumerate(channels):
            shapes |= linear(f"ip_adapter.{n}.norm_ip.linear", 2 * token_dim, h)
            shapes |= {f"ip_adapter.{n}.{name}.weight": (head(c),) for name in ("norm_q", "norm_k", "norm_ip_k")}
    elif family == "instantcharacter":
        e = feature_dim
        for kind in ("layer", "scale"):
            for n in range(depth):
                block = f"image_proj.cross_{kind}_blocks.{n}"
                for number in (1, 2, 3):
                    shapes |= norm(f"{block}.norm{number}", e)
                for attn in ("attn1", "attn2"):
                    for part in "qkv":
                        shapes |= linear(f"{block}.{attn}.to_{part}", e, e, bias=False)
                    shapes |= linear(f"{block}.{attn}.to_out.0", e, e)
                shapes |= linear(f"{block}.ff.net.0.proj", 8 * e, e) | linear(f"{block}.ff.net.2", e, 4 * e)
        for name in ("proj", "proj_cross_layer", "proj_cross_scale"):
            shapes |= linear(f"image_proj.{name}.fc1", 2 * e, e) | linear(f"image_proj.{name}.fc2", e, 2 * e)
        shapes |= timed("image_proj.resampler.", e)
        for n, c in enumerate(channels):
            for part in "kv":
                shapes |= linear(f"ip_adapter.{n}.to_{part}_ip", c, token_dim)
            shapes |= {f"ip_adapter.{n}.norm_ip_{part}.scale": (head(c),) for part in "qk"}
    elif family == "anima-character":
        for n, c in enumerate(channels):
            block, lora = f"blocks.{n}", f"lora.base_model.model.blocks.{n}"
            for part in "kv":
                shapes |= linear(f"{block}.ip_{part}_proj", c, token_dim)
            shapes |= linear(f"{block}.adaln_ip.1", c, hidden_dim)
            for attn, context in (("self_attn", c), ("cross_attn", text_dim)) if lora_rank else ():
                for part, width in (("q", c), ("k", context), ("v", context), ("output", c)):
                    shapes[f"{lora}.{attn}.{part}_proj.lora_A.weight"] = (lora_rank, width)
                    shapes[f"{lora}.{attn}.{part}_proj.lora_B.weight"] = (c, lora_rank)
            for layer, rows, columns in (("layer1", 4 * c, c), ("layer2", c, 4 * c)) if lora_rank else ():
                shapes[f"{lora}.mlp.{layer}.lora_A.weight"] = (lora_rank, columns)
                shapes[f"{lora}.mlp.{layer}.lora_B.weight"] = (rows, lora_rank)
    elif family == "anima-pe":
        shapes |= {"resampler.queries": (1, num_tokens, h), "ip_centroid": (feature_dim,)}
        shapes |= linear("resampler.kv_proj", h, feature_dim) | linear("resampler.out", token_dim, h)
        shapes |= norm("resampler.out_norm", h)
        for n in range(depth):
            block = f"resampler.blocks.{n}"
            for name in ("q_norm_x", "kv_norm_x", "norm_s", "norm_f"):
                shapes |= norm(f"{block}.{name}", h)
            for attn in ("xattn", "sattn"):
                shapes |= {f"{block}.{attn}.in_proj_weight": (3 * h, h), f"{block}.{attn}.in_proj_bias": (3 * h,)}
                shapes |= linear(f"{block}.{attn}.out_proj", h, h)
            shapes |= linear(f"{block}.ffn.0", ff, h) | linear(f"{block}.ffn.2", h, ff)
        for n, c in enumerate(channels):
            shapes |= {f"to_{part}_ip.{n}.weight": (c, token_dim) for part in "kv"} | {f"ip_gate.{n}": ()}
    else:
        raise ValueError(family)
    if family in ("instantx", "instantx-resampler", "sd3.5"):
        for n, c in enumerate(channels):
            shapes |= {f"ip_adapter.{n}.to_{part}_ip.weight": (c, token_dim) for part in "kv"}
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
        group, _, rest = key.partition(".")
        if rest:
            groups.setdefault(group, {})[rest] = tensor
        else:
            groups[group] = tensor  # pyright: ignore[reportArgumentType]
    return groups
