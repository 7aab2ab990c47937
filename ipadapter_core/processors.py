"""The trainable form: one attention processor module per attention of a diffusers UNet, as the original training has it.

``ModuleList(unet.attn_processors.values())`` then numbers its keys ``1.to_k_ip.weight``, ``3.to_v_ip.weight``, … exactly
as released files do, because diffusers lists processors in the order down, up, middle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import KeyValue, Scale, add_image_attention, split_heads

Init = Literal["copy", "zero_v"]


class AttnProcessor(nn.Module):
    """Plain attention without parameters; stands for every self-attention.

    ``attn`` is a diffusers ``Attention``; hidden states are ``b l c`` or ``b c y x``.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        context = encoder_hidden_states
        return _attend(attn, hidden_states, context, attention_mask, temb, lambda base, q: base)


class IPAttnProcessor(nn.Module):
    """Cross-attention over text plus ``scale`` times cross-attention over image tokens.

    ``encoder_hidden_states`` ends in ``num_tokens`` image tokens: ``b (n_text + num_tokens) cross_attention_dim``.
    """

    def __init__(
        self, hidden_size: int, cross_attention_dim: int | None = None, scale: float = 1.0, num_tokens: int = 4
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.cross_attention_dim = cross_attention_dim
        self.scale = scale
        self.num_tokens = num_tokens
        self.to_k_ip = nn.Linear(cross_attention_dim or hidden_size, hidden_size, bias=False)
        self.to_v_ip = nn.Linear(cross_attention_dim or hidden_size, hidden_size, bias=False)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is None or encoder_hidden_states.shape[1] <= self.num_tokens:
            seen = None if encoder_hidden_states is None else encoder_hidden_states.shape[1]
            raise ValueError(
                f"IPAttnProcessor expects text tokens followed by {self.num_tokens} image tokens, got {seen} tokens in all"
            )
        text, image = encoder_hidden_states[:, : -self.num_tokens], encoder_hidden_states[:, -self.num_tokens :]

        def add(base: Tensor, q: Tensor) -> Tensor:
            kv = KeyValue(split_heads(self.to_k_ip(image), attn.heads), split_heads(self.to_v_ip(image), attn.heads))
            return add_image_attention(base, q, kv, attn.heads, Scale(1.0, self.scale, 0.0), None)

        return _attend(attn, hidden_states, text, attention_mask, temb, add)


def _attend(
    attn: Any,
    hidden_states: Tensor,
    context: Tensor | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
    add: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """diffusers' attention contract around ``add(base, q)``: norms, residual and rescaling as the layer asks."""
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
    if image_shape is not None:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    if context is None:
        context = hidden_states
    elif attn.norm_cross:
        context = cast(Tensor, attn.norm_encoder_hidden_states(context))
    q: Tensor = attn.to_q(hidden_states)
    k, v = split_heads(attn.to_k(context), attn.heads), split_heads(attn.to_v(context), attn.heads)
    if attention_mask is not None:
        attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], q.shape[0])
        attention_mask = cast(Tensor, attention_mask).unflatten(0, (q.shape[0], attn.heads))
    base = F.scaled_dot_product_attention(split_heads(q, attn.heads), k, v, attn_mask=attention_mask)
    out = attn.to_out[0](add(base.transpose(1, 2).flatten(2), q))
    out = attn.to_out[1](out)
    if image_shape is not None:
        out = out.transpose(1, 2).reshape(image_shape)
    if attn.residual_connection:
        out = out + residual
    return out / attn.rescale_output_factor


def build_processors(
    unet: Any, *, num_tokens: int = 4, scale: float = 1.0, init: Init = "copy"
) -> dict[str, AttnProcessor | IPAttnProcessor]:
    """Processors for every attention of a UNet2DConditionModel, by the names of ``unet.attn_processors``.

    Hidden sizes come from the block names and ``block_out_channels``. ``to_k_ip``/``to_v_ip`` start as copies of the
    layer's own ``to_k``/``to_v`` (the original's rule), or with a zero V so that step 0 is the base model.
    Install with ``unet.set_attn_processor(...)``.
    """
    widths = list(unet.config.block_out_channels)
    processors: dict[str, AttnProcessor | IPAttnProcessor] = {}
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            processors[name] = AttnProcessor()
            continue
        block = name.split(".")
        if block[0] == "mid_block":
            hidden_size = widths[-1]
        else:
            index = int(block[1])
            hidden_size = widths[index] if block[0] == "down_blocks" else widths[-1 - index]
        attention = unet.get_submodule(name.removesuffix(".processor"))
        processor = IPAttnProcessor(hidden_size, attention.to_k.in_features, scale, num_tokens)
        with torch.no_grad():
            processor.to_k_ip.weight.copy_(attention.to_k.weight)
            if init == "copy":
                processor.to_v_ip.weight.copy_(attention.to_v.weight)
            else:
                processor.to_v_ip.weight.zero_()
        processors[name] = processor.to(attention.to_k.weight.device)
    return processors
