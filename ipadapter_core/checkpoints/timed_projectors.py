"""Networks whose image tokens depend on the timestep, and what of them does not.

Attribute names are the key names of released files. Shapes: ``b`` batch, ``e`` feature dim, ``t`` tokens of the image encoder,
``n`` image tokens, ``d`` token dim, ``h`` width of the latents.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .projectors import TORCH, Operations, PerceiverAttention, head_count


class TimestepEmbedding(nn.Module):
    """A timestep 0..1000 as a vector: cosines, then sines, through two layers.

    Source: diffusers' ``Timesteps`` (flip_sin_to_cos, no frequency shift) and ``TimestepEmbedding``.
    """

    def __init__(self, sinusoids: int, width: int, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.sinusoids = sinusoids
        self.linear_1 = operations.Linear(sinusoids, width)
        self.linear_2 = operations.Linear(width, width)

    def forward(self, timestep: float, like: Tensor) -> Tensor:
        """``1 h``, on the device and in the dtype of ``like``."""
        half = self.sinusoids // 2
        # in the order in which diffusers computes it: at 1000 radians a rounding shows in the tokens
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=like.device) / half
        angles = timestep * torch.exp(exponents)
        waves = torch.cat((torch.cos(angles), torch.sin(angles)))[None].to(like.dtype)
        embedding: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return embedding


class TimeResampler(nn.Module):
    """Learned latents read an encoder's tokens; the timestep shifts the tokens and modulates every layer.

    ``forward`` is the part that does not depend on the timestep, ``b t e -> b t h``; ``at`` the rest, ``b t h -> b n d``.
    Source: InstantX/SD3.5-Large-IP-Adapter, resampler.py; diffusers' ``IPAdapterTimeImageProjection``.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_dim: int,
        token_dim: int,
        *,
        queries: int,
        depth: int,
        inner_dim: int,
        ff_dim: int,
        time_dim: int,
        operations: Operations = TORCH,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, queries, hidden_dim))
        self.proj_in = operations.Linear(feature_dim, hidden_dim)
        self.proj_out = operations.Linear(hidden_dim, token_dim)
        self.norm_out = operations.LayerNorm(token_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    PerceiverAttention(hidden_dim, inner_dim, operations=operations),
                    nn.Sequential(
                        operations.LayerNorm(hidden_dim),
                        operations.Linear(hidden_dim, ff_dim, bias=False),
                        nn.GELU(),
                        operations.Linear(ff_dim, hidden_dim, bias=False),
                    ),
                    nn.Sequential(nn.SiLU(), operations.Linear(hidden_dim, 4 * hidden_dim)),
                )
            )
            for _ in range(depth)
        )
        self.time_embedding = TimestepEmbedding(time_dim, hidden_dim, operations=operations)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj_in(features)

    def at(self, constant: Tensor, timestep: float) -> Tensor:
        embedding = self.time_embedding(timestep, constant)
        x = constant + embedding[:, None]
        latents = self.latents.to(x).expand(len(x), -1, -1)
        for layer in self.layers:
            attention, feed_forward, modulation = layer.children()
            shift, scale, ff_shift, ff_scale = modulation(embedding)[:, None].chunk(4, dim=-1)
            latents = attention(x, latents, scale=1 + scale, shift=shift) + latents
            norm, *rest = feed_forward.children()
            y = norm(latents) * (1 + ff_scale) + ff_shift
            for module in rest:
                y = module(y)
            latents = y + latents
        tokens: Tensor = self.norm_out(self.proj_out(latents))
        return tokens


