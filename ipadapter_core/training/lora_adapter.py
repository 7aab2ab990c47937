"""What is trained: the tensors of a LoRA of any algorithm, beside layers of a frozen UNet and its text encoders.

A trained module is the inference code's own ``Update`` with parameters for tensors, built anew in every call: the formula
that learns is the one that is used later, for every algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..entries import some
from ..errors import CorruptFileError, IncompatibleAdapterError, InvalidInputError, quoted
from ..lora import Component, Layer, LoRAModule, LoRAWeights, Target, Update, load_lora, parse_selector, targets_of
from ..lora.algorithms import trainings
from ..lora.matching import match_lora
from ..lora.saving import save_lora
from ..lora.trainable import trainable as can_learn
from ..lora.update import shape_text
from .config import LoRAConfig, OutputConfig

Parts = Mapping[Component, nn.Module]
"""The frozen models that a LoRA can change: the UNet, and text encoders where they are trained."""


class LearnedUpdate(nn.Module):
    """An update whose tensors are parameters, named as in the update. ``update`` gives it in its present form."""

    def __init__(self, update: Update) -> None:
        super().__init__()
        for name, tensor in update.tensors().items():
            self.register_parameter(name, nn.Parameter(tensor.detach().float().clone()))
        # only the numbers between the tensors are kept from it: scale, axis
        self._form = update.to(device=torch.device("meta"))

    def update(self, tensors: Mapping[str, Tensor] | None = None) -> Update:
        return self._form.with_tensors(dict(self.named_parameters()) if tensors is None else tensors)


class TrainedLoRA(nn.Module):
    """Learned updates by target. It acts once ``attach`` has put it beside the layers of the models.

    It holds no reference to the models, so that copies of it (the running average) are small.
    """

    def __init__(self, updates: Mapping[Target, Update], dropout: float = 0.0) -> None:
        super().__init__()
        self.targets = tuple(updates)
        self.dropout = dropout
        names = (f"{target.component}_{target.path.replace('.', '_')}" for target in self.targets)
        learned = (LearnedUpdate(update) for update in updates.values())
        self.layers = nn.ModuleDict(dict(zip(names, learned, strict=True)))

    def updates(self) -> list[tuple[Target, LearnedUpdate]]:
        """What learns beside each target."""
        learned = [layer for layer in self.layers.values() if isinstance(layer, LearnedUpdate)]
        return list(zip(self.targets, learned, strict=True))

    def parameters_of(self, *, text: bool) -> list[nn.Parameter]:
        """Those beside layers of text encoders, or those of the UNet."""
        return [
            p
            for target, learned in self.updates()
            if (target.component != "denoiser") == text
            for p in learned.parameters()
        ]

    def attach(self, parts: Parts, layer: Callable[[nn.Module], Layer] = Layer) -> Attached:
        """Add every update's output to its layer's, in the layer's dtype, until the result is removed."""
        attached = Attached()
        for target, learned in self.updates():
            module = parts[target.component].get_submodule(target.path)
            hook = self._beside(learned, layer(module), attached)
            attached.handles.append(module.register_forward_hook(hook))
        return attached

    def _beside(self, learned: LearnedUpdate, layer: Layer, attached: Attached) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not attached.acts:
                return None
            x = args[0].to(output.dtype)
            if self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            return output + learned.update().unfused(layer, output)(x, output, 1.0)

        return add

    def weights(self, dtype: torch.dtype, state: Mapping[str, Tensor] | None = None) -> LoRAWeights:
        """A frozen copy for inference and for saving, on the CPU; raises CorruptFileError if a weight is no number."""
        state = self.state_dict() if state is None else state
        modules: list[LoRAModule] = []
        for name, (target, learned) in zip(self.layers, self.updates(), strict=True):
            prefix = f"layers.{name}."
            found = {
                key.removeprefix(prefix): value.detach().to("cpu", dtype, copy=True)
                for key, value in state.items()
                if key.startswith(prefix)
            }
            if not all(bool(torch.isfinite(value).all()) for value in found.values()):
                raise CorruptFileError(f"the LoRA in training has NaN or infinite numbers at {target.path}")
            update = learned.update(found)
            modules.append(LoRAModule(target.path, target.component, target.path.replace(".", "_"), update))
        return LoRAWeights("the LoRA in training", tuple(modules), "trained")

    def save(self, path: Path, state: dict[str, Tensor], metadata: Mapping[str, str], config: OutputConfig) -> Path:
        """Write these weights to ``path`` in the configured key format and type; alphas stay float32."""
        named = {"ss_steps" if key == "steps" else key: value for key, value in metadata.items()}
        weights = replace(self.weights(torch.float32, state), metadata=named)
        save_lora(weights, path, key_format=config.key_format, dtype=config.dtype, overwrite=True)
        return path


