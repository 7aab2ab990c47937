"""InstantX' adapter for FLUX.1, and files in its layout with another projector.

Every block has a layer, double ones first. Keys are normed by RMS over each head, without a weight; values are not: the line for
them in the authors' processor is commented out, and it wrote to another name before that. The result is added before the output
projection, in single blocks to the text's tokens too (InstantX/FLUX.1-dev-IP-Adapter, infer_flux_ipa_siglip.py).
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..compatibility import Rules
from ..features import PENULTIMATE, POOLED
from ..files.state_dict import TensorFile
from ..models.reach import Reach, every
from .flux_layers import FluxFormat, heads_of
from .format import AdapterModule, AdapterSpec, Format, parse_vector
from .keys import numbered
from .plus import Plus
from .projectors import Operations, PooledTokens, rms_norm

EPSILON = 1e-5


class InstantXLayers(FluxFormat):
    """The layers of InstantX' file."""

    unconditional = "zero_embeds"
    framing = "stretch"
    keys = numbered("to_k_ip", "to_v_ip")
    reach = Reach(every, query="normed", span="all")
    strength = 0.7
    advice = "0.5 to 0.8; the authors' example is 0.7 with guidance 3.5"

    def key_value(
        self, module: AdapterModule, index: int, tokens: Tensor, timestep: float | None
    ) -> tuple[Tensor, Tensor]:
        k, v = super().key_value(module, index, tokens, timestep)
        return rms_norm(k, heads_of(k.shape[-1]), EPSILON), v


class InstantX(InstantXLayers):
    name = "instantx"
    label = "InstantX' FLUX adapter (pooled SigLIP vector, all blocks)"
    serves = (("general", 3), ("plus", 3), ("style", 2))
    public = ("Flux", "flux-instantx-ip-adapter.bin")
    feature = POOLED
    released = ("ip-adapter.bin from https://huggingface.co/InstantX/FLUX.1-dev-IP-Adapter",)
    anchor = "proj.2.weight"
    allowed = re.compile(r"proj\.[02]\.(weight|bias)|norm\.(weight|bias)")

    def parse(self, file: TensorFile) -> AdapterSpec:
        return parse_vector(self, file)

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        sizes = spec.feature_dim, spec.options["hidden_dim"], spec.token_dim, spec.num_tokens
        return PooledTokens(*sizes, operations=operations)

    def under(self, rules: Rules) -> Format:
        return AS_SHAKKER if rules.normed_values else self


class AsShakker(InstantX):
    """The same file under ``Rules.normed_values``; no family of its own."""

    def key_value(
        self, module: AdapterModule, index: int, tokens: Tensor, timestep: float | None
    ) -> tuple[Tensor, Tensor]:
        k, v = super().key_value(module, index, tokens, timestep)
        return k, rms_norm(v, heads_of(v.shape[-1]), EPSILON)


AS_SHAKKER = AsShakker()


class InstantXResampler(InstantXLayers, Plus):
    name = "instantx-resampler"
    label = "FLUX adapter in InstantX' layout with a resampler (hidden states of SigLIP, all blocks)"
    serves = (("general", 3), ("plus", 2), ("style", 2))
    feature = PENULTIMATE
    unconditional = "zero_pixels"
    trains = False


FORMAT, RESAMPLER = InstantX(), InstantXResampler()
