"""Image features to image tokens: the networks that IP-Adapter files call ``image_proj``.

Attribute names are the key names of released files, so a ``state_dict()`` here is an ``image_proj`` group there.
Shapes in the docstrings: ``b`` batch, ``e`` feature dim, ``t`` tokens of the image encoder, ``n`` image tokens, ``d`` token dim.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Operations(Protocol):
    """Where layers come from: ``torch.nn``, ``comfy.ops.manual_cast``, or anything else with these two constructors."""

    @property
    def Linear(self) -> Any: ...

    @property
    def LayerNorm(self) -> Any: ...


TORCH: Operations = torch.nn
"""torch.nn as ``Operations``: the default everywhere."""

MOST_AT_ONCE = 2**26
"""Numbers of a matrix that are brought to an input's device and dtype at once: 128 MB in float16."""


def linear_in_pieces(layer: Any, x: Tensor) -> Tensor:
    """What a linear layer gives, computed by rows of its weight, so that no second copy of a huge one is made.

    InstantX' one matrix has 1.2 billion numbers; layers that cast their weights (ComfyUI's) would hold it twice.
    """
    rows = max(1, MOST_AT_ONCE // layer.weight.shape[1])
    if len(layer.weight) <= rows:
        return layer(x)
    pieces = zip(layer.weight.split(rows), layer.bias.split(rows), strict=True)
    return torch.cat([F.linear(x, weight.to(x), bias.to(x)) for weight, bias in pieces], -1)


DIM_HEAD = 64
"""Channels per attention head in every released resampler; only their number varies (12, 20, …)."""


def rms_norm(x: Tensor, heads: int, epsilon: float, weight: Tensor | None = None, *, outside: bool = False) -> Tensor:
    """``b n c`` divided by its root mean square over each head's channels, in float32; times ``weight`` (one head's channels).

    ``epsilon`` is added to the mean square, or ``outside``, to its root.
    """
    parts = x.float().unflatten(-1, (heads, -1))
    square = parts.square().mean(-1, keepdim=True)
    parts = parts / (square.sqrt() + epsilon if outside else (square + epsilon).sqrt())
    return (parts if weight is None else parts * weight.to(parts)).flatten(-2).to(x.dtype)


def head_count(inner: int) -> int:
    """Number of attention heads of a resampler with ``inner`` attention channels.

    Released files use 64 channels per head. A width that 64 does not divide (only tiny test models have one) cannot be
    split by that rule and is read as one single head.
    """
    return inner // DIM_HEAD if inner % DIM_HEAD == 0 else 1


class ImageProjModel(nn.Module):
    """Base adapters: one pooled image embedding to ``num_tokens`` tokens, ``b e -> b n d``.

    Source: tencent ip_adapter/ip_adapter.py; https://arxiv.org/abs/2308.06721, section 3.2.
    """

    def __init__(self, feature_dim: int, token_dim: int, num_tokens: int, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.token_dim = token_dim
        self.proj = operations.Linear(feature_dim, num_tokens * token_dim)
        self.norm = operations.LayerNorm(token_dim)

    def forward(self, image_embeds: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.proj(image_embeds).unflatten(-1, (self.num_tokens, self.token_dim)))
        return tokens


class MLPProjModel(nn.Module):
    """Full-face adapters: every encoder token becomes one image token, ``b t e -> b t d``.

    Source: tencent ip_adapter/ip_adapter.py.
    """

    def __init__(self, feature_dim: int, hidden_dim: int, token_dim: int, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.Linear(feature_dim, hidden_dim),
            nn.GELU(),
            operations.Linear(hidden_dim, token_dim),
            operations.LayerNorm(token_dim),
        )

    def forward(self, penultimate: Tensor) -> Tensor:
        return self.proj(penultimate)


class PerceiverAttention(nn.Module):
    """Latents attend to the image tokens and to themselves, ``(b t h, b n h) -> b n h``.

    Where a timestep modulates them, the normed latents are multiplied by ``scale`` and ``shift`` is added; there are many of
    these, so their scores are never held.
    """

    def __init__(self, dim: int, inner: int, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.heads = head_count(inner)
        self.norm1 = operations.LayerNorm(dim)
        self.norm2 = operations.LayerNorm(dim)
        self.to_q = operations.Linear(dim, inner, bias=False)
        self.to_kv = operations.Linear(dim, inner * 2, bias=False)
        self.to_out = operations.Linear(inner, dim, bias=False)

    def forward(
        self, x: Tensor, latents: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        latents = self.norm2(latents)
        if scale is not None and shift is not None:
            latents = latents * scale + shift
        q = self._split(self.to_q(latents))
        k, v = (self._split(part) for part in self.to_kv(torch.cat((self.norm1(x), latents), dim=1)).chunk(2, dim=-1))
        # The root of the scale on q and on k, before the product: in fp16 the product of unscaled ones can overflow.
        root = q.shape[-1] ** -0.25
        q, k = q * root, k * root
        if scale is None:
            read = torch.softmax((q @ k.mT).float(), dim=-1).to(v.dtype) @ v
        else:
            read = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        out: Tensor = self.to_out(read.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


RESAMPLER_KEYS = (
    r"(proj_in|proj_out|norm_out)\.(weight|bias)|layers\.(0|[1-9][0-9]{0,3})\."
    r"(0\.(norm1|norm2)\.(weight|bias)|0\.to_(q|kv|out)\.weight|1\.0\.(weight|bias)|1\.[13]\.weight)"
)
"""The names of a resampler's weights, latents aside."""


def _perceiver_layers(dim: int, inner_dim: int, ff_dim: int, depth: int, operations: Operations) -> nn.ModuleList:
    """``depth`` pairs of an attention and a feed-forward network, ``dim`` wide."""
    return nn.ModuleList(
        nn.ModuleList(
            (
                PerceiverAttention(dim, inner_dim, operations=operations),
                nn.Sequential(
                    operations.LayerNorm(dim),
                    operations.Linear(dim, ff_dim, bias=False),
                    nn.GELU(),
                    operations.Linear(ff_dim, dim, bias=False),
                ),
            )
        )
        for _ in range(depth)
    )


def _read(layers: nn.ModuleList, x: Tensor, latents: Tensor) -> Tensor:
    """Latents ``b n h`` after they have read tokens ``b t h``, layer by layer."""
    for layer in layers:
        attention, feed_forward = layer.children()
        latents = attention(x, latents) + latents
        latents = feed_forward(latents) + latents
    return latents


class Resampler(nn.Module):
    """Plus adapters: ``queries`` learned latents read the encoder's penultimate tokens, ``b t e -> b n d``.

    ``hidden_dim`` is the width of the latents, ``inner_dim`` the width of the attention (heads × 64), ``ff_dim`` the width
    of the feed-forward (4 × hidden in released files).
    Source: tencent ip_adapter/resampler.py, after the Perceiver resampler of open_flamingo.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_dim: int,
        token_dim: int,
        *,
        queries: int = 16,
        depth: int = 4,
        inner_dim: int | None = None,
        ff_dim: int | None = None,
        operations: Operations = TORCH,
    ) -> None:
        super().__init__()
        inner_dim = hidden_dim if inner_dim is None else inner_dim
        ff_dim = 4 * hidden_dim if ff_dim is None else ff_dim
        self.latents = nn.Parameter(torch.randn(1, queries, hidden_dim) / hidden_dim**0.5)
        self.proj_in = operations.Linear(feature_dim, hidden_dim)
        self.proj_out = operations.Linear(hidden_dim, token_dim)
        self.norm_out = operations.LayerNorm(token_dim)
        self.layers = _perceiver_layers(hidden_dim, inner_dim, ff_dim, depth, operations)

    def forward(self, penultimate: Tensor) -> Tensor:
        x: Tensor = self.proj_in(penultimate)
        latents = self.latents.to(x).expand(len(x), -1, -1)
        tokens: Tensor = self.norm_out(self.proj_out(_read(self.layers, x, latents)))
        return tokens


class MLPProjModelFaceId(nn.Module):
    """FaceID adapters: a face embedding to ``num_tokens`` tokens, ``b e`` or ``b 1 e`` -> ``b n d``.

    Source: tencent ip_adapter/ip_adapter_faceid.py.
    """

    def __init__(
        self, face_dim: int, hidden_dim: int, token_dim: int, num_tokens: int, *, operations: Operations = TORCH
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.token_dim = token_dim
        self.proj = nn.Sequential(
            operations.Linear(face_dim, hidden_dim),
            nn.GELU(),
            operations.Linear(hidden_dim, num_tokens * token_dim),
        )
        self.norm = operations.LayerNorm(token_dim)

    def forward(self, face: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.proj(face).reshape(-1, self.num_tokens, self.token_dim))
        return tokens


class FacePerceiverResampler(nn.Module):
    """Given latents read an encoder's tokens, ``(b n d, b t e) -> b n d``: a Resampler without latents of its own."""

    def __init__(
        self, dim: int, feature_dim: int, *, depth: int, inner_dim: int, ff_dim: int, operations: Operations = TORCH
    ) -> None:
        super().__init__()
        self.proj_in = operations.Linear(feature_dim, dim)
        self.proj_out = operations.Linear(dim, dim)
        self.norm_out = operations.LayerNorm(dim)
        self.layers = _perceiver_layers(dim, inner_dim, ff_dim, depth, operations)

    def forward(self, latents: Tensor, penultimate: Tensor) -> Tensor:
        x: Tensor = self.proj_in(penultimate)
        tokens: Tensor = self.norm_out(self.proj_out(_read(self.layers, x, latents)))
        return tokens


class PooledTokens(MLPProjModelFaceId):
    """A FaceID projector of many tokens (InstantX): its last matrix is applied in pieces."""

    def forward(self, face: Tensor) -> Tensor:
        first, gelu, last = self.proj.children()
        hidden = linear_in_pieces(last, gelu(first(face)))
        tokens: Tensor = self.norm(hidden.reshape(-1, self.num_tokens, self.token_dim))
        return tokens


class ProjModelFaceIdPlus(nn.Module):
    """FaceID Plus: the face's tokens read the encoder's tokens of its crop; v2 adds ``scale`` times that to themselves.

    The input is packed, ``b (1 + t) e``: row 0 begins with the face embedding, the others are the encoder's tokens.
    Source: tencent ip_adapter/ip_adapter_faceid.py.
    """

    def __init__(
        self,
        feature_dim: int,
        token_dim: int,
        num_tokens: int,
        *,
        face_dim: int,
        hidden_dim: int,
        depth: int,
        inner_dim: int,
        ff_dim: int,
        shortcut: bool,
        operations: Operations = TORCH,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.token_dim = token_dim
        self.face_dim = face_dim
        self.shortcut = shortcut
        self.proj = nn.Sequential(
            operations.Linear(face_dim, hidden_dim),
            nn.GELU(),
            operations.Linear(hidden_dim, num_tokens * token_dim),
        )
        self.norm = operations.LayerNorm(token_dim)
        self.perceiver_resampler = FacePerceiverResampler(
            token_dim, feature_dim, depth=depth, inner_dim=inner_dim, ff_dim=ff_dim, operations=operations
        )

    def forward(self, packed: Tensor, scale: float = 1.0) -> Tensor:
        face = self.proj(packed[:, 0, : self.face_dim])
        tokens: Tensor = self.norm(face.reshape(-1, self.num_tokens, self.token_dim))
        read: Tensor = self.perceiver_resampler(tokens, packed[:, 1:])
        return tokens + scale * read if self.shortcut else read


class PackedAttention(nn.Module):
    """Attention with one matrix for queries, keys and values, as torch's MultiheadAttention names it."""

    def __init__(self, dim: int, heads: int, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = operations.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        weights, biases = self.in_proj_weight.to(x).chunk(3), self.in_proj_bias.to(x).chunk(3)
        q, k, v = (
            F.linear(source, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for source, weight, bias in zip((x, context, context), weights, biases, strict=True)
        )
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class QueryBlock(nn.Module):
    """Queries read an encoder's tokens, then themselves, then pass a feed-forward network."""

    def __init__(self, dim: int, ff_dim: int, heads: int, *, operations: Operations = TORCH) -> None:
        super().__init__()
        self.q_norm_x, self.kv_norm_x, self.norm_s, self.norm_f = (operations.LayerNorm(dim) for _ in range(4))
        self.xattn, self.sattn = (PackedAttention(dim, heads, operations=operations) for _ in range(2))
        self.ffn = nn.Sequential(operations.Linear(dim, ff_dim), nn.GELU(), operations.Linear(ff_dim, dim))

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        q = q + self.xattn(self.q_norm_x(q), self.kv_norm_x(kv))
        normed = self.norm_s(q)
        q = q + self.sattn(normed, normed)
        return q + self.ffn(self.norm_f(q))


class QueryResampler(nn.Module):
    """``queries`` learned vectors read an encoder's tokens, ``b t e -> b n d``.

    Source: sorryhyun/anima_lora, library/vision/resampler.py.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_dim: int,
        token_dim: int,
        *,
        queries: int,
        depth: int,
        ff_dim: int,
        heads: int,
        operations: Operations = TORCH,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, queries, hidden_dim))
        self.kv_proj = operations.Linear(feature_dim, hidden_dim)
        self.blocks = nn.ModuleList(QueryBlock(hidden_dim, ff_dim, heads, operations=operations) for _ in range(depth))
        self.out_norm = operations.LayerNorm(hidden_dim)
        self.out = operations.Linear(hidden_dim, token_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        kv = self.kv_proj(tokens)
        q = self.queries.to(kv).expand(len(kv), -1, -1)
        for block in self.blocks:
            q = block(q, kv)
        return self.out(self.out_norm(q))


class CentredResampler(nn.Module):
    """A QueryResampler of an encoder's tokens less the mean token of the training's pictures (zeros where none was taken).

    Source: sorryhyun/anima_lora, networks/methods/ip_adapter.py.
    """

    def __init__(self, feature_dim: int, *, operations: Operations = TORCH, **sizes: int) -> None:
        super().__init__()
        self.resampler = QueryResampler(feature_dim, operations=operations, **sizes)
        self.ip_centroid = nn.Parameter(torch.empty(feature_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.resampler(tokens - self.ip_centroid.to(tokens))
