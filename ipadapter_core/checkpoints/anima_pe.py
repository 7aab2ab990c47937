"""The PE adapter for Anima: PE-Core's tokens through a resampler, a scalar gate for every layer (sorryhyun/anima_lora, ip_adapter).

Gates are constant, so values come multiplied by them. Neither keys nor values are normed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import CorruptFileError, one_line
from ..features import LAST
from ..files.state_dict import TensorFile
from ..models.reach import Reach, every
from .anima_layers import AnimaFormat
from .format import AdapterModule, AdapterSpec, linear_layers, resampler_depth, shape_of
from .keys import Keys
from .projectors import CentredResampler, Operations

NUMBER = r"(0|[1-9][0-9]{0,4})"
HEADS = "ss_resampler_heads"
USUAL_HEADS = 8
"""Heads of the resampler in files that do not tell it."""


class AnimaPE(AnimaFormat):
    name = "anima-pe"
    label = "Anima PE (PE-Core, resampler, a gate for every block)"
    serves = (("general", 1),)
    feature = LAST
    unconditional = "same"
    framing = "shapes"
    keys = Keys("", {"to_k_ip": "to_k_ip.{}", "to_v_ip": "to_v_ip.{}", "ip_gate": "ip_gate.{}"}, first=0, step=1)
    released = ("anima_ip_adapter_quality_20260610.safetensors of l2dnjsrud",)
    anchor = "resampler.queries"
    allowed = re.compile(
        r"ip_centroid|resampler\.(queries|(kv_proj|out_norm|out)\.(weight|bias)"
        rf"|blocks\.{NUMBER}\.((q_norm_x|kv_norm_x|norm_s|norm_f|ffn\.[02])\.(weight|bias)"
        r"|[xs]attn\.(in_proj_(weight|bias)|out_proj\.(weight|bias))))"
    )
    layer_keys = re.compile(rf"to_[kv]_ip\.{NUMBER}\.weight|ip_gate\.{NUMBER}")
    reach = Reach(every, query="normed")
    advice = "1 with cfg 3 to 4; it carries layout and style, not characters"

    def parse(self, file: TensorFile) -> AdapterSpec:
        state = file.tensors
        _, queries, hidden_dim = shape_of(state, "resampler.queries", rank=3)
        _, feature_dim = shape_of(state, "resampler.kv_proj.weight", rank=2)
        shape_of(state, width := "resampler.out.weight", rank=2)
        ff_dim, _ = shape_of(state, "resampler.blocks.0.ffn.0.weight", rank=2)
        told = file.metadata.get(HEADS, "")
        heads = int(told) if told.isascii() and told.isdigit() and 0 < len(told) < 5 else USUAL_HEADS
        if heads == 0 or hidden_dim % heads:
            raise CorruptFileError(
                f"its resampler is {hidden_dim} wide ('resampler.queries'), which {heads} heads ({HEADS} of its metadata "
                f"says {one_line(told) or 'nothing'!r}) do not divide: the file is damaged."
            )
        options = {
            "queries": queries, "depth": resampler_depth(state, "resampler.", "blocks"), "hidden_dim": hidden_dim,
            "ff_dim": ff_dim, "heads": heads, "gate_rank": state[gate].ndim if (gate := self.keys.layer("ip_gate", 0, "")) in state else 0,
        }  # fmt: skip
        return self.spec(state, width, num_tokens=queries, feature_dim=feature_dim, options=options)

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        sizes = {key: value for key, value in spec.options.items() if key != "gate_rank"}
        return CentredResampler(spec.feature_dim, token_dim=spec.token_dim, operations=operations, **sizes)

    def layers(self, spec: AdapterSpec, operations: Operations) -> Mapping[str, nn.Module]:
        shape = (1,) * min(spec.options["gate_rank"], 1)
        gates = nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in spec.layer_channels)
        return {**linear_layers(spec, operations, bias=False), "ip_gate": gates}

    def key_value(
        self, module: AdapterModule, index: int, tokens: Tensor, timestep: float | None
    ) -> tuple[Tensor, Tensor]:
        k, v = super().key_value(module, index, tokens, timestep)
        gates = cast(nn.ParameterList, module.get_submodule("ip_gate"))
        return k, v * gates[index].to(v)

    def metadata(self, spec: AdapterSpec) -> dict[str, str]:
        return {HEADS: str(spec.options["heads"])}


FORMAT = AnimaPE()