class Attention(nn.Module):
    """Attention of ``b n c`` to ``b t c``, in heads of 64: ``to_q``, ``to_k``, ``to_v`` without a bias, ``to_out.0`` with one."""

    def __init__(self, dim: int, inner: int, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.heads = head_count(inner)
        self.to_q = operations.Linear(dim, inner, bias=False)
        self.to_k = operations.Linear(dim, inner, bias=False)
        self.to_v = operations.Linear(dim, inner, bias=False)
        self.to_out = nn.ModuleList((operations.Linear(inner, dim),))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out: Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class GatedLinear(nn.Module):
    """``proj`` to values and gates; the values times GELU of the gates (GEGLU)."""

    def __init__(self, dim: int, inner: int, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.proj = operations.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.proj(x).chunk(2, dim=-1)
        return values * F.gelu(gates)


class FeedForward(nn.Module):
    """``net.0`` (GEGLU) and ``net.2``, as diffusers names them; between them was a dropout."""

    def __init__(self, dim: int, inner: int, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            (GatedLinear(dim, inner, operations=operations), nn.Identity(), operations.Linear(inner, dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class CrossBlock(nn.Module):
    """A transformer block whose tokens read themselves and then a context.

    Source: diffusers' ``BasicTransformerBlock`` with cross-attention, GEGLU and LayerNorms of epsilon 1e-6.
    """

    def __init__(self, dim: int, inner: int, ff_dim: int, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (operations.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn1, self.attn2 = (Attention(dim, inner, operations=operations) for _ in range(2))
        self.ff = FeedForward(dim, ff_dim, operations=operations)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = self.attn1(normed, normed) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class MLP(nn.Module):
    """``fc1``, tanh-GELU, ``fc2``, as timm names them."""

    def __init__(self, dim: int, hidden: int, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.fc1 = operations.Linear(dim, hidden)
        self.fc2 = operations.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CrossLayerCrossScaleProjector(nn.Module):
    """A picture's tokens read their own shallow layers, and the same picture at twice the size; a TimeResampler reads both.

    The feature is packed, ``b 8n e``: the picture's last states (n), those of three shallow layers (3n), and the last states of
    the larger picture's four parts (4n). ``forward`` is the part that does not depend on the timestep, ``b 8n e -> b 2n h``;
    ``at`` the rest.
    Source: InstantCharacter, models/resampler.py.
    """

    LOW, SHALLOW, HIGH = 1, 3, 4
    PARTS = LOW + SHALLOW + HIGH

    def __init__(
        self,
        dim: int,
        token_dim: int,
        *,
        layer_depth: int,
        scale_depth: int,
        cross_dim: int,
        cross_ff_dim: int,
        mlp_dim: int,
        hidden_dim: int,
        queries: int,
        depth: int,
        inner_dim: int,
        ff_dim: int,
        time_dim: int,
        operations: Operations = TORCH,
    ) -> None:
        super().__init__()

        def stack(blocks: int) -> nn.ModuleList:
            return nn.ModuleList(CrossBlock(dim, cross_dim, cross_ff_dim, operations=operations) for _ in range(blocks))

        self.cross_layer_blocks, self.cross_scale_blocks = stack(layer_depth), stack(scale_depth)
        self.proj, self.proj_cross_layer, self.proj_cross_scale = (
            MLP(dim, mlp_dim, operations=operations) for _ in range(3)
        )
        self.resampler = TimeResampler(
            dim,
            hidden_dim,
            token_dim,
            queries=queries,
            depth=depth,
            inner_dim=inner_dim,
            ff_dim=ff_dim,
            time_dim=time_dim,
            operations=operations,
        )

    def forward(self, packed: Tensor) -> Tensor:
        unit = packed.shape[1] // self.PARTS
        low, shallow, high = packed.split((self.LOW * unit, self.SHALLOW * unit, self.HIGH * unit), dim=1)
        across_layers, across_scales = low, low
        for block in self.cross_layer_blocks:
            across_layers = block(across_layers, shallow)
        for block in self.cross_scale_blocks:
            across_scales = block(across_scales, high)
        whole = self.proj(low) + self.proj_cross_scale(across_scales)
        return self.resampler(torch.cat((whole, self.proj_cross_layer(across_layers)), dim=1))

    def at(self, constant: Tensor, timestep: float) -> Tensor:
        return self.resampler.at(constant, timestep)
