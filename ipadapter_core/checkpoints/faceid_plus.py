"""FaceID Plus adapters, v1 and v2: a face embedding whose tokens read the encoder's tokens of the aligned face.

Both versions have the same keys; v2 adds the face's own tokens to what they read ("shortcut"), with a weight. Kolors'
file is a v2 whose tokens are as wide as that model's text encoder's (4096): the UNet's own projection of its text,
`encoder_hid_proj`, brings them to the width that the layers take.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from ..errors import CorruptFileError
from ..files.state_dict import StateDict
from .embedded_lora import LAYERS_AND_LORA
from .faceid import MLP_KEYS
from .format import MOST_LAYERS, AdapterSpec, Format, base_model, divided, encoder_name, few, layer_channels, shape_of
from .projectors import Operations, ProjModelFaceIdPlus

PERCEIVER = "image_proj.perceiver_resampler."
KOLORS_TEXT_DIM, KOLORS_TOKEN_DIM = 4096, 2048
LAYER = re.compile(rf"{re.escape(PERCEIVER)}layers\.(0|[1-9][0-9]{{0,3}})\..*")


def parse(state: StateDict) -> AdapterSpec:
    hidden_dim, face_dim = shape_of(state, "image_proj.proj.0.weight", rank=2)
    rows, _ = shape_of(state, "image_proj.proj.2.weight", rank=2)
    (own_dim,) = shape_of(state, "image_proj.norm.weight", rank=1)
    _, feature_dim = shape_of(state, f"{PERCEIVER}proj_in.weight", rank=2)
    ff_dim, _ = shape_of(state, f"{PERCEIVER}layers.0.1.1.weight", rank=2)
    inner_dim, _ = shape_of(state, f"{PERCEIVER}layers.0.0.to_q.weight", rank=2)
    numbers = sorted({int(match[1]) for match in filter(None, map(LAYER.fullmatch, state))})
    if numbers != list(range(len(numbers))) or len(numbers) > MOST_LAYERS:
        raise CorruptFileError(
            f"perceiver_resampler.layers are numbered {few(map(str, numbers))}: the file is incomplete."
        )
    if feature_dim < face_dim:
        raise CorruptFileError(
            f"the encoder's tokens are {feature_dim} wide, less than the face embedding's {face_dim}."
        )
    first = state.get("ip_adapter.1.to_k_ip.weight")
    kolors = own_dim == KOLORS_TEXT_DIM and first is not None and tuple(first.shape[1:]) == (KOLORS_TOKEN_DIM,)
    token_dim = KOLORS_TOKEN_DIM if kolors else own_dim
    channels = layer_channels(state, token_dim)
    return AdapterSpec(
        family=FORMAT.name,
        base_model="Kolors" if kolors else base_model(token_dim, len(channels)),
        num_tokens=divided(rows, own_dim, "image_proj.proj.2.weight"),
        token_dim=token_dim,
        feature="face_tokens",
        feature_dim=feature_dim,
        unconditional="zero_pixels",
        encoder="ViT-L/14-336" if kolors and feature_dim == 1024 else encoder_name("penultimate", feature_dim),
        layer_channels=channels,
        options={
            "hidden_dim": hidden_dim,
            "face_dim": face_dim,
            "depth": len(numbers),
            "inner_dim": inner_dim,
            "ff_dim": ff_dim,
            **({"text_dim": own_dim} if kolors else {}),
        },
    )


def version(spec: AdapterSpec, name: str, metadata: Mapping[str, str]) -> int:
    """1 or 2, which no shape tells: by metadata, else by the released file names; Kolors' only one is a 2."""
    told = metadata.get("faceid_version", "")
    if told in ("1", "2"):
        return int(told)
    if spec.projected_by_model:
        return 2
    return 2 if re.search(r"plus.?v2", name.replace("\\", "/").rsplit("/", 1)[-1], re.IGNORECASE) else 1


def build(spec: AdapterSpec, operations: Operations) -> nn.Module:
    sizes = {key: value for key, value in spec.options.items() if key not in ("version", "text_dim")}
    return ProjModelFaceIdPlus(
        spec.feature_dim,
        spec.options.get("text_dim", spec.token_dim),
        spec.num_tokens,
        shortcut=spec.options.get("version") == 2,
        operations=operations,
        **sizes,
    )


FORMAT = Format(
    name="faceid-plus",
    anchor="perceiver_resampler.proj_in.weight",
    allowed=re.compile(
        rf"{MLP_KEYS}|perceiver_resampler\.((proj_in|proj_out|norm_out)\.(weight|bias)|layers\.(0|[1-9][0-9]{{0,3}})\."
        r"(0\.(norm1|norm2)\.(weight|bias)|0\.to_(q|kv|out)\.weight|1\.0\.(weight|bias)|1\.[13]\.weight))"
    ),
    parse=parse,
    build=build,
    layers=LAYERS_AND_LORA,
)
