"""FaceID adapters (`ip-adapter-faceid_*`, `-portrait_*`): one face embedding, a few tokens; most carry a LoRA."""

from __future__ import annotations

import re

from torch import nn

from ..files.state_dict import StateDict
from .embedded_lora import LAYERS_AND_LORA
from .format import AdapterSpec, Format, base_model, divided, layer_channels, shape_of
from .projectors import MLPProjModelFaceId, Operations

MLP_KEYS = r"proj\.[02]\.(weight|bias)|norm\.(weight|bias)"


def parse(state: StateDict) -> AdapterSpec:
    hidden_dim, feature_dim = shape_of(state, "image_proj.proj.0.weight", rank=2)
    rows, _ = shape_of(state, "image_proj.proj.2.weight", rank=2)
    (token_dim,) = shape_of(state, "image_proj.norm.weight", rank=1)
    channels = layer_channels(state, token_dim)
    return AdapterSpec(
        family=FORMAT.name,
        base_model=base_model(token_dim, len(channels)),
        num_tokens=divided(rows, token_dim, "image_proj.proj.2.weight"),
        token_dim=token_dim,
        feature="face",
        feature_dim=feature_dim,
        unconditional="zero_embeds",
        encoder="InsightFace",
        layer_channels=channels,
        options={"hidden_dim": hidden_dim},
    )


def build(spec: AdapterSpec, operations: Operations) -> nn.Module:
    return MLPProjModelFaceId(
        spec.feature_dim, spec.options["hidden_dim"], spec.token_dim, spec.num_tokens, operations=operations
    )


def is_another_family(state: StateDict) -> bool:
    """InstantX' adapter for Flux has the same projector and numbers every layer; Style Components has no keys."""
    return "ip_adapter.0.to_k_ip.weight" in state or "ip_adapter.1.to_k_ip.weight" not in state


FORMAT = Format(
    name="faceid",
    anchor="proj.2.weight",
    allowed=re.compile(MLP_KEYS),
    parse=parse,
    build=build,
    unless=is_another_family,
    layers=LAYERS_AND_LORA,
)
