"""Tiny SD3.5 transformers of random weights: diffusers' own, and the least of ComfyUI's.

What ComfyUI's blocks do was read in comfy/ldm/modules/diffusionmodules/mmdit.py of 0.33.0 and 0.3.64. ``medium`` has what
SD3.5 Medium has in its first blocks: a second attention, of the picture with itself. tests/host/sd3_parity.py proves the same in
the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from tiny_flux import RMSNorm, randomised

TEXT_DIM, WIDTH, HEADS, BLOCKS, POOLED = 32, 32, 2, 3, 24
CONFIG: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": BLOCKS,
    "attention_head_dim": WIDTH // HEADS, "num_attention_heads": HEADS, "joint_attention_dim": TEXT_DIM,
    "caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
}  # fmt: skip


def diffusers_sd3(*, medium: bool = False, **changes: Any) -> SD3Transformer2DModel:
    dual = {"dual_attention_layers": (0, 1)} if medium else {}
    return randomised(SD3Transformer2DModel(**{**CONFIG, **dual, **changes}))


def call_sd3(model: Any, x: Tensor, timestep: Tensor, text: Tensor, **more: Any) -> Tensor:
    """The model on latents ``b 4 h w`` as pipelines call it."""
    height, width = x.shape[-2:]
    x = F.pad(x, (0, width % 2, 0, height % 2), mode="circular")
    pooled = torch.zeros(len(x), POOLED)
    out = model(x, text, pooled, timestep.expand(len(x)), **more).sample
    return out[..., :height, :width]


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any] | None) -> Tensor:
    """As the host calls its own: queries and keys ``b l c``, values by heads."""

    def plain(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
        q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    override = (options or {}).get("optimized_attention_override")
    if override is None:
        return plain(q, k, v, heads=HEADS)
    return override(plain, q, k, v, heads=HEADS, transformer_options=options)


class SelfAttention(nn.Module):
    def __init__(self, pre_only: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.ln_q, self.ln_k = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        if not pre_only:
            self.proj = nn.Linear(WIDTH, WIDTH)

    def pre_attention(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, -1, self.head_dim).movedim(2, 0)
        return self.ln_q(q).flatten(2), self.ln_k(k).flatten(2), v


class DismantledBlock(nn.Module):
    def __init__(self, *, pre_only: bool = False, x_block_self_attn: bool = False) -> None:
        super().__init__()
        self.pre_only, self.x_block_self_attn = pre_only, x_block_self_attn
        self.attn = SelfAttention(pre_only)
        parts = 2 if pre_only else 9 if x_block_self_attn else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, parts * WIDTH))
        if x_block_self_attn:
            self.attn2 = SelfAttention()
        if not pre_only:
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU("tanh"), nn.Linear(2 * WIDTH, WIDTH))

    def modulations(self, c: Tensor) -> list[Tensor]:
        """Shift and scale of the attention first; then gate, and shift, scale and gate of the MLP; then those of the second attention."""
        return list(self.adaLN_modulation(c)[:, None].chunk(2 if self.pre_only else 9 if self.x_block_self_attn else 6, -1))  # fmt: skip

    def after(self, x: Tensor, attn: Tensor, m: list[Tensor], attn2: Tensor | None = None) -> Tensor:
        x = x + m[2] * self.attn.proj(attn)
        if attn2 is not None:
            x = x + m[8] * self.attn2.proj(attn2)
        return x + m[5] * self.mlp(F.layer_norm(x, (WIDTH,)) * (1 + m[4]) + m[3])


class JointBlock(nn.Module):
    def __init__(self, *, last: bool, medium: bool) -> None:
        super().__init__()
        self.context_block = DismantledBlock(pre_only=last)
        self.x_block = DismantledBlock(x_block_self_attn=medium)

    def forward(self, context: Tensor, x: Tensor, c: Tensor, transformer_options: Any = None) -> tuple[Any, Tensor]:
        of_text, of_picture = self.context_block.modulations(c), self.x_block.modulations(c)
        normed = F.layer_norm(x, (WIDTH,))
        text = self.context_block.attn.pre_attention(F.layer_norm(context, (WIDTH,)) * (1 + of_text[1]) + of_text[0])
        picture = self.x_block.attn.pre_attention(normed * (1 + of_picture[1]) + of_picture[0])
        second = None
        if self.x_block.x_block_self_attn:
            second = self.x_block.attn2.pre_attention(normed * (1 + of_picture[7]) + of_picture[6])
        q, k, v = (torch.cat(pair, 1) for pair in zip(text, picture, strict=True))
        out = attention(q, k, v, transformer_options)
        length = context.shape[1]
        after = None if self.context_block.pre_only else self.context_block.after(context, out[:, :length], of_text)
        alone = None if second is None else attention(*second, transformer_options)
        return after, self.x_block.after(x, out[:, length:], of_picture, alone)


class ComfySD3(nn.Module):
    def __init__(self, *, medium: bool = False) -> None:
        super().__init__()
        self.x_embedder, self.context_embedder = nn.Conv2d(4, WIDTH, 2, stride=2), nn.Linear(TEXT_DIM, WIDTH)
        self.t_embedder = nn.Linear(8, WIDTH)
        self.pos_embed = nn.Parameter(torch.empty(16, 16, WIDTH))
        self.joint_blocks = nn.ModuleList(
            JointBlock(last=i == BLOCKS - 1, medium=medium and i < BLOCKS - 1) for i in range(BLOCKS)
        )
        self.final_layer = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: Any = None) -> Tensor:
        options = dict(transformer_options or {})
        height, width = x.shape[-2:]
        img = self.x_embedder(F.pad(x, (0, width % 2, 0, height % 2), mode="circular"))
        rows, columns = img.shape[-2:]
        top, left = (16 - rows) // 2, (16 - columns) // 2
        img = img.flatten(2).transpose(1, 2) + self.pos_embed[top : top + rows, left : left + columns].flatten(0, 1)
        txt, vec = (
            self.context_embedder(context),
            self.t_embedder(torch.sin(timesteps[:, None] * 0.1 + torch.arange(8.0))),
        )
        replaced = options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.joint_blocks):

            def original(args: dict[str, Any], block: Any = block) -> dict[str, Any]:
                txt, img = block(
                    args["txt"], args["img"], c=args["vec"], transformer_options=args["transformer_options"]
                )
                return {"txt": txt, "img": img}

            args = {"img": img, "txt": txt, "vec": vec, "transformer_options": options}
            occupant = replaced.get(("double_block", i))
            out = original(args) if occupant is None else occupant(args, {"original_block": original})
            txt, img = out["txt"], out["img"]
        out = self.final_layer(img).transpose(1, 2).unflatten(2, (rows, columns))
        return F.pixel_shuffle(out, 2)[..., :height, :width]


def comfy_sd3(*, medium: bool = False) -> ComfySD3:
    return randomised(ComfySD3(medium=medium), 2)
