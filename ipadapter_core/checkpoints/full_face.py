"""Full-face adapters: ``ip-adapter-full-face_sd15``. Every token of the encoder becomes an image token."""

from __future__ import annotations

import re

from torch import nn

from ..features import PENULTIMATE, find_encoder
from ..files.state_dict import TensorFile
from .format import AdapterSpec, EncoderSizes, Format, FreshSizes, shape_of
from .projectors import MLPProjModel, Operations


class FullFace(Format):
    name = "full-face"
    label = "full-face (MLP, every encoder token)"
    serves = (("face", 2),)
    feature = PENULTIMATE
    unconditional = "zero_pixels"
    anchor = "proj.3.weight"
    allowed = re.compile(r"proj\.[023]\.(weight|bias)")
    trains = True
    summary = "all encoder tokens"

    def parse(self, file: TensorFile) -> AdapterSpec:
        hidden_dim, feature_dim = shape_of(file.tensors, "image_proj.proj.0.weight", rank=2)
        shape_of(file.tensors, norm := "image_proj.proj.3.weight", rank=1)
        # An MLP takes any number of tokens, so the shapes tell it only by way of the encoder.
        encoder = find_encoder("penultimate", feature_dim)
        num_tokens = 0 if encoder is None else encoder.tokens
        options = {"hidden_dim": hidden_dim}
        return self.spec(file.tensors, norm, num_tokens=num_tokens, feature_dim=feature_dim, options=options)

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        return MLPProjModel(spec.feature_dim, spec.options["hidden_dim"], spec.token_dim, operations=operations)

    def fresh(self, token_dim: int, encoder: EncoderSizes, sizes: FreshSizes) -> tuple[nn.Module, int]:
        return MLPProjModel(encoder.hidden_size, encoder.hidden_size, token_dim), encoder.tokens


FORMAT = FullFace()
