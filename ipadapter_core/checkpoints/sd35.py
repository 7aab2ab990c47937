"""InstantX' adapter for Stable Diffusion 3.5 Large.

Tokens, and the norm before every layer's keys and values, depend on the timestep. The picture's own queries and keys are normed
by the adapter's weights, and attend to the picture and to the image together (diffusers, SD3IPAdapterJointAttnProcessor2_0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from ..errors import CorruptFileError
from ..features import PENULTIMATE
from ..files.state_dict import StateDict, TensorFile
from ..models.reach import Reach, sites_in
from .format import AdapterModule, AdapterSpec, Format, linear_layers, resampler_depth, shape_of
from .keys import numbered
from .norms import AdaptiveNorm, check_heads, norm_weight, weights
from .projectors import RESAMPLER_KEYS, Operations, rms_norm
from .timed_projectors import TimeResampler

TIMED_KEYS = rf"latents|{RESAMPLER_KEYS}|layers\.(0|[1-9][0-9]{{0,3}})\.2\.1\.(weight|bias)|time_embedding\.linear_[12]\.(weight|bias)"
LAYERS, CHANNELS = 38, 2432
EPSILON = 1e-6


class SD35(Format):
    name = "sd3.5"
    label = "InstantX' SD3.5 Large adapter (resampler that follows the timestep)"
    serves = (("general", 3), ("plus", 3), ("style", 2))
    public = ("SD3", "sd35-large-ip-adapter.bin")
    feature = PENULTIMATE
    unconditional = "zero_embeds"
    framing = "stretch"
    keys = numbered("to_k_ip", "to_v_ip", "norm_ip", "norm_q", "norm_k", "norm_ip_k")
    released = ("ip-adapter.bin from https://huggingface.co/InstantX/SD3.5-Large-IP-Adapter",)
    anchor = "time_embedding.linear_1.weight"
    allowed = re.compile(TIMED_KEYS)
    layer_keys = re.compile(
        r"ip_adapter\.(0|[1-9][0-9]{0,4})\.(to_[kv]_ip\.weight|norm_ip\.linear\.(weight|bias)|norm_(q|k|ip_k)\.weight)"
    )
    reach = Reach(sites_in("joint"), query="raw", timed=True, text_wide=False, own_keys=True)
    strength = 0.6
    advice = "0.5 to 0.6 with cfg 5 (Large-Turbo: cfg 1)"

    def parse(self, file: TensorFile) -> AdapterSpec:
        state, first = file.tensors, self.keys.layer("norm_q", 0)
        sizes = resampler_sizes(state, "image_proj.")
        _, feature_dim = shape_of(state, "image_proj.proj_in.weight", rank=2)
        shape_of(state, width := "image_proj.proj_out.weight", rank=2)
        (head_dim,) = shape_of(state, first, rank=1)
        spec = self.spec(
            state,
            width,
            num_tokens=sizes["queries"],
            feature_dim=feature_dim,
            options={**sizes, "head_dim": head_dim},
        )
        check_heads(spec, head_dim, first)
        return spec

    def base_model(self, token_dim: int, channels: tuple[int, ...]) -> str:
        return "SD3.5" if channels == (CHANNELS,) * LAYERS else f"custom {token_dim}"

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        sizes = {key: value for key, value in spec.options.items() if key != "head_dim"}
        return TimeResampler(spec.feature_dim, token_dim=spec.token_dim, operations=operations, **sizes)

    def layers(self, spec: AdapterSpec, operations: Operations) -> Mapping[str, nn.Module]:
        width, head_dim = spec.options["hidden_dim"], spec.options["head_dim"]
        norms = (AdaptiveNorm(width, spec.token_dim, operations=operations) for _ in spec.layer_channels)
        own = {name: weights(spec, head_dim, "weight") for name in ("norm_q", "norm_k", "norm_ip_k")}
        return {**linear_layers(spec, operations, bias=False), "norm_ip": nn.ModuleList(norms), **own}

    def tokens_at(self, projector: nn.Module, constant: Tensor, timestep: float) -> Tensor:
        return cast(TimeResampler, projector).at(constant, timestep)

    def key_value(
        self, module: AdapterModule, index: int, tokens: Tensor, timestep: float | None
    ) -> tuple[Tensor, Tensor]:
        assert timestep is not None
        embedding = cast(TimeResampler, module.projector).time_embedding(timestep, tokens)
        k, v = super().key_value(module, index, module.layer("norm_ip", index)(tokens, embedding), timestep)
        weight = norm_weight(module, "norm_ip_k", index)
        return rms_norm(k, k.shape[-1] // len(weight), EPSILON, weight), v

    def query_weight(self, module: AdapterModule, index: int) -> Tensor:
        return norm_weight(module, "norm_q", index)

    def self_weight(self, module: AdapterModule, index: int) -> Tensor:
        return norm_weight(module, "norm_k", index)


def resampler_sizes(state: StateDict, group: str) -> dict[str, int]:
    """The sizes of a TimeResampler under ``group``."""
    _, queries, hidden_dim = shape_of(state, f"{group}latents", rank=3)
    inner_dim, _ = shape_of(state, f"{group}layers.0.0.to_q.weight", rank=2)
    ff_dim, _ = shape_of(state, f"{group}layers.0.1.1.weight", rank=2)
    _, time_dim = shape_of(state, waves := f"{group}time_embedding.linear_1.weight", rank=2)
    if time_dim % 2:
        raise CorruptFileError(
            f"'{waves}' takes {time_dim} sines and cosines of the timestep, an even number was expected: the file is damaged."
        )
    return {
        "queries": queries, "depth": resampler_depth(state, group), "hidden_dim": hidden_dim,
        "inner_dim": inner_dim, "ff_dim": ff_dim, "time_dim": time_dim,
    }  # fmt: skip


FORMAT = SD35()
