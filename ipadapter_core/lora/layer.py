"""A layer of a model as LoRAs see it, whatever its class: kind, shape, weight and bias, and its own forward once more."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import IncompatibleAdapterError

Kind = Literal["linear", "conv", "norm", "embedding", "other"]


_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Layer:
    """The layer that a side path stands beside: linear, convolution, norm or embedding. Nothing of it is ever written."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._module: Any = module

    @cached_property
    def kind(self) -> Kind:
        """By attributes, not classes: hosts and quantisers have layers of their own."""
        name = type(self._module).__name__
        if (
            getattr(self._module, "transposed", False)
            or name.endswith("Norm2d")
            or name.startswith(("Sparse", "_Sparse"))
        ):
            return "other"  # the weight or the channels lie along other axes, or what comes in is no plain tensor
        if hasattr(self._module, "kernel_size") and hasattr(self._module, "stride"):
            return "conv"
        if hasattr(self._module, "in_features"):
            return "linear"
        if hasattr(self._module, "num_groups") or hasattr(self._module, "normalized_shape"):
            return "norm"
        if hasattr(self._module, "num_embeddings"):
            return "embedding"
        return "other"

    @property
    def is_rms_norm(self) -> bool:
        """Whether it is a norm that subtracts no mean."""
        return self.kind == "norm" and any("RMSNorm" in kind.__name__ for kind in type(self._module).__mro__)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight; from the layer's sizes where a quantiser packs the weight itself."""
        module = self._module
        if self.kind == "linear":
            return int(module.out_features), int(module.in_features)
        if self.kind == "conv":
            kernel = (int(k) for k in module.kernel_size)
            return int(module.out_channels), int(module.in_channels) // self.groups, *kernel
        return tuple(module.weight.shape)

    @property
    def groups(self) -> int:
        """Groups of channels of a convolution; 1 for other layers."""
        return int(self._module.groups) if self.kind == "conv" else 1

    def weight(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The pristine weight, read once by DoRA; a quantised one is expanded by its own method."""
        weight: Tensor = self._module.weight
        if getattr(weight, "is_meta", False):
            raise IncompatibleAdapterError(
                "this algorithm reads the base weight, which is not in memory (offloaded to meta); use the merged mode"
            )
        if type(weight).dequantize is not Tensor.dequantize:  # torch's own is for its old quantised tensors alone
            weight = weight.dequantize()
        if tuple(weight.shape) != self.shape or not weight.is_floating_point():
            raise IncompatibleAdapterError(
                f"this algorithm reads the base weight, which is quantised ({type(weight).__name__}, {weight.dtype}); "
                "use the base model in 16 bits, or a plain LoRA"
            )
        return weight.detach().to(device, dtype)

    def bias_vector(self, like: Tensor) -> Tensor:
        """The bias, or zeros; on the device and in the dtype of ``like``."""
        bias = getattr(self._module, "bias", None)
        return like.new_zeros(self.shape[0]) if bias is None else bias.detach().to(like.device, like.dtype)

    def without_bias(self, output: Tensor) -> Tensor:
        """What the layer gave, less its bias."""
        if getattr(self._module, "bias", None) is None:
            return output
        return output - self.along(self.bias_vector(output), output)

    def again(self, x: Tensor) -> Tensor:
        """The layer's own forward once more, without bias and without side paths."""
        return self.without_bias(self.module.forward(x))

    def channels(self, vector: Tensor) -> Tensor:
        """A vector over channels, shaped to act on an input or output."""
        if self.kind != "conv":
            return vector
        return vector.reshape(-1, *[1] * len(self._module.kernel_size))

    @property
    def channels_first(self) -> bool:
        """Whether axis 1 of an output are the channels, as of convolutions and group norms, and not the last."""
        return self.kind == "conv" or hasattr(self._module, "num_groups")

    def along(self, vector: Tensor, like: Tensor) -> Tensor:
        """A vector over the output's channels, shaped to act on ``like``."""
        return vector.reshape(-1, *[1] * (like.ndim - 2)) if self.channels_first else vector

    def ghost(self, like: Tensor) -> Tensor:
        """A tensor of the weight's shape and ``like``'s dtype and device. It takes no memory: every entry is the same number."""
        return like.new_empty(1).expand(self.shape)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` through another weight, with this layer's stride, padding and groups; no bias."""
        if self.kind != "conv":
            return F.linear(x, weight.flatten(1))
        module = self._module
        padding = module.padding
        if getattr(module, "padding_mode", "zeros") != "zeros" and not isinstance(padding, str):
            around = [int(p) for p in reversed(padding) for _ in range(2)]
            x, padding = F.pad(x, around, mode="circular" if module.padding_mode == "circular" else "reflect"), 0
        return _CONVOLUTIONS[x.ndim](x, weight, None, module.stride, padding, module.dilation, module.groups)

    def pointwise(self, x: Tensor, matrix: Tensor) -> Tensor:
        """A matrix ``o i`` over the channels of ``x``."""
        if self.kind != "conv":
            return F.linear(x, matrix)
        return _CONVOLUTIONS[x.ndim](x, matrix.reshape(*matrix.shape, *[1] * (x.ndim - 2)))

    def normalised(self, x: Tensor) -> Tensor:
        """What a norm's weight and bias act on."""
        module = self._module
        if hasattr(module, "num_groups"):
            return F.group_norm(x, module.num_groups, None, None, module.eps)
        if self.is_rms_norm:
            return F.rms_norm(x, tuple(module.normalized_shape), None, module.eps)
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)


Rows = tuple[int, int]
"""The first row and their number."""


class RowsOf(Layer):
    """Some output rows of a fused layer, as a layer."""

    def __init__(self, module: nn.Module, start: int, length: int) -> None:
        super().__init__(module)
        self._start, self._length = start, length

    @property
    def shape(self) -> tuple[int, ...]:
        return self._length, *super().shape[1:]

    def weight(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        # quantisers pack whole weights: expanded first, then cut
        return Layer(self.module).weight(device, dtype)[self._start : self._start + self._length]

    def bias_vector(self, like: Tensor) -> Tensor:
        return Layer(self.module).bias_vector(like)[self._start : self._start + self._length]

    def again(self, x: Tensor) -> Tensor:
        whole: Tensor = self.module.forward(x)
        return self.without_bias(rows_of(whole, (self._start, self._length), self))


def rows_of(y: Tensor, rows: Rows, layer: Layer) -> Tensor:
    """The output of some rows of a fused layer."""
    return y.narrow(1 if layer.kind == "conv" else -1, *rows)


def add_rows(y: Tensor, added: Tensor, rows: Rows, layer: Layer) -> Tensor:
    """A copy of ``y`` with something added to some rows."""
    y = y.clone()
    rows_of(y, rows, layer).add_(added)
    return y
