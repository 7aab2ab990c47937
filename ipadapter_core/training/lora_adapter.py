"""What is trained: the tensors of a LoRA of any algorithm, beside layers of a frozen UNet and its text encoders.

A trained module is the inference code's own ``Update`` with parameters for tensors, built anew in every call: the formula
that learns is the one that is used later, for every algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..entries import some
from ..errors import CorruptFileError, IncompatibleAdapterError, InvalidInputError, quoted
from ..lora import Component, Layer, LoRAModule, LoRAWeights, Target, Update, load_lora, parse_selector, targets_of
from ..lora.decomposed import Decomposed
from ..lora.hadamard import Hadamard
from ..lora.input_rotation import InputRotation
from ..lora.kronecker import Kronecker
from ..lora.low_rank import LowRank
from ..lora.placement import place_lora
from ..lora.saving import save_lora
from ..lora.trainable import trainable as can_learn
from ..lora.update import flat
from .config import LoRAConfig, OutputConfig

Parts = Mapping[Component, nn.Module]
"""The frozen models that a LoRA can change: the UNet, and text encoders where they are trained."""
TARGETS = {
    "lora": "all: 0, attn: 1",
    "locon": "all: 0, attn: 1, ff: 1, proj: 1, resnet: 1, sampler: 1",
}
"""Which layers are trained where nothing is chosen; algorithms that are not named here are as lora."""


class LearnedUpdate(nn.Module):
    """An update whose tensors are parameters, named as in the update. `update` gives it in its present form."""

    def __init__(self, update: Update) -> None:
        super().__init__()
        for name, tensor in update.tensors().items():
            self.register_parameter(name, nn.Parameter(tensor.detach().float().clone()))
        # only the numbers between the tensors are kept from it: scale, axis
        self._form = update.to(device=torch.device("meta"))

    def update(self, tensors: Mapping[str, Tensor] | None = None) -> Update:
        return _filled(self._form, dict(self.named_parameters()) if tensors is None else tensors)


def _filled(form: Update, tensors: Mapping[str, Tensor]) -> Update:
    if isinstance(form, Decomposed):
        inner = {name: tensor for name, tensor in tensors.items() if name != "magnitude"}
        return replace(form, inner=_filled(form.inner, inner), magnitude=tensors["magnitude"])
    return replace(form, **tensors)


class TrainedLoRA(nn.Module):
    """Learned updates by target. It acts once `attach` has put it beside the layers of the models.

    It holds no reference to the models, so that copies of it (the running average) are small.
    """

    def __init__(self, updates: Mapping[Target, Update], dropout: float = 0.0) -> None:
        super().__init__()
        self.targets = tuple(updates)
        self.dropout = dropout
        names = (f"{target.component}_{target.path.replace('.', '_')}" for target in self.targets)
        learned = (LearnedUpdate(update) for update in updates.values())
        self.layers = nn.ModuleDict(dict(zip(names, learned, strict=True)))

    def parameters_of(self, *, text: bool) -> list[nn.Parameter]:
        """Those beside layers of text encoders, or those of the UNet."""
        chosen = zip(self.targets, self.layers.values(), strict=True)
        return [p for target, learned in chosen if (target.component != "unet") == text for p in learned.parameters()]

    def attach(self, parts: Parts, layer: Callable[[nn.Module], Layer] = Layer) -> Attached:
        """Add every update's output to its layer's, in the layer's dtype, until the result is removed."""
        attached = Attached()
        for target, learned in zip(self.targets, self.layers.values(), strict=True):
            module = parts[target.component].get_submodule(target.path)
            hook = self._beside(cast(LearnedUpdate, learned), layer(module), attached)
            attached.handles.append(module.register_forward_hook(hook))
        return attached

    def _beside(self, learned: LearnedUpdate, layer: Layer, attached: Attached) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not attached.acts:
                return None
            x = args[0].to(output.dtype)
            if self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            return output + learned.update().live(layer, output)(x, output, 1.0)

        return add

    def weights(self, dtype: torch.dtype, state: Mapping[str, Tensor] | None = None) -> LoRAWeights:
        """A frozen copy for inference and for saving, on the CPU; raises CorruptFileError if a weight is no number."""
        state = self.state_dict() if state is None else state
        modules: list[LoRAModule] = []
        for target, (name, learned) in zip(self.targets, self.layers.items(), strict=True):
            prefix = f"layers.{name}."
            found = {
                key.removeprefix(prefix): value.detach().to("cpu", dtype, copy=True)
                for key, value in state.items()
                if key.startswith(prefix)
            }
            if not all(bool(torch.isfinite(value).all()) for value in found.values()):
                raise CorruptFileError(f"the LoRA in training has NaN or infinite numbers at {target.path}")
            update = cast(LearnedUpdate, learned).update(found)
            modules.append(LoRAModule(target.path, target.component, target.path.replace(".", "_"), update))
        return LoRAWeights("the LoRA in training", tuple(modules), "trained")

    def save(self, path: Path, state: dict[str, Tensor], metadata: Mapping[str, str], config: OutputConfig) -> Path:
        """Write these weights to `path` in the configured spelling and type; alphas stay float32."""
        named = {"ss_steps" if key == "steps" else key: value for key, value in metadata.items()}
        weights = replace(self.weights(torch.float32, state), metadata=named)
        save_lora(weights, path, spelling=config.spelling, dtype=config.dtype, overwrite=True)
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
    """A new LoRA on the chosen layers; it starts as no change at all. Raises InvalidInputError if none is chosen."""
    listed = [target for component, model in parts.items() for target in targets_of(model, component).targets.values()]
    text = config.targets or TARGETS.get(config.algorithm, TARGETS["lora"])
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
        updates[target] = _BUILDERS[config.algorithm](module.weight.detach().float(), config)
    return TrainedLoRA(updates, config.dropout)


