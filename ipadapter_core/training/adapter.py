"""What is trained: the image projector, and ``to_k_ip`` and ``to_v_ip`` in every cross-attention of a frozen UNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bake import check_adapter
from ..checkpoints import AdapterSpec, AdapterWeights, describe_adapter, format_named, load_adapter, save_adapter
from ..checkpoints.format import EncoderSizes
from ..errors import InvalidInputError
from ..models import layout_of
from .config import AdapterConfig, OutputConfig
from .processors import AttnProcessor, IPAttnProcessor, build_processors


class TrainedAdapter(nn.Module):
    """Projector ``image_proj`` and processors ``ip_adapter``: its state dict has the keys of a flat released file.

    Only cross-attentions have parameters. The processors act once ``install`` has put them into the UNet.
    """

    def __init__(self, projector: nn.Module, processors: dict[str, AttnProcessor | IPAttnProcessor]) -> None:
        super().__init__()
        self.image_proj = projector
        self.ip_adapter = nn.ModuleList(processors.values())
        self.names = tuple(processors)
        self.num_tokens = next(p.num_tokens for p in processors.values() if isinstance(p, IPAttnProcessor))

    def install(self, unet: Any) -> None:
        """Let the UNet's attentions use these layers."""
        unet.set_attn_processor(dict(zip(self.names, self.ip_adapter, strict=True)))

    def spec(self) -> AdapterSpec:
        """What a file of these weights says of itself."""
        return self._with_tokens(describe_adapter(self.state_dict(), name="the adapter in training"))

    def weights(self, dtype: torch.dtype, state: dict[str, Tensor] | None = None) -> AdapterWeights:
        """A frozen copy for inference and for saving, on the CPU; raises CorruptFileError if a weight is no number."""
        state = self.state_dict() if state is None else state
        copies = {key: value.detach().to("cpu", dtype, copy=True) for key, value in state.items()}
        weights = load_adapter(copies, name="the adapter in training")
        return replace(weights, spec=self._with_tokens(weights.spec))

    def _with_tokens(self, spec: AdapterSpec) -> AdapterSpec:
        """The number of tokens filled in where shapes do not tell it (an encoder that is not known)."""
        return spec if spec.num_tokens else replace(spec, num_tokens=self.num_tokens)

    def save(self, path: Path, state: dict[str, Tensor], metadata: Mapping[str, str], config: OutputConfig) -> Path:
        """Write these weights to ``path``, nested if it ends in .bin; only projector and image layers are in the file."""
        weights = self.weights(getattr(torch, config.dtype), state)
        if path.suffix == ".bin":
            return save_adapter(weights, path, layout="nested")
        return save_adapter(weights, path, metadata=metadata)


def fresh_adapter(unet: Any, encoder: EncoderSizes, config: AdapterConfig) -> TrainedAdapter:
    """A new adapter of the configured family for this UNet, in the shapes of the released files."""
    token_dim: int = unet.config.cross_attention_dim
    projector, num_tokens = format_named(config.family).fresh(token_dim, encoder, config)
    return TrainedAdapter(projector, build_processors(unet, num_tokens=num_tokens, init=config.init))


def continued_adapter(unet: Any, weights: AdapterWeights, encoder: EncoderSizes) -> TrainedAdapter:
    """An adapter that starts from a loaded file.

    Raises IncompatibleAdapterError if it does not fit the UNet.
    """
    check_adapter(weights, layout_of(unet))
    num_tokens = weights.spec.num_tokens or encoder.tokens
    processors = build_processors(unet, num_tokens=num_tokens)
    adapter = TrainedAdapter(weights.module.projector, processors)
    adapter.load_state_dict(weights.module.checkpoint_state())
    # The file's dtype would be too coarse for the optimiser's small steps.
    return adapter.float().requires_grad_(True).train()


def trainable(module: nn.Module) -> dict[str, int]:
    """Parameters that learn, by name, with their number of elements."""
    return {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}


def describe_trainable(adapter: TrainedAdapter) -> str:
    """The number of trained parameters and where they are, in three lines."""
    counts = trainable(adapter)
    projector = sum(n for name, n in counts.items() if name.startswith("image_proj."))
    layers = sum(1 for name in counts if name.endswith("to_k_ip.weight"))
    total = sum(counts.values())
    return (
        f"trained: {total:,} parameters\n"
        f"  image_proj {projector:,} ({type(adapter.image_proj).__name__}, {adapter.num_tokens} tokens)\n"
        f"  to_k_ip and to_v_ip {total - projector:,} in {layers} cross-attentions"
    )


def check_family(config: AdapterConfig, spec: AdapterSpec) -> None:
    """Raise InvalidInputError if a file to start from is of another family than configured."""
    if spec.family != config.family:
        raise InvalidInputError(
            f"adapter.start_from holds a {spec.family} adapter, but adapter.family is {config.family!r}; "
            f"set adapter.family = {spec.family!r}"
        )
