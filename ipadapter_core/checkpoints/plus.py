"""Plus adapters (plus, plus-face, composition): a resampler reads all tokens of the encoder."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import nn

from ..errors import InvalidInputError
from ..features import ENCODERS, PENULTIMATE
from ..files.state_dict import StateDict, TensorFile
from ..models.unet import SDXL
from .format import AdapterSpec, AdapterWeights, EncoderSizes, Format, FreshSizes, resampler_depth, shape_of
from .projectors import RESAMPLER_KEYS, Operations, Resampler

KOLORS_ENCODER = ENCODERS["ViT-L/14-336"]


class Plus(Format):
    name = "plus"
    label = "plus (Resampler); plus-face and composition adapters have the same shape"
    serves = (("general", 3), ("plus", 3), ("style", 2), ("composition", 1))
    feature = PENULTIMATE
    unconditional = "zero_pixels"
    anchor = "latents"
    allowed = re.compile(rf"latents|{RESAMPLER_KEYS}")
    trains = True
    summary = "16 tokens with more detail"

    def parse(self, file: TensorFile) -> AdapterSpec:
        state = file.tensors
        _, queries, hidden_dim = shape_of(state, "image_proj.latents", rank=3)
        _, feature_dim = shape_of(state, "image_proj.proj_in.weight", rank=2)
        shape_of(state, width := "image_proj.proj_out.weight", rank=2)
        inner_dim, _ = shape_of(state, "image_proj.layers.0.0.to_q.weight", rank=2)
        ff_dim, _ = shape_of(state, "image_proj.layers.0.1.1.weight", rank=2)
        options = {
            "queries": queries, "depth": resampler_depth(state, "image_proj."), "hidden_dim": hidden_dim,
            "inner_dim": inner_dim, "ff_dim": ff_dim,
        }  # fmt: skip
        spec = self.spec(state, width, num_tokens=queries, feature_dim=feature_dim, options=options)
        if spec.base_model == SDXL.name and (hidden_dim, feature_dim) == (spec.token_dim, KOLORS_ENCODER.hidden_size):
            # Kolors has SDXL's UNet, but another text encoder; its adapter was trained on 336-pixel pictures.
            return replace(spec, base_model="Kolors", encoder=KOLORS_ENCODER.name)
        return spec

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        return Resampler(spec.feature_dim, token_dim=spec.token_dim, operations=operations, **spec.options)

    def fresh(self, token_dim: int, encoder: EncoderSizes, sizes: FreshSizes) -> tuple[nn.Module, int]:
        queries = sizes.num_tokens or 16
        hidden_dim = sizes.hidden_dim or (SDXL.reference_width if token_dim == SDXL.text_width else token_dim)
        return Resampler(encoder.hidden_size, hidden_dim, token_dim, queries=queries, depth=sizes.depth), queries


FORMAT = Plus()


def deepened(adapter: AdapterWeights, depth: int) -> StateDict:
    """The tensors of a plus adapter with a deeper resampler that does the same: added layers whose outputs are zero.

    Every layer adds to the tokens what its attention and its feed-forward give. diffusers' own loader makes a resampler of 4
    layers, whatever is in a file (loaders/ip_adapter.py and unet_loader_utils of 0.31 to 0.42), and reads heads of 64.
    Raises InvalidInputError for an adapter of another family or with more layers.
    """
    spec = adapter.spec
    if spec.family != FORMAT.name or spec.options["depth"] > depth:
        raise InvalidInputError(
            f"{adapter.name} is a {spec.family} adapter"
            + (f" with {spec.options['depth']} layers" if spec.family == FORMAT.name else "")
            + f"; plus adapters with at most {depth} layers can get as many"
        )
    state = {**adapter.module.checkpoint_state(), **adapter.lora}
    first = "image_proj.layers.0."
    for layer in range(spec.options["depth"], depth):
        for key, tensor in list(state.items()):
            if key.startswith(first):
                name = key.removeprefix(first)
                whole = name.endswith(("norm1.weight", "norm2.weight", "1.0.weight"))
                state[f"image_proj.layers.{layer}.{name}"] = (torch.ones_like if whole else torch.zeros_like)(tensor)
    return state
