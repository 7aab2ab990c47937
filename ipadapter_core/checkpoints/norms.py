"""Norms of an adapter's own layers."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CorruptFileError
from .format import AdapterModule, AdapterSpec
from .projectors import Operations


class Weight(nn.Module):
    """The weight of a norm over the ``width`` channels of a head; the layers' K are normed by it, or it is folded into them."""

    def __init__(self, width: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.empty(width)))

    @property
    def tensor(self) -> Tensor:
        return self.get_parameter(self.name)


def weights(spec: AdapterSpec, width: int, name: str) -> nn.ModuleList:
    """One norm for every layer, empty."""
    return nn.ModuleList(Weight(width, name) for _ in spec.layer_channels)


class AdaptiveNorm(nn.Module):
    """A LayerNorm without a weight, shifted and scaled by what ``linear`` makes of a timestep's embedding.

    Source: diffusers' ``AdaLayerNorm`` with chunk_dim 1 (the shift first), epsilon 1e-6.
    """

    def __init__(self, embedding_dim: int, width: int, *, operations: Operations) -> None:
        super().__init__()
        self.linear = operations.Linear(embedding_dim, 2 * width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``b n d`` by an embedding ``1 h``."""
        shift, scale = self.linear(F.silu(embedding))[:, None].chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def norm_weight(module: AdapterModule, name: str, index: int) -> Tensor:
    """The weight ``d`` of the i-th layer's norm."""
    return cast(Weight, module.layer(name, index)).tensor


def check_heads(spec: AdapterSpec, head_dim: int, key: str) -> None:
    """Raise CorruptFileError unless every layer can be split into heads as wide as the norm under ``key``."""
    for index, channels in enumerate(spec.layer_channels):
        if channels % head_dim:
            layer = spec.format.keys.layer("to_k_ip", spec.format.keys.number(index))
            raise CorruptFileError(
                f"'{key}' norms heads of {head_dim} channels, but '{layer}' has {channels}, which are no whole heads: one of the "
                "two is damaged."
            )
