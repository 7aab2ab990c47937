"""A tiny Anima transformer of random weights, the least of ComfyUI's; diffusers has none.

What the blocks do was read in comfy/ldm/cosmos/predict2.py of 0.33.0. tests/host/anima_parity.py proves the same in the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_flux import RMSNorm, randomised

TEXT_DIM, WIDTH, HEADS, BLOCKS = 32, 32, 2, 3


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.n_heads, self.itself = heads, context is None
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(context or width, width, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.output_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, context: Tensor | None, options: Mapping[str, Any]) -> Tensor:
        other = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.n_heads, -1)) for t in (self.q_proj(x), self.k_proj(other), self.v_proj(other))
        )
        if self.itself:  # norm and rotation in one kernel there, and the norms are not called
            q, k = (
                F.rms_norm(t, (t.shape[-1],), norm.weight, 1e-6) for t, norm in ((q, self.q_norm), (k, self.k_norm))
            )
        else:
            q, k = self.q_norm(q), self.k_norm(k)

        def plain(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        override = options.get("optimized_attention_override")
        if override is None:
            return self.output_proj(plain(q, k, v, self.n_heads))
        return self.output_proj(override(plain, q, k, v, self.n_heads, skip_reshape=True, transformer_options=options))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, text: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Attention(width, heads), Attention(width, heads, text)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        for name in ("self_attn", "cross_attn", "mlp"):
            setattr(self, f"adaln_modulation_{name}", nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width)))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, transformer_options: Any = None) -> Tensor:
        options = transformer_options or {}
        mods = {
            name: getattr(self, f"adaln_modulation_{name}")(emb)[:, :, None, None].chunk(3, -1)
            for name in ("self_attn", "cross_attn", "mlp")
        }
        for name in ("self_attn", "cross_attn"):
            shift, scale, gate = mods[name]
            normed = (F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift).flatten(1, 3)
            out = getattr(self, name)(normed, None if name == "self_attn" else context, options)
            x = torch.addcmul(x, gate, out.view_as(x))
        shift, scale, gate = mods["mlp"]
        return torch.addcmul(x, gate, self.mlp(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift))


class ComfyAnima(nn.Module):
    """Latents are ``b 4 t h w`` there; here also ``b 4 h w``, for tests that take all models in turn."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, text: int = TEXT_DIM, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder = nn.Linear(16, width), nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width, heads, text) for _ in range(blocks))
        self.final_layer, self.llm_adapter = nn.Linear(width, 16), nn.Identity()
        self.places = nn.Parameter(torch.empty(16, 16, width))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: Any = None) -> Tensor:
        height, width = x.shape[-2:]
        frames = x if x.ndim == 5 else x[:, :, None]
        frames = F.pad(frames, (0, width % 2, 0, height % 2))
        img = self.x_embedder(F.pixel_unshuffle(frames.movedim(2, 1), 2).movedim(2, -1))
        rows, columns = img.shape[2:4]
        img = img + self.places[:rows, :columns]
        emb = self.t_embedder(torch.sin(timesteps[:, None] * 0.1 + torch.arange(8.0)))[:, None]
        for block in self.blocks:
            img = block(img, emb, context, transformer_options=transformer_options)
        out = F.pixel_shuffle(self.final_layer(img).movedim(-1, 2), 2).movedim(1, 2)[..., :height, :width]
        return out if x.ndim == 5 else out[:, :, 0]


def comfy_anima() -> ComfyAnima:
    return randomised(ComfyAnima(), 2)