class Attached:
    """A LoRA at work beside its layers."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.acts = True

    @contextmanager
    def off(self) -> Generator[None]:
        """The frozen models alone, for the time of a block."""
        before, self.acts = self.acts, False
        try:
            yield
        finally:
            self.acts = before

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


# --- new ones ----------------------------------------------------------------------------------------------------------


def fresh_lora(parts: Parts, config: LoRAConfig) -> TrainedLoRA:
    """A new LoRA on the chosen layers; it starts as no change at all.

    Raises InvalidInputError if none is chosen, or one that the algorithm cannot change.
    """
    listed = [target for component, model in parts.items() for target in targets_of(model, component).targets.values()]
    algorithm, training = trainings()[config.algorithm]
    text = config.targets or training.targets
    selector = parse_selector(text)
    lost = selector.unmatched(listed)
    if lost:
        here = ", ".join(parts)
        raise InvalidInputError(
            f"lora.targets: {some([quoted(where) for where in lost])} matches no layer of {here}; see `ipadapter lora inspect` for "
            "blocks, and lora.text_encoders for layers of text encoders"
        )
    chosen = can_learn(selector.chosen(listed))
    if not chosen:
        raise InvalidInputError(
            f"lora.targets {quoted(text)} chooses no linear layer and no convolution; write for example 'all: 0, attn: 1'"
        )
    updates: dict[Target, Update] = {}
    for target in chosen:
        module: Any = parts[target.component].get_submodule(target.path)
        if getattr(module, "groups", 1) != 1:
            raise InvalidInputError(
                f"lora.targets chooses {target.path}, a grouped convolution, which none of these algorithms can change"
            )
        update = algorithm.fresh(module.weight.detach().float(), config)
        if not update.fits(target.shape):
            raise InvalidInputError(
                f"lora.targets chooses {target.path} ({shape_text(target.shape)}), which lora.algorithm {quoted(config.algorithm)} "
                f"cannot change (it made an update for {shape_text(update.weight_shape)}); leave such layers out, for example with "
                f"{quoted(training.targets)}"
            )
        updates[target] = update
    return TrainedLoRA(updates, config.dropout)


# --- from a file ---------------------------------------------------------------------------------------------------------


def continued_lora(parts: Parts, config: LoRAConfig) -> TrainedLoRA:
    """A LoRA that starts from a file of any key format and algorithm; the file says its layers and ranks.

    Raises IncompatibleAdapterError if it does not fit the models or would be trained in part only.
    """
    weights = load_lora(config.start_from)
    if "denoiser" in parts and len(parts) == 1 and any(c != "denoiser" for c in weights.components):
        raise IncompatibleAdapterError(
            f"{weights.name} also changes text encoders ({', '.join(weights.components)}); set lora.text_encoders = true to "
            "train all of it on"
        )
    matched = match_lora(weights, {component: targets_of(model, component) for component, model in parts.items()})
    if matched.unmatched:
        raise IncompatibleAdapterError(
            f"{matched.summary()}; all of a file must have a place to be trained on (ipadapter lora verify)"
        )
    updates: dict[Target, Update] = {}
    for match in matched.matches:
        if match.parameter == "bias" or match.rows is not None or match.target in updates:
            raise IncompatibleAdapterError(
                f"{weights.name} changes the {match.parameter} of {match.target.path} in a way that cannot be trained on; "
                "plain weights of whole layers are expected"
            )
        if match.target.is_embedding or not match.update.learns:
            raise IncompatibleAdapterError(
                f"{weights.name} has {match.update.title} on {match.target.path}, which can be applied but not trained on"
            )
        updates[match.target] = match.update
    return TrainedLoRA(updates, config.dropout)


def build_lora(parts: Parts, config: LoRAConfig) -> TrainedLoRA:
    """The configured LoRA, fresh or from a file."""
    return continued_lora(parts, config) if config.start_from else fresh_lora(parts, config)


def describe_lora(lora: TrainedLoRA, lr: float, text_rate: float = 0.0) -> str:
    """How much is trained, in which parts, by which algorithms and ranks, and how fast. ``text_rate`` 0: as ``lr``."""
    total = sum(p.numel() for p in lora.parameters())
    lines = [f"trained: {total:,} parameters in {len(lora.targets)} layers"]
    for component in dict.fromkeys(target.component for target in lora.targets):
        own = [learned for target, learned in lora.updates() if target.component == component]
        updates = [learned.update() for learned in own]
        count = sum(p.numel() for learned in own for p in learned.parameters())
        kinds = ", ".join(f"{title} × {n}" for title, n in _counts(u.title for u in updates).items())
        ranks = ", ".join(f"{rank} × {n}" for rank, n in _counts(u.rank or "whole" for u in updates).items())
        rate = lr if component == "denoiser" else text_rate or lr
        lines.append(f"  {component} {count:,} in {len(own)} layers ({kinds}; ranks {ranks}) at rate {rate:g}")
    return "\n".join(lines)


def _counts(values: Iterable[object]) -> dict[object, int]:
    counts: dict[object, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts
