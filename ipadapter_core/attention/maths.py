"""The maths: ``base(q, K_text, V_text) + Σ strength · mask · attend(q, K_image, V_image)``.

Letters: ``b`` batch (chunks of conditionings times latents), ``l`` latent tokens, ``n`` image tokens, ``h`` heads,
``d`` head width, ``c = h d`` channels, ``g`` groups of the batch that share image tokens (``b`` is a multiple of ``g``).
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.unet import REFERENCE_WIDTH
from .schedule import Scaling

NORM_EPS = 1e-6
"""Of the RMS norms of SD3.5, Flux and their adapters."""


@dataclass(frozen=True, slots=True, eq=False)
class OwnKeys:
    """How the picture's own keys join the image's: times ``scale`` (``c``), where ``raw`` after a norm without weight."""

    scale: Tensor
    raw: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class KeyValue:
    """Image keys and values of one site in attention layout, ``g h n d`` each.

    All but these two is None, False or 1 in most families.
    """

    k: Tensor
    v: Tensor
    v_mean: Tensor | None = None
    """Mean of ``v`` over the image tokens, ``g 1 c``; only ``K+mean(V)`` reads it."""
    image_mean: Tensor | None = None
    """Mean of ``v`` over the tokens of each of several images, once per token, ``g h n d``; replaces ``v_mean``."""
    raw_query: bool = False
    """Whether queries come before their norm, whose weight is in ``k`` already."""
    own: OwnKeys | None = None
    gate: Callable[[Tensor], Tensor] | None = None
    """Makes factors ``b t c`` of the result from a block's conditioning ``b t e``."""
    images: int = 1
    """How many references share the n tokens, evenly and one after the other."""

    @property
    def usual(self) -> bool:
        """Whether a query, keys and values are all that there is."""
        return not self.raw_query and self.own is None and self.gate is None


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """``b n (h d)`` to the attention layout ``b h n d``."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Scale:
    """A strength resolved for one site: factor of the keys (of q, equally), of the output, and of the mean value.

    Numbers, or ``b 1 1`` where every member of the batch has a strength of its own.
    """

    key: float | Tensor
    output: float | Tensor
    mean: float | Tensor


def scale_for(scaling: Scaling, weight: float | Tensor, channels: int, reference_width: int = REFERENCE_WIDTH) -> Scale:
    """How a weight acts under a scaling rule (names and formulas as in ComfyUI_IPAdapter_plus).

    ``K+V`` also scales the keys, so weak weights flatten the attention. The C penalty multiplies the weight by
    channels / reference width (1280 in UNets); ``K+mean(V)`` scales keys and only the mean of V (Fooocus' channel penalty). As attention weights
    sum to 1, shifting V's mean shifts the output, hence no rule needs scaled copies of K or V.
    """
    match scaling:
        case "V only":
            return Scale(1.0, weight, 0.0)
        case "K+V":
            return Scale(weight, weight, 0.0)
        case "K+V w/ C penalty":
            penalised = weight * channels / reference_width
            return Scale(penalised, penalised, 0.0)
        case "K+mean(V) w/ C penalty":
            penalised = weight * channels / reference_width
            return Scale(penalised, 1.0, penalised - 1.0)


def query_rows(q: Tensor, heads: int, groups: int, width: int) -> Tensor:
    """Queries ``b l c`` as ``g h (b/g l) d``, ``width`` being d.

    Members that share image tokens are folded into the query length, so K and V are never repeated.
    """
    return q.reshape(groups, -1, heads, width).transpose(1, 2)


def attend(q: Tensor, kv: KeyValue, heads: int, key_scale: float | Tensor = 1.0, rows: Tensor | None = None) -> Tensor:
    """Attention of latent tokens ``b l c`` to image tokens; returns ``b l c``. ``rows`` are the query's, if there already."""
    b, length, channels = q.shape  # numbers: to reshape by a torch.Size takes twice as long
    if isinstance(key_scale, Tensor):
        rows, key_scale = query_rows(q * key_scale, heads, kv.k.shape[0], channels // heads), 1.0
    elif rows is None:
        rows = query_rows(q, heads, kv.k.shape[0], channels // heads)
    if key_scale < 0:  # fused kernels take the row maximum before they scale
        rows, key_scale = -rows, -key_scale
    scale = None if key_scale == 1.0 else key_scale * (channels // heads) ** -0.5
    out = F.scaled_dot_product_attention(rows, kv.k, kv.v, scale=scale)
    return out.transpose(1, 2).reshape(b, length, channels)


def normed(x: Tensor, width: int) -> Tensor:
    """``x`` ``b l c`` with every head's ``width`` numbers divided by their root mean square, computed in fp32 at least."""
    heads = x.unflatten(-1, (-1, width))
    exact = heads if heads.dtype == torch.float64 else heads.float()
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype).flatten(-2)


def attend_jointly(
    q: Tensor, own_k: Tensor, own_v: Tensor, kv: KeyValue, heads: int, key_scale: float | Tensor = 1.0
) -> Tensor:
    """Attention of tokens ``b l c`` to their own keys and values ``b l c`` and to the image's, in one softmax.

    No fused kernel takes keys in two parts, so both are joined anew in every call: ``2 (l + n) c`` numbers a member, little
    beside the attention. ``kv.own`` says how the own keys become the adapter's.
    """
    assert kv.own is not None
    b, length, channels = q.shape
    if kv.own.raw:
        own_k = normed(own_k, channels // heads)
    members = b // kv.k.shape[0]
    image_k, image_v = (t if members == 1 else t.repeat_interleave(members, 0) for t in (kv.k, kv.v))
    k = torch.cat([split_heads(own_k * kv.own.scale, heads), image_k], 2)
    v = torch.cat([split_heads(own_v, heads), image_v], 2)
    if isinstance(key_scale, Tensor):
        q, key_scale = q * key_scale, 1.0
    rows = split_heads(q if key_scale >= 0 else -q, heads)
    scale = None if key_scale == 1.0 else abs(key_scale) * (channels // heads) ** -0.5
    return F.scaled_dot_product_attention(rows, k, v, scale=scale).transpose(1, 2).reshape(b, length, channels)


def with_mean(image: Tensor, q: Tensor, kv: KeyValue, heads: int, scale: Scale) -> Tensor:
    """``image + mean · mean(V)``, ``b l c``."""
    mean = scale.mean
    if isinstance(mean, Tensor):
        return torch.addcmul(image, _mean_part(q, kv, heads, scale), mean)
    return image if mean == 0.0 else torch.add(image, _mean_part(q, kv, heads, scale), alpha=mean)


def gated(image: Tensor, factors: Tensor) -> Tensor:
    """``b l c`` times factors ``b t c``: tokens are of t frames one after the other."""
    frames = factors.shape[1]
    if frames == 1:
        return image * factors
    return (image.unflatten(1, (frames, -1)) * factors[:, :, None]).flatten(1, 2)


def add_image_attention(
    base: Tensor, q: Tensor, kv: KeyValue, heads: int, scale: Scale, mask: Tensor | None, rows: Tensor | None = None
) -> Tensor:
    """``base + mask · (output · attend(q, key·K, V) + mean · mean(V))``, all ``b l c``; mask ``1|b l 1`` or None.

    ``rows`` are ``query_rows`` of ``q`` for ``kv``, where another image prompt on the site made them.
    """
    return add_scaled(base, with_mean(attend(q, kv, heads, scale.key, rows), q, kv, heads, scale), scale.output, mask)


def add_scaled(base: Tensor, image: Tensor, output: float | Tensor, mask: Tensor | None) -> Tensor:
    """``base + mask · output · image``."""
    if isinstance(output, Tensor):
        return torch.addcmul(base, image, output if mask is None else mask * output)
    if mask is None:
        return torch.add(base, image, alpha=output)
    return torch.addcmul(base, image, mask, value=output)


def _mean_part(q: Tensor, kv: KeyValue, heads: int, scale: Scale) -> Tensor:
    if kv.image_mean is not None:
        return attend(q, KeyValue(kv.k, kv.image_mean), heads, scale.key)
    mean = split_mean(kv.v) if kv.v_mean is None else kv.v_mean
    return mean if mean.shape[0] in (1, q.shape[0]) else mean.repeat_interleave(q.shape[0] // mean.shape[0], 0)


def split_mean(v: Tensor) -> Tensor:
    """Mean over the image tokens of values ``g h n d``, as ``g 1 (h d)``."""
    return v.mean(2, keepdim=True).transpose(1, 2).flatten(2)


def inside(tokens: Tensor, part: slice, act: Callable[[Tensor], Tensor]) -> Tensor:
    """A sequence ``b n c`` with ``act`` done to part of its tokens; the input stays as it is."""
    start, stop, _ = part.indices(tokens.shape[1])
    return torch.cat([tokens[:, :start], act(tokens[:, start:stop]), tokens[:, stop:]], 1)
