"""InstantCharacter for FLUX.1: two encoders look at the picture at two sizes, and its tokens depend on the timestep.

Every block has a layer; the picture's tokens alone ask, by the query as its layer projects it, with the adapter's own norm. Norms
divide by the root of the mean square plus epsilon (InstantCharacter, models/attn_processor.py and norm_layer.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from ..errors import IncompatibleEncoderError
from ..features import CHARACTER
from ..files.state_dict import StateDict, TensorFile
from ..models.reach import Reach, every
from .flux_layers import FluxFormat
from .format import AdapterModule, AdapterSpec, linear_layers, resampler_depth, shape_of
from .keys import numbered
from .norms import check_heads, norm_weight, weights
from .projectors import Operations, rms_norm
from .sd35 import TIMED_KEYS, resampler_sizes
from .timed_projectors import CrossLayerCrossScaleProjector

NUMBER = r"(0|[1-9][0-9]{0,3})"
BLOCK_KEYS = r"norm[123]\.(weight|bias)|attn[12]\.(to_[qkv]\.weight|to_out\.0\.(weight|bias))|ff\.net\.(0\.proj|2)\.(weight|bias)"
EPSILON = 1e-6


class InstantCharacter(FluxFormat):
    name = "instantcharacter"
    label = "InstantCharacter for FLUX (SigLIP and DINOv2, tokens that follow the timestep)"
    serves = (("character", 3), ("general", 1))
    public = ("Flux", "instantcharacter_ip-adapter.bin")
    feature = CHARACTER
    unconditional = "same"
    framing = "subject"
    keys = numbered("to_k_ip", "to_v_ip", "norm_ip_q", "norm_ip_k")
    released = ("instantcharacter_ip-adapter.bin from https://huggingface.co/tencent/InstantCharacter",)
    anchor = "proj_cross_layer.fc1.weight"
    allowed = re.compile(
        rf"cross_(layer|scale)_blocks\.{NUMBER}\.({BLOCK_KEYS})|proj(_cross_(layer|scale))?\.fc[12]\.(weight|bias)"
        rf"|resampler\.({TIMED_KEYS})"
    )
    layer_keys = re.compile(r"ip_adapter\.(0|[1-9][0-9]{0,4})\.(to_[kv]_ip\.(weight|bias)|norm_ip_[qk]\.scale)")
    reach = Reach(every, query="raw", timed=True, block_by_block=True)
    strength = 0.8
    advice = "0.8 to 0.9 with guidance 3.5; a picture of the whole character on a plain background"

    def parse(self, file: TensorFile) -> AdapterSpec:
        state, first = file.tensors, self.keys.layer("norm_ip_q", 0, "scale")
        resampler = "image_proj.resampler."
        sizes = resampler_sizes(state, resampler)
        _, feature_dim = shape_of(state, f"{resampler}proj_in.weight", rank=2)
        shape_of(state, width := f"{resampler}proj_out.weight", rank=2)
        (head_dim,) = shape_of(state, first, rank=1)
        sizes |= {
            f"{kind}_depth": resampler_depth(state, "image_proj.", f"cross_{kind}_blocks")
            for kind in ("layer", "scale")
        }
        sizes |= _block_sizes(state)
        spec = self.spec(
            state, width, num_tokens=sizes["queries"], feature_dim=feature_dim, options={**sizes, "head_dim": head_dim}
        )
        check_heads(spec, head_dim, first)
        return spec

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        sizes = {key: value for key, value in spec.options.items() if key != "head_dim"}
        return CrossLayerCrossScaleProjector(spec.feature_dim, spec.token_dim, operations=operations, **sizes)

    def layers(self, spec: AdapterSpec, operations: Operations) -> Mapping[str, nn.Module]:
        own = {name: weights(spec, spec.options["head_dim"], "scale") for name in ("norm_ip_q", "norm_ip_k")}
        return {**linear_layers(spec, operations, bias=True), **own}

    def tokens(self, projector: nn.Module, features: Tensor, face_scale: float) -> Tensor:
        parts = CrossLayerCrossScaleProjector.PARTS
        if features.shape[1] % parts or not features.shape[1]:
            raise IncompatibleEncoderError(
                f"the feature has {features.shape[1]} tokens, a multiple of {parts} was expected (a picture, three layers of it and "
                "four parts of a larger one): encode the picture again with this adapter and both of its encoders"
            )
        return projector(features)

    def tokens_at(self, projector: nn.Module, constant: Tensor, timestep: float) -> Tensor:
        return cast(CrossLayerCrossScaleProjector, projector).at(constant, timestep)

    def key_value(
        self, module: AdapterModule, index: int, tokens: Tensor, timestep: float | None
    ) -> tuple[Tensor, Tensor]:
        k, v = super().key_value(module, index, tokens, timestep)
        weight = norm_weight(module, "norm_ip_k", index)
        return rms_norm(k, k.shape[-1] // len(weight), EPSILON, weight, outside=True), v

    def query_weight(self, module: AdapterModule, index: int) -> Tensor:
        return norm_weight(module, "norm_ip_q", index)


def _block_sizes(state: StateDict) -> dict[str, int]:
    first = "image_proj.cross_layer_blocks.0."
    cross_dim, _ = shape_of(state, f"{first}attn1.to_q.weight", rank=2)
    _, cross_ff_dim = shape_of(state, f"{first}ff.net.2.weight", rank=2)
    mlp_dim, _ = shape_of(state, "image_proj.proj.fc1.weight", rank=2)
    return {"cross_dim": cross_dim, "cross_ff_dim": cross_ff_dim, "mlp_dim": mlp_dim}


FORMAT = InstantCharacter()
