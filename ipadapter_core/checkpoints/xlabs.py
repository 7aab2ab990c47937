"""XLabs' adapters for FLUX.1, v1 and v2, in their own keys and in those that diffusers converts them to.

They act in double blocks only: keys and values are one matrix with a bias each, the query is the model's, and the result joins
the residual stream behind the whole block, past its output projection and its gate (x-flux, src/flux/modules/layers.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from ..features import IMAGE_EMBEDS
from ..files.state_dict import TensorFile
from ..models.reach import Reach, sites_in
from .flux_layers import FluxFormat
from .format import AdapterSpec, linear_layers, shape_of, tokens_in
from .keys import Keys, numbered
from .projectors import ImageProjModel, Operations


class XLabs(FluxFormat):
    name = "xlabs"
    label = "XLabs' FLUX adapter, v1 (4 tokens) or v2 (16 tokens): linear projector, double blocks"
    serves = (("general", 2), ("light", 2), ("style", 3))
    public = ("Flux", "flux-ip-adapter-v2.safetensors")
    feature = IMAGE_EMBEDS
    unconditional = "black_picture"
    keys = Keys(
        "ip_adapter_proj_model.",
        {f"to_{x}_ip": f"double_blocks.{{}}.processor.ip_adapter_double_stream_{x}_proj" for x in "kv"},
        first=0,
        step=1,
    )
    anchor = "proj.weight"
    allowed = re.compile(r"(proj|norm)\.(weight|bias)")
    layer_keys = re.compile(
        r"double_blocks\.(0|[1-9][0-9]{0,4})\.processor\.ip_adapter_double_stream_[kv]_proj\.(weight|bias)"
    )
    reach = Reach(sites_in("double"), query="normed", join="residual")
    strength = 0.7
    released = tuple(
        f"ip_adapter.safetensors from https://huggingface.co/XLabs-AI/flux-ip-adapter{version}"
        for version in ("", "-v2")
    )
    advice = (
        "0.5 to 0.9, ending at 0.5 to 1 of the steps. v1 (4 tokens) obeys the picture little at cfg 1: it wants true CFG of 2 to 4; "
        "v2 (16 tokens) works best at cfg 1"
    )

    def parse(self, file: TensorFile) -> AdapterSpec:
        proj, norm = (f"{self.keys.projector}{name}.weight" for name in ("proj", "norm"))
        _, feature_dim = shape_of(file.tensors, proj, rank=2)
        num_tokens = tokens_in(file.tensors, proj, norm)
        return self.spec(file.tensors, norm, num_tokens=num_tokens, feature_dim=feature_dim)

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        return ImageProjModel(spec.feature_dim, spec.token_dim, spec.num_tokens, operations=operations)

    def layers(self, spec: AdapterSpec, operations: Operations) -> Mapping[str, nn.Module]:
        return linear_layers(spec, operations, bias=True)


class Converted(XLabs):
    name = "xlabs-diffusers"
    label = "XLabs' FLUX adapter, v1 (4 tokens) or v2 (16 tokens), in diffusers' keys"
    serves = (("general", 2), ("light", 2), ("style", 3))
    released = ("diffusers' saves of XLabs' files",)
    keys = numbered("to_k_ip", "to_v_ip")
    layer_keys = re.compile(r"ip_adapter\.(0|[1-9][0-9]{0,4})\.to_[kv]_ip\.(weight|bias)")


FORMAT, CONVERTED = XLabs(), Converted()
