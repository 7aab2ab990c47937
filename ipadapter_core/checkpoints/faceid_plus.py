"""FaceID Plus adapters, v1 and v2: a face embedding whose tokens read the encoder's tokens of the aligned face.

Both versions have the same keys; v2 adds the face's own tokens to what they read ("shortcut"), with a weight. Kolors'
file is a v2 whose tokens are as wide as that model's text encoder's (4096): the UNet's own projection of its text,
``encoder_hid_proj``, brings them to the width that the layers take.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor, nn

from ..errors import CorruptFileError
from ..features import FACE_TOKENS
from ..files.state_dict import TensorFile
from ..models.unet import SDXL
from .embedded_lora import CarriesLoRA
from .faceid import MLP_KEYS
from .format import AdapterSpec, resampler_depth, shape_of, tokens_in
from .plus import KOLORS_ENCODER
from .projectors import RESAMPLER_KEYS, Operations, ProjModelFaceIdPlus

PERCEIVER = "image_proj.perceiver_resampler."
KOLORS_TEXT_DIM, KOLORS_TOKEN_DIM = 4096, SDXL.text_width


class FaceIDPlus(CarriesLoRA):
    name = "faceid-plus"
    label = "FaceID Plus (face embedding and picture of the face)"
    serves = (("faceid", 3),)
    feature = FACE_TOKENS
    unconditional = "zero_pixels"
    anchor = "perceiver_resampler.proj_in.weight"
    allowed = re.compile(rf"{MLP_KEYS}|perceiver_resampler\.({RESAMPLER_KEYS})")

    def parse(self, file: TensorFile) -> AdapterSpec:
        state, norm = file.tensors, "image_proj.norm.weight"
        hidden_dim, face_dim = shape_of(state, "image_proj.proj.0.weight", rank=2)
        num_tokens = tokens_in(state, "image_proj.proj.2.weight", norm)
        (own_dim,) = shape_of(state, norm, rank=1)
        _, feature_dim = shape_of(state, f"{PERCEIVER}proj_in.weight", rank=2)
        ff_dim, _ = shape_of(state, f"{PERCEIVER}layers.0.1.1.weight", rank=2)
        inner_dim, _ = shape_of(state, f"{PERCEIVER}layers.0.0.to_q.weight", rank=2)
        depth = resampler_depth(state, PERCEIVER)
        if feature_dim < face_dim:
            raise CorruptFileError(
                f"the encoder's tokens are {feature_dim} wide ('{PERCEIVER}proj_in.weight'), less than the face embedding's "
                f"{face_dim} ('image_proj.proj.0.weight')."
            )
        first = state.get("ip_adapter.1.to_k_ip.weight")
        kolors = own_dim == KOLORS_TEXT_DIM and first is not None and tuple(first.shape[1:]) == (KOLORS_TOKEN_DIM,)
        sizes = {
            "hidden_dim": hidden_dim,
            "face_dim": face_dim,
            "depth": depth,
            "inner_dim": inner_dim,
            "ff_dim": ff_dim,
        }
        spec = self.spec(
            state, norm, num_tokens=num_tokens, feature_dim=feature_dim,
            token_dim=KOLORS_TOKEN_DIM if kolors else None, options=sizes | ({"text_dim": own_dim} if kolors else {}),
        )  # fmt: skip
        if kolors:
            encoder = KOLORS_ENCODER.name if feature_dim == KOLORS_ENCODER.hidden_size else spec.encoder
            spec = replace(spec, base_model="Kolors", encoder=encoder)
        return replace(spec, options={**spec.options, "version": _version(spec, file)})

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        sizes = {key: value for key, value in spec.options.items() if key not in ("version", "text_dim")}
        return ProjModelFaceIdPlus(
            spec.feature_dim,
            spec.options.get("text_dim", spec.token_dim),
            spec.num_tokens,
            shortcut=spec.options["version"] == 2,
            operations=operations,
            **sizes,
        )

    def tokens(self, projector: nn.Module, features: Tensor, face_scale: float) -> Tensor:
        return projector(features, face_scale)

    def as_version(self, spec: AdapterSpec, version: int) -> AdapterSpec:
        return replace(spec, options={**spec.options, "version": version})

    def metadata(self, spec: AdapterSpec) -> dict[str, str]:
        return {"faceid_version": str(spec.options["version"])}


def _version(spec: AdapterSpec, file: TensorFile) -> int:
    """1 or 2, which no shape tells: by metadata, else by the released file names; Kolors' only one is a 2."""
    told = file.metadata.get("faceid_version", "")
    if told in ("1", "2"):
        return int(told)
    if spec.projected_by_model:
        return 2
    return 2 if re.search(r"plus.?v2", file.name.replace("\\", "/").rsplit("/", 1)[-1], re.IGNORECASE) else 1


FORMAT = FaceIDPlus()