def _scale(config: LoRAConfig, rank: int) -> float:
    alpha = config.alpha or rank
    return alpha / (math.sqrt(rank) if config.rslora else rank)


def _random(*shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape) * std


def _low_rank(weight: Tensor, config: LoRAConfig) -> Update:
    """`down` uniform as torch's layers start, `up` zero (LoRA's paper has a normal distribution; trainers this one)."""
    rank = min(config.rank, *flat(tuple(weight.shape)))
    down = torch.empty(rank, *weight.shape[1:])
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    up = torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2))
    return LowRank(down, up, _scale(config, rank))


def _hadamard(weight: Tensor, config: LoRAConfig) -> Update:
    """Spreads as in LyCORIS, whose second product starts at zero."""
    rows, columns = flat(tuple(weight.shape))
    rank = min(config.rank, rows, columns)
    return Hadamard(
        _random(rows, rank, std=0.1),
        _random(rank, columns),
        torch.zeros(rows, rank),
        _random(rank, columns),
        _scale(config, rank),
    )


def _kronecker(weight: Tensor, config: LoRAConfig) -> Update:
    """A whole small matrix, and a large one that is whole too where factors of this rank would not be smaller."""
    out, columns, *kernel = weight.shape
    p, q = _divisor(out, config.factor), _divisor(columns, config.factor)
    w1 = torch.empty(p, q)
    nn.init.kaiming_uniform_(w1, a=math.sqrt(5))
    m, n = out // p, columns // q
    if config.rank * (m + n * math.prod(kernel)) >= m * n * math.prod(kernel):
        return Kronecker(1.0, w1=w1, w2=torch.zeros(m, n, *kernel))
    w2_b = torch.empty(config.rank, n, *kernel)
    nn.init.kaiming_uniform_(w2_b, a=math.sqrt(5))
    return Kronecker(_scale(config, config.rank), w1=w1, w2_a=torch.zeros(m, config.rank), w2_b=w2_b)


def _divisor(size: int, most: int) -> int:
    return max(d for d in range(1, min(size, most) + 1) if size % d == 0)


def _decomposed(weight: Tensor, config: LoRAConfig) -> Update:
    others = [axis for axis in range(weight.ndim) if axis != (0 if config.dora_axis == "out" else 1)]
    magnitude = torch.linalg.vector_norm(weight, dim=others)
    return Decomposed(_low_rank(weight, config), magnitude, config.dora_axis)


_BUILDERS: Mapping[str, Callable[[Tensor, LoRAConfig], Update]] = {
    "lora": _low_rank,
    "locon": _low_rank,
    "loha": _hadamard,
    "lokr": _kronecker,
    "dora": _decomposed,
}


# --- from a file ---------------------------------------------------------------------------------------------------------


def continued_lora(parts: Parts, config: LoRAConfig) -> TrainedLoRA:
    """A LoRA that starts from a file of any spelling and algorithm; the file says its layers and ranks.

    Raises IncompatibleAdapterError if it does not fit the models or would be trained in part only.
    """
    weights = load_lora(config.start_from)
    if "unet" in parts and len(parts) == 1 and any(c != "unet" for c in weights.components):
        raise IncompatibleAdapterError(
            f"{weights.name} also changes text encoders ({', '.join(weights.components)}); set lora.text_encoders = true to "
            "train all of it on"
        )
    placed = place_lora(weights, {component: targets_of(model, component) for component, model in parts.items()})
    if placed.unmatched:
        raise IncompatibleAdapterError(
            f"{placed.summary()}; all of a file must have a place to be trained on (ipadapter lora verify)"
        )
    updates: dict[Target, Update] = {}
    for placement in placed.placements:
        if placement.parameter == "bias" or placement.rows is not None or placement.target in updates:
            raise IncompatibleAdapterError(
                f"{weights.name} changes the {placement.parameter} of {placement.target.path} in a way that cannot be trained on; "
                "plain weights of whole layers are expected"
            )
        if placement.target.is_embedding or isinstance(placement.update, InputRotation):
            raise IncompatibleAdapterError(
                f"{weights.name} has {placement.update.title} on {placement.target.path}, which can be applied but not trained on"
            )
        updates[placement.target] = placement.update
    return TrainedLoRA(updates, config.dropout)


def build_lora(parts: Parts, config: LoRAConfig) -> TrainedLoRA:
    """The configured LoRA, fresh or from a file."""
    return continued_lora(parts, config) if config.start_from else fresh_lora(parts, config)


def describe_lora(lora: TrainedLoRA, lr: float, text_rate: float = 0.0) -> str:
    """How much is trained, in which parts, by which algorithms and ranks, and how fast. `text_rate` 0: as `lr`."""
    total = sum(p.numel() for p in lora.parameters())
    lines = [f"trained: {total:,} parameters in {len(lora.targets)} layers"]
    for component in dict.fromkeys(target.component for target in lora.targets):
        own = [
            (target, cast(LearnedUpdate, learned))
            for target, learned in zip(lora.targets, lora.layers.values(), strict=True)
            if target.component == component
        ]
        updates = [learned.update() for _, learned in own]
        count = sum(p.numel() for _, learned in own for p in learned.parameters())
        kinds = ", ".join(f"{title} × {n}" for title, n in _counts(u.title for u in updates).items())
        ranks = ", ".join(f"{rank} × {n}" for rank, n in _counts(u.rank or "whole" for u in updates).items())
        rate = lr if component == "unet" else text_rate or lr
        lines.append(f"  {component} {count:,} in {len(own)} layers ({kinds}; ranks {ranks}) at rate {rate:g}")
    return "\n".join(lines)


def _counts(values: Iterable[object]) -> dict[object, int]:
    counts: dict[object, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts
