"""Base adapters (`ip-adapter_sd15`, light, vit-G, sdxl, vit-h, noobIPAMARK1): one pooled embedding, a few tokens."""

from __future__ import annotations

import re

from torch import nn

from ..files.state_dict import StateDict
from .format import AdapterSpec, Format, base_model, divided, encoder_name, layer_channels, shape_of
from .projectors import ImageProjModel, Operations


def parse(state: StateDict) -> AdapterSpec:
    rows, feature_dim = shape_of(state, "image_proj.proj.weight", rank=2)
    (token_dim,) = shape_of(state, "image_proj.norm.weight", rank=1)
    channels = layer_channels(state, token_dim)
    return AdapterSpec(
        family=FORMAT.name,
        base_model=base_model(token_dim, len(channels)),
        num_tokens=divided(rows, token_dim, "image_proj.proj.weight"),
        token_dim=token_dim,
        feature="image_embeds",
        feature_dim=feature_dim,
        unconditional="zero_embeds",
        encoder=encoder_name("image_embeds", feature_dim),
        layer_channels=channels,
    )


def build(spec: AdapterSpec, operations: Operations) -> nn.Module:
    return ImageProjModel(spec.feature_dim, spec.token_dim, spec.num_tokens, operations=operations)


FORMAT = Format(
    name="base",
    anchor="proj.weight",
    allowed=re.compile(r"(proj|norm)\.(weight|bias)"),
    parse=parse,
    build=build,
)
