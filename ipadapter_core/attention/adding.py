"""What one image prompt does at one site, with all of it resolved but what the model computes in the call."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import AddImage, SiteCall
from .maths import (
    KeyValue,
    Scale,
    add_image_attention,
    add_scaled,
    attend,
    attend_jointly,
    gated,
    normed,
    with_mean,
)


def adding(kv: KeyValue, heads: int, scale: Scale, mask: Tensor | None, folded: bool) -> AddImage:
    """``add_image_attention`` with all that is known before the query; ``folded``: members of the batch share image tokens.

    The usual case is no more than the calls that it needs: Python between them is what a GPU waits for.
    """
    if not kv.usual:
        return _unusual(kv, heads, scale, mask)
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
        return lambda base, at, rows: add_image_attention(base, at.q, kv, heads, scale, mask, rows)
    kernel_scale = None if key == 1.0 else key * k.shape[-1] ** -0.5

    def add(base: Tensor, at: SiteCall, rows: Tensor) -> Tensor:
        image = F.scaled_dot_product_attention(rows, k, v, scale=kernel_scale)
        return torch.add(base, image.transpose(1, 2).flatten(2), alpha=output)

    return add


def _unusual(kv: KeyValue, heads: int, scale: Scale, mask: Tensor | None) -> AddImage:
    """The same with norms of the adapter's own, the picture's own keys, or a gate."""
    width = kv.k.shape[-1]

    def add(base: Tensor, at: SiteCall, rows: Tensor) -> Tensor:
        q = normed(at.q, width) if kv.raw_query else at.q
        if kv.own is None:
            image = attend(q, kv, heads, scale.key, None if kv.raw_query else rows)
        else:
            assert at.k is not None, "the door gave no own keys"
            assert at.v is not None, "the door gave no own values"
            image = attend_jointly(q, at.k, at.v, kv, heads, scale.key)
        image = with_mean(image, q, kv, heads, scale)
        if kv.gate is not None:
            assert at.emb is not None, "the door gave no conditioning"
            image = gated(image, kv.gate(at.emb).to(image))
        return add_scaled(base, image, scale.output, mask)

    return add


def attending(kv: KeyValue, heads: int, scale: Scale, folded: bool) -> list[AddImage]:
    """How much of the attention to the image goes to each of its references: column r of every head, in place of a value.

    Nothing for a single one. Heads narrower than there are references make several.
    """
    if kv.images == 1:
        return []
    *_, n, width = kv.k.shape
    owner = torch.arange(n, device=kv.k.device).div(n // kv.images, rounding_mode="floor")[:, None]
    found: list[AddImage] = []
    for first in range(0, kv.images, width):
        of = owner == torch.arange(first, first + width, device=owner.device)
        v = of.to(kv.v.dtype).expand_as(kv.v).contiguous()
        just = replace(kv, v=v, v_mean=None, image_mean=None, gate=None)
        found.append(adding(just, heads, replace(scale, output=1.0, mean=0.0), None, folded))
    return found


def on_chunks(add: AddImage, chunks: Sequence[int], count: int, groups: int, width: int) -> AddImage:
    """``add`` for those of ``count`` equal chunks of the batch that see an image; the others stay as they are, to the bit.

    ``groups`` and ``width`` are those of their query rows.
    """

    def on_some(base: Tensor, at: SiteCall, rows: Tensor) -> Tensor:
        def some(tensor: Tensor) -> Tensor:
            parts = tensor.chunk(count)
            return parts[chunks[0]] if len(chunks) == 1 else torch.cat([parts[chunk] for chunk in chunks])

        def maybe(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] == 1 else some(tensor)

        few = replace(at, q=some(at.q), k=maybe(at.k), v=maybe(at.v), emb=maybe(at.emb), _rows=None)
        added = add(some(base), few, few.rows(groups, width)).chunk(len(chunks))
        parts = list(base.chunk(count))
        for chunk, part in zip(chunks, added, strict=True):
            parts[chunk] = part
        return torch.cat(parts)

    return on_some
