"""Full-face adapters: `ip-adapter-full-face_sd15`. Every token of the encoder becomes an image token."""

from __future__ import annotations

import re

from torch import nn

from ..features import find_encoder
from ..files.state_dict import StateDict
from .format import AdapterSpec, Format, base_model, layer_channels, shape_of
from .projectors import MLPProjModel, Operations


def parse(state: StateDict) -> AdapterSpec:
    hidden_dim, feature_dim = shape_of(state, "image_proj.proj.0.weight", rank=2)
    (token_dim,) = shape_of(state, "image_proj.proj.3.weight", rank=1)
    channels = layer_channels(state, token_dim)
    encoder = find_encoder("penultimate", feature_dim)
    return AdapterSpec(
        family=FORMAT.name,
        base_model=base_model(token_dim, len(channels)),
        # An MLP takes any number of tokens, so the shapes tell it only by way of the encoder.
        num_tokens=0 if encoder is None else encoder.tokens,
        token_dim=token_dim,
        feature="penultimate",
        feature_dim=feature_dim,
        unconditional="zero_pixels",
        encoder="custom" if encoder is None else encoder.name,
        layer_channels=channels,
        options={"hidden_dim": hidden_dim},
    )


def build(spec: AdapterSpec, operations: Operations) -> nn.Module:
    return MLPProjModel(spec.feature_dim, spec.options["hidden_dim"], spec.token_dim, operations=operations)


FORMAT = Format(
    name="full-face",
    anchor="proj.3.weight",
    allowed=re.compile(r"proj\.[023]\.(weight|bias)"),
    parse=parse,
    build=build,
)
