"""The trainable form: one attention processor module per attention of a diffusers UNet, as the original training has it.

``ModuleList(unet.attn_processors.values())`` then numbers its keys ``1.to_k_ip.weight``, ``3.to_v_ip.weight``, … exactly
as released files do, because diffusers lists processors in the order down, up, middle.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.maths import KeyValue, Scale, add_image_attention, split_heads
from ..errors import InvalidInputError
from ..lora.selector import Selector, parse_selector
from ..lora.targets import targets_of
from ..lora.trainable import LoRALinearLayer, TrainableLoRA, layer_for, trainable

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


class LoRAAttnProcessor(nn.Module):
    """Attention with a LoRA layer on each of its four projections: ``to_q(x) + scale · to_q_lora(x)``, and so on.

    ``hidden_size`` is the attention's width, ``cross_attention_dim`` the context's (None: self-attention). The scale is
    the processor's own, or of one call through ``cross_attention_kwargs={"lora_scale": 0.0}`` (diffusers keeps the name
    ``scale`` for itself). At 0 the layers are not run at all.
    """

    def __init__(
        self,
        hidden_size: int,
        cross_attention_dim: int | None = None,
        rank: int = 4,
        network_alpha: float | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.cross_attention_dim = cross_attention_dim
        self.rank = rank
        self.scale = scale
        context = cross_attention_dim or hidden_size
        self.to_q_lora = LoRALinearLayer(hidden_size, hidden_size, rank, network_alpha)
        self.to_k_lora = LoRALinearLayer(context, hidden_size, rank, network_alpha)
        self.to_v_lora = LoRALinearLayer(context, hidden_size, rank, network_alpha)
        self.to_out_lora = LoRALinearLayer(hidden_size, hidden_size, rank, network_alpha)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        lora_scale: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        scale = self.scale if lora_scale is None else lora_scale

        def project(name: str, layer: Any, x: Tensor) -> Tensor:
            out: Tensor = layer(x)
            return out if scale == 0 else out + scale * getattr(self, f"{name}_lora")(x)

        return _attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb, lambda base, q: base, project)


def _attend(
    attn: Any,
    hidden_states: Tensor,
    context: Tensor | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
    add: Callable[[Tensor, Tensor], Tensor],
    project: Callable[[str, Any, Tensor], Tensor] = lambda name, layer, x: layer(x),
) -> Tensor:
    """diffusers' attention contract around ``add(base, q)``: norms, residual and rescaling as the layer asks.

    ``project(name, layer, x)`` runs the four projections, so that a LoRA can add to each.
    """
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
    q = project("to_q", attn.to_q, hidden_states)
    k, v = (split_heads(project(name, getattr(attn, name), context), attn.heads) for name in ("to_k", "to_v"))
    if attention_mask is not None:
        attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], q.shape[0])
        attention_mask = cast(Tensor, attention_mask).unflatten(0, (q.shape[0], attn.heads))
    base = F.scaled_dot_product_attention(split_heads(q, attn.heads), k, v, attn_mask=attention_mask)
    out = project("to_out", attn.to_out[0], add(base.transpose(1, 2).flatten(2), q))
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

    ``to_k_ip``/``to_v_ip`` start as copies of the
    layer's own ``to_k``/``to_v`` (the original's rule), or with a zero V so that step 0 is the base model.
    Install with ``unet.set_attn_processor(...)``.
    """
    processors: dict[str, AttnProcessor | IPAttnProcessor] = {}
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            processors[name] = AttnProcessor()
            continue
        attention = unet.get_submodule(name.removesuffix(".processor"))
        processor = IPAttnProcessor(attention.to_q.out_features, attention.to_k.in_features, scale, num_tokens)
        with torch.no_grad():
            processor.to_k_ip.weight.copy_(attention.to_k.weight)
            if init == "copy":
                processor.to_v_ip.weight.copy_(attention.to_v.weight)
            else:
                processor.to_v_ip.weight.zero_()
        processors[name] = processor.to(attention.to_k.weight.device)
    return processors


def build_lora(
    unet: Any, *, rank: int = 4, alpha: float | None = None, where: Selector | None = None, install: bool = True
) -> TrainableLoRA:
    """LoRA layers on a frozen UNet2DConditionModel, collected for an optimiser; the UNet's own parameters are frozen.

    ``where`` chooses layers (None: all attentions, ``attn``). An attention of which all four projections are chosen gets
    a ``LoRAAttnProcessor``, with no context width for ``attn1``; all other
    linears and convolutions of resnets, transformers and samplers get a layer beside them.
    """
    unet.requires_grad_(False)
    targets = targets_of(unet).targets
    selector = where or parse_selector("all: 0, attn: 1")
    chosen = {target.path: target for target in trainable(selector.chosen(targets.values()))}
    layers: dict[str, nn.Module] = {}
    processors: dict[str, Any] = dict(unet.attn_processors)
    ours: list[LoRAAttnProcessor] = []
    for name in unet.attn_processors:
        site = name.removesuffix(".processor")
        projections = [f"{site}.{projection}" for projection in ("to_q", "to_k", "to_v", "to_out.0")]
        if not all(path in chosen for path in projections):
            continue
        context = None if site.endswith("attn1") else unet.config.cross_attention_dim
        to_q = unet.get_submodule(projections[0])
        processor = LoRAAttnProcessor(to_q.out_features, context, rank, alpha)
        weight = to_q.weight
        processors[name] = processor.to(weight.device)
        ours.append(processor)
        layers |= {f"{name}.{part}": getattr(processor, part) for part in _PARTS}
        for path in projections:
            chosen.pop(path)
    beside: list[tuple[nn.Module, nn.Module]] = []
    for path in chosen:
        module = unet.get_submodule(path)
        lora = layers[f"{path}.lora"] = layer_for(module, rank, alpha).to(module.weight.device)
        beside.append((module, lora))
    if not layers:
        raise InvalidInputError(
            "the selector chooses no layer that can be trained; write for example 'all: 0, attn2: 1'"
        )
    if install and ours:
        unet.set_attn_processor(processors)
    return TrainableLoRA(layers, ours, beside if install else ())


_PARTS = ("to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora")
