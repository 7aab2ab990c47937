"""The maths: ``base(q, K_text, V_text) + Σ strength · mask · attend(q, K_image, V_image)``.

Letters: ``b`` batch (chunks of conditionings times latents), ``l`` latent tokens, ``n`` image tokens, ``h`` heads,
``d`` head width, ``c = h d`` channels, ``g`` groups of the batch that share image tokens (``b`` is a multiple of ``g``).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.unet import REFERENCE_WIDTH
from .schedule import Scaling


@dataclass(frozen=True, slots=True, eq=False)
class KeyValue:
    """Image keys and values of one site in attention layout, ``g h n d`` each."""

    k: Tensor
    v: Tensor
    v_mean: Tensor | None = None
    """Mean of ``v`` over the image tokens, ``g 1 c``; only ``K+mean(V)`` reads it."""
    image_mean: Tensor | None = None
    """Mean of ``v`` over the tokens of each of several images, once per token, ``g h n d``; replaces ``v_mean``."""


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


def add_image_attention(
    base: Tensor, q: Tensor, kv: KeyValue, heads: int, scale: Scale, mask: Tensor | None, rows: Tensor | None = None
) -> Tensor:
    """``base + mask · (output · attend(q, key·K, V) + mean · mean(V))``, all ``b l c``; mask ``1|b l 1`` or None.

    ``rows`` are ``query_rows`` of ``q`` for ``kv``, where another image prompt on the site made them.
    """
    image = attend(q, kv, heads, scale.key, rows)
    output, mean = scale.output, scale.mean
    if isinstance(mean, Tensor) or mean != 0.0:
        if isinstance(mean, Tensor):
            image = torch.addcmul(image, _mean_part(q, kv, heads, scale), mean)
        else:
            image = torch.add(image, _mean_part(q, kv, heads, scale), alpha=mean)
    if isinstance(output, Tensor):
        return torch.addcmul(base, image, output if mask is None else mask * output)
    if mask is None:
        return torch.add(base, image, alpha=output)
    return torch.addcmul(base, image, mask, value=output)


AddImage = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(base, q, query_rows of q)`` to the base with one image's attention added."""


def adding(kv: KeyValue, heads: int, scale: Scale, mask: Tensor | None, folded: bool) -> AddImage:
    """``add_image_attention`` with all that is known before the query; ``folded``: members of the batch share image tokens.

    The usual case is no more than the calls that it needs: Python between them is what a GPU waits for.
    """
    key, output, mean, k, v = scale.key, scale.output, scale.mean, kv.k, kv.v
    if (
        folded
        or mask is not None
        or isinstance(key, Tensor)
        or isinstance(output, Tensor)
        or isinstance(mean, Tensor)
        or key < 0
        or mean != 0.0
    ):
        return lambda base, q, rows: add_image_attention(base, q, kv, heads, scale, mask, rows)
    kernel_scale = None if key == 1.0 else key * k.shape[-1] ** -0.5

    def add(base: Tensor, q: Tensor, rows: Tensor) -> Tensor:
        image = F.scaled_dot_product_attention(rows, k, v, scale=kernel_scale)
        return torch.add(base, image.transpose(1, 2).flatten(2), alpha=output)

    return add


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
