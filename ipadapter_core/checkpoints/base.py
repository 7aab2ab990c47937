"""Base adapters (``ip-adapter_sd15``, light, vit-G, sdxl, vit-h, noobIPAMARK1): one pooled embedding, a few tokens."""

from __future__ import annotations

import re

from torch import nn

from ..features import IMAGE_EMBEDS
from ..files.state_dict import TensorFile
from .format import AdapterSpec, EncoderSizes, Format, FreshSizes, shape_of, tokens_in
from .projectors import TORCH, ImageProjModel, Operations


class Base(Format):
    name = "base"
    label = "base (linear projector)"
    serves = (("general", 2), ("light", 2), ("style", 1))
    feature = IMAGE_EMBEDS
    unconditional = "zero_embeds"
    anchor = "proj.weight"
    allowed = re.compile(r"(proj|norm)\.(weight|bias)")
    trains = True
    summary = "4 tokens of the whole image"

    def parse(self, file: TensorFile) -> AdapterSpec:
        proj, norm = "image_proj.proj.weight", "image_proj.norm.weight"
        _, feature_dim = shape_of(file.tensors, proj, rank=2)
        num_tokens = tokens_in(file.tensors, proj, norm)
        return self.spec(file.tensors, norm, num_tokens=num_tokens, feature_dim=feature_dim)

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        return ImageProjModel(spec.feature_dim, spec.token_dim, spec.num_tokens, operations=operations)

    def fresh(self, token_dim: int, encoder: EncoderSizes, sizes: FreshSizes) -> tuple[nn.Module, int]:
        num_tokens = sizes.num_tokens or 4
        return ImageProjModel(encoder.projection_dim, token_dim, num_tokens, operations=TORCH), num_tokens


FORMAT = Base()
