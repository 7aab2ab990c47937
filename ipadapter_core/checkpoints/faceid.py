"""FaceID adapters (``ip-adapter-faceid_*``, ``-portrait_*``): one face embedding, a few tokens; most carry a LoRA."""

from __future__ import annotations

import re

from torch import nn

from ..features import FACE
from ..files.state_dict import TensorFile
from .containers import is_value_only
from .embedded_lora import CarriesLoRA
from .format import AdapterSpec, parse_vector
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
        return parse_vector(self, file)

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        sizes = spec.feature_dim, spec.options["hidden_dim"], spec.token_dim, spec.num_tokens
        return MLPProjModelFaceId(*sizes, operations=operations)


FORMAT = FaceID()
