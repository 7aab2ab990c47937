"""FaceID adapters (``ip-adapter-faceid_*``, ``-portrait_*``): one face embedding, a few tokens; most carry a LoRA."""

from __future__ import annotations

import re

from torch import nn

from ..features import FACE
from ..files.state_dict import TensorFile
from .containers import is_value_only
from .embedded_lora import CarriesLoRA
from .format import AdapterSpec, shape_of, tokens_in
from .projectors import MLPProjModelFaceId, Operations

MLP_KEYS = r"proj\.[02]\.(weight|bias)|norm\.(weight|bias)"


class FaceID(CarriesLoRA):
    name = "faceid"
    label = "FaceID (face embedding; 16 tokens: portrait)"
    serves = (("faceid", 1),)
    feature = FACE
    unconditional = "zero_embeds"
    anchor = "proj.2.weight"
    allowed = re.compile(MLP_KEYS)
    encoder = "InsightFace"

    def marks(self, file: TensorFile) -> bool:
        """Style Components have the same projector."""
        return not is_value_only(file.tensors)

    def parse(self, file: TensorFile) -> AdapterSpec:
        hidden_dim, feature_dim = shape_of(file.tensors, "image_proj.proj.0.weight", rank=2)
        norm = "image_proj.norm.weight"
        num_tokens = tokens_in(file.tensors, "image_proj.proj.2.weight", norm)
        options = {"hidden_dim": hidden_dim}
        return self.spec(file.tensors, norm, num_tokens=num_tokens, feature_dim=feature_dim, options=options)

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        sizes = spec.feature_dim, spec.options["hidden_dim"], spec.token_dim, spec.num_tokens
        return MLPProjModelFaceId(*sizes, operations=operations)


FORMAT = FaceID()
