"""The trainable form: layers whose output, times a scale, is added to a frozen layer's; and what collects them.

The names are those of diffusers' first LoRA API, which are empty stubs there now: ``LoRALinearLayer``, ``to_q_lora``, …
``LoRAAttnProcessor`` is in ``processors.py``, beside the other trainable processors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import InvalidInputError
from .formats import load_lora
from .layer import Layer
from .targets import Target
from .weights import LoRAWeights


class LoRALinearLayer(nn.Module):
    """``(alpha / rank) · up(down(x))`` for a linear layer; ``down`` starts at N(0, 1/rank), ``up`` at 0, so it starts as nothing.

    ``network_alpha`` None means the rank.
    """

    def __init__(self, in_features: int, out_features: int, rank: int = 4, network_alpha: float | None = None) -> None:
        super().__init__()
        _check_rank(rank, network_alpha)
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        self.network_alpha, self.rank = network_alpha, rank
        _reset(self.down.weight, self.up.weight, rank)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Computed in the layer's own dtype, returned in the input's."""
        out = self.up(self.down(hidden_states.to(self.down.weight.dtype)))
        if self.network_alpha is not None:
            out = out * (self.network_alpha / self.rank)
        return out.to(hidden_states.dtype)


class LoRAConv2dLayer(nn.Module):
    """The same for a convolution: ``down`` has its kernel, stride and padding, ``up`` is 1×1."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 4,
        kernel_size: int | tuple[int, int] = (1, 1),
        stride: int | tuple[int, int] = (1, 1),
        padding: int | tuple[int, int] | str = 0,
        network_alpha: float | None = None,
    ) -> None:
        super().__init__()
        _check_rank(rank, network_alpha)
        self.down = nn.Conv2d(in_features, rank, kernel_size, stride, padding, bias=False)
        self.up = nn.Conv2d(rank, out_features, 1, bias=False)
        self.network_alpha, self.rank = network_alpha, rank
        _reset(self.down.weight, self.up.weight, rank)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``b c y x`` to the shape that the layer beside gives."""
        out = self.up(self.down(hidden_states.to(self.down.weight.dtype)))
        if self.network_alpha is not None:
            out = out * (self.network_alpha / self.rank)
        return out.to(hidden_states.dtype)


def _check_rank(rank: int, alpha: float | None) -> None:
    if rank < 1 or (alpha is not None and alpha <= 0):
        raise InvalidInputError(f"rank is {rank} and alpha {alpha}; both must be above 0 (alpha may be None: the rank)")


def _reset(down: Tensor, up: Tensor, rank: int) -> None:
    with torch.no_grad():
        nn.init.normal_(down, std=1 / rank)
        nn.init.zeros_(up)


def layer_for(module: nn.Module, rank: int, alpha: float | None) -> LoRALinearLayer | LoRAConv2dLayer:
    """A LoRA layer of the right kind and size for a linear layer or a 2-D convolution."""
    layer = Layer(module)
    out, columns, *kernel = layer.shape
    if layer.kind == "linear":
        return LoRALinearLayer(columns, out, rank, alpha)
    conv = cast(Any, module)
    if layer.kind != "conv" or len(kernel) != 2 or conv.groups != 1 or conv.dilation != (1, 1):
        raise InvalidInputError(
            f"{type(module).__name__} cannot carry a LoRA layer; choose linear layers and convolutions"
        )
    return LoRAConv2dLayer(columns, out, rank, (kernel[0], kernel[1]), conv.stride, conv.padding, alpha)


class TrainableLoRA(nn.Module):
    """All LoRA layers on one model: ``parameters()`` are exactly what is trained, ``weights()`` what a file would hold.

    ``layers`` maps names of a file (``….attn1.processor.to_q_lora``, ``….conv1.lora``) to LoRA layers. ``processors`` are
    the attention processors among them, which add their layers themselves; the others are added by hooks.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        processors: Sequence[nn.Module],
        beside: Iterable[tuple[nn.Module, nn.Module]],
    ) -> None:
        super().__init__()
        self.names = tuple(layers)
        self.layers = nn.ModuleList(layers.values())
        self._processors = tuple(processors)
        self._scale = 1.0
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self._hook(lora)) for module, lora in beside
        ]

    def _hook(self, lora: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return None if self._scale == 0 else output + self._scale * lora(args[0])

        return add

    @property
    def scale(self) -> float:
        """What every layer's output is multiplied by; 0 is exactly the frozen model."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = value
        for processor in self._processors:
            cast(Any, processor).scale = value

    @contextmanager
    def scaled(self, value: float) -> Generator[TrainableLoRA]:
        """``with lora.scaled(0): …`` runs the frozen model, as variational score distillation does at every step."""
        before, self.scale = self.scale, value
        try:
            yield self
        finally:
            self.scale = before

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names that diffusers' LoRAAttnProcessor files have, detached; alphas where they were set."""
        found: dict[str, Tensor] = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            found |= {f"{name}.{key}": t.detach() for key, t in layer.state_dict().items()}
            alpha = cast(Any, layer).network_alpha
            if alpha is not None:
                found[f"{name}.alpha"] = torch.tensor(float(alpha))
        return found

    def weights(self, name: str = "trained") -> LoRAWeights:
        """The same as a loaded file, to place, convert or save."""
        return load_lora(self.tensors(), name=name)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights of the same names and shapes, to go on training. Raises InvalidInputError if some are missing."""
        wanted = {key for key in self.tensors() if not key.endswith(".alpha")}
        missing = wanted - tensors.keys()
        if missing:
            raise InvalidInputError(f"{len(missing)} of {len(wanted)} tensors are missing, such as {min(missing)!r}")
        for name, layer in zip(self.names, self.layers, strict=True):
            layer.load_state_dict({key: tensors[f"{name}.{key}"] for key in layer.state_dict()})

    def remove(self) -> None:
        """Take the hooks off the model; attention processors are the UNet's own to reset."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def trainable(targets: Iterable[Target]) -> list[Target]:
    """Those that can carry a LoRA layer: linear layers and convolutions, no norms and embeddings."""
    return [t for t in targets if len(t.shape) in (2, 4) and not t.is_embedding]
