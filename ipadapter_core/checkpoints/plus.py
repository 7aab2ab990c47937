"""Plus adapters (plus, plus-face, composition): a resampler reads all tokens of the encoder."""

from __future__ import annotations

import re

from torch import nn

from ..errors import CorruptFileError
from ..files.state_dict import StateDict
from .format import MOST_LAYERS, AdapterSpec, Format, base_model, encoder_name, layer_channels, shape_of
from .projectors import Operations, Resampler

LAYER = re.compile(r"image_proj\.layers\.(0|[1-9][0-9]{0,3})\..*")


def parse(state: StateDict) -> AdapterSpec:
    _, queries, hidden_dim = shape_of(state, "image_proj.latents", rank=3)
    _, feature_dim = shape_of(state, "image_proj.proj_in.weight", rank=2)
    token_dim, _ = shape_of(state, "image_proj.proj_out.weight", rank=2)
    inner_dim, _ = shape_of(state, "image_proj.layers.0.0.to_q.weight", rank=2)
    ff_dim, _ = shape_of(state, "image_proj.layers.0.1.1.weight", rank=2)
    channels = layer_channels(state, token_dim)
    base, encoder = base_model(token_dim, len(channels)), encoder_name("penultimate", feature_dim)
    if base == "SDXL" and (hidden_dim, feature_dim) == (2048, 1024):
        # Kolors has SDXL's UNet, but another text encoder; its adapter was trained on 336-pixel pictures.
        base, encoder = "Kolors", "ViT-L/14-336"
    return AdapterSpec(
        family=FORMAT.name,
        base_model=base,
        num_tokens=queries,
        token_dim=token_dim,
        feature="penultimate",
        feature_dim=feature_dim,
        unconditional="zero_pixels",
        encoder=encoder,
        layer_channels=channels,
        options={
            "queries": queries,
            "depth": depth(state),
            "hidden_dim": hidden_dim,
            "inner_dim": inner_dim,
            "ff_dim": ff_dim,
        },
    )


def depth(state: StateDict) -> int:
    """Number of resampler layers. Raises CorruptFileError when one between two others is missing."""
    numbers = sorted({int(match[1]) for match in filter(None, map(LAYER.fullmatch, state))})
    if len(numbers) > MOST_LAYERS:
        raise CorruptFileError(f"image_proj has {len(numbers)} layers; no adapter has over {MOST_LAYERS}.")
    if numbers != list(range(len(numbers))):
        gap = next(i for i, n in enumerate(numbers) if i != n)
        raise CorruptFileError(
            f"image_proj.layers jumps from {gap - 1} to {numbers[gap]}: image_proj.layers.{gap} is missing. "
            "The file is incomplete; download or export it again."
        )
    return len(numbers)


def build(spec: AdapterSpec, operations: Operations) -> nn.Module:
    return Resampler(spec.feature_dim, token_dim=spec.token_dim, operations=operations, **spec.options)


def is_face_embedding(state: StateDict) -> bool:
    """A 512-number face embedding for SDXL: InstantID and FaceID portrait unnorm have plus' keys, and another input."""
    proj_in, proj_out = state.get("image_proj.proj_in.weight"), state.get("image_proj.proj_out.weight")
    if proj_in is None or proj_out is None:
        return False
    return tuple(proj_in.shape[1:]) == (512,) and tuple(proj_out.shape[:1]) == (2048,)


FORMAT = Format(
    name="plus",
    anchor="latents",
    allowed=re.compile(
        r"latents|(proj_in|proj_out|norm_out)\.(weight|bias)|layers\.(0|[1-9][0-9]{0,3})\."
        r"(0\.(norm1|norm2)\.(weight|bias)|0\.to_(q|kv|out)\.weight|1\.0\.(weight|bias)|1\.[13]\.weight)"
    ),
    parse=parse,
    build=build,
    unless=is_face_embedding,
)
