"""How much memory a run will need, counted before it starts: weights by their shapes, activations by a dry run on ``meta``.

The dry run executes the step's models without numbers and adds up what autograd would keep, so frozen layers, the layers
that learn and the picture size count as they are. Attention counts as the fused kernels keep it: q, k, v, output and one
number per row.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import InvalidInputError
from ..lora import Component
from .config import RunConfig
from .frozen import FrozenBase
from .optimizers import STATE_BYTES
from .pictures import bucket_sizes
from .trainee import Trainee

WORKSPACE = 0.15
"""Share added for kernels' workspace, the allocator's gaps and the gradients on their way."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Predicted bytes on the compute device while training."""

    frozen: int
    trained: int
    activations: int
    available: int | None

    @property
    def total(self) -> int:
        return int((self.frozen + self.trained + self.activations) * (1 + WORKSPACE))

    def describe(self) -> str:
        there = "" if self.available is None else f"; {_gb(self.available)} are free"
        return (
            f"memory: about {_gb(self.total)} (frozen models {_gb(self.frozen)}, adapter with gradients, optimiser and "
            f"average {_gb(self.trained)}, activations {_gb(self.activations)}, workspace {WORKSPACE:.0%}){there}"
        )

    def check(self, config: RunConfig) -> None:
        """Raise InvalidInputError with what would help when the run cannot fit."""
        if self.available is None or self.total <= self.available:
            return
        advice: list[str] = []
        if not config.train.checkpointing:
            advice.append("train.checkpointing = true")
        if config.train.precision == "fp32":
            advice.append('train.precision = "bf16"')
        if config.train.batch > 1:
            half = config.train.batch // 2
            advice.append(f"train.batch = {half} with train.accumulate = {2 * config.train.accumulate}")
        if config.train.optimizer == "adamw":
            advice.append('train.optimizer = "adamw8bit"')
        advice.append("a smaller data.resolution")
        if not config.train.shard:
            advice.append("train.shard = true on several GPUs")
        raise InvalidInputError(
            f"this run needs {_gb(self.total)} and {_gb(self.available)} are free; try {', or '.join(advice)} "
            "(train.ignore_memory = true starts it anyway)"
        )


def predict(trainee: Trainee, factor: int, device: torch.device, shards: int = 1) -> Memory:
    """Predict the peak of a run. ``factor``: pixels per latent; ``shards``: processes that share the frozen weights."""
    config = trainee.config
    checkpointing, latent = config.train.checkpointing, largest_latent(config, factor)
    activations = activation_bytes(trainee, latent, element_size(config), checkpointing=checkpointing)
    return memory_of(config, trainee.base, trainee.count(), activations, device, shards)


def memory_of(
    config: RunConfig, base: FrozenBase, trained: int, activations: int, device: torch.device, shards: int = 1
) -> Memory:
    """The sum for ``trained`` parameters and the activations of one sample."""
    modules: list[nn.Module] = [base.unet, *base.text_encoders]
    frozen = sum(p.numel() for module in modules for name, p in module.named_parameters() if ".processor." not in name)
    per_parameter = 4 + 4 + STATE_BYTES[config.train.optimizer] + (4 if config.train.ema else 0)
    encoders = 0
    if base.vae is not None and not config.data.cache:
        encoders = sum(p.numel() for p in base.vae.parameters()) * 4
    return Memory(
        frozen * element_size(config) // shards + encoders,
        trained * per_parameter,
        activations * config.train.batch,
        available_memory(device),
    )


def element_size(config: RunConfig) -> int:
    return 4 if config.train.precision == "fp32" else 2


def largest_latent(config: RunConfig, factor: int) -> tuple[int, int]:
    height, width = max(bucket_sizes(config.data), key=lambda size: size[0] * size[1])
    return height // factor, width // factor


def activation_bytes(trainee: Trainee, latent: tuple[int, int], element: int, *, checkpointing: bool) -> int:
    """Bytes that autograd keeps for one sample, the models computing in numbers of ``element`` bytes."""
    base = trainee.base
    with torch.device("meta"):
        twins: dict[Component, Any] = {name: _twin(model) for name, model in trainee.parts.items()}
    learned = _on_meta(trainee.learned)
    trainee.attach(learned, twins)
    counter = SavedTensorCounter(nn.ModuleList([*twins.values(), learned]), base.training.checkpointed)
    with counter, fused_attention():
        for name, ids in zip(("te1", "te2"), base.tokenize([""]), strict=False):
            if name in twins:
                twins[name](ids.to("meta"))
        context = torch.zeros(1, 77 + trainee.image_tokens, base.unet.config.cross_attention_dim, device="meta")
        learns = len(twins) > 1 or trainee.image_tokens > 0
        _denoise(twins["denoiser"], context.requires_grad_(learns), latent, base)
    return counter.total(checkpointing) * element // 4


def _twin(model: Any) -> nn.Module:
    made = type(model).from_config(model.config) if hasattr(model, "from_config") else type(model)(model.config)
    return made.requires_grad_(False)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy without numbers; the original's are not copied first."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, memo).to("meta")


def _denoise(twin: Any, context: Tensor, latent: tuple[int, int], base: FrozenBase) -> None:
    """One sample through a denoiser on ``meta``."""
    added: dict[str, Tensor] = {}
    if base.reads_sizes:
        pooled = twin.add_embedding.linear_1.in_features - 6 * twin.config.addition_time_embed_dim
        added = base.added(torch.zeros(1, pooled, device="meta"), torch.zeros(1, 6, device="meta"))
    twin(
        torch.zeros(1, twin.config.in_channels, *latent, device="meta"),
        torch.zeros(1, dtype=torch.long, device="meta"),
        context,
        added_cond_kwargs=added,
    )


class SavedTensorCounter:
    """Counts the tensors that autograd saves (weights excepted), each once, and where in the model."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self._weights = {id(p) for p in model.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._seen: dict[int, Tensor] = {}
        self._by_block: dict[int, int] = {}
        self._inputs: dict[int, int] = {}
        self._outside = 0
        self._stack: list[int] = []
        self._handles: list[RemovableHandle] = []
        """``blocks``: class names of those that gradient checkpointing computes again."""
        for number, block in enumerate(m for m in model.modules() if type(m).__name__ in blocks):
            self._handles.append(block.register_forward_pre_hook(partial(self._enter, number)))
            self._handles.append(block.register_forward_hook(self._leave))

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def total(self, checkpointing: bool) -> int:
        inside = sum(self._by_block.values())
        if not checkpointing:
            return self._outside + inside
        # blocks keep their inputs, and one at a time is computed again
        return self._outside + sum(self._inputs.values()) + max(self._by_block.values(), default=0)

    def _pack(self, tensor: Tensor) -> Tensor:
        # storages stay unique because every tensor seen is kept alive
        key = tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
        if isinstance(tensor, nn.Parameter) or id(tensor) in self._weights or key in self._seen:
            return tensor
        if tensor._base is not None and isinstance(tensor._base, nn.Parameter):
            return tensor
        self._seen[key] = tensor
        size = tensor.untyped_storage().nbytes()
        if self._stack:
            self._by_block[self._stack[0]] = self._by_block.get(self._stack[0], 0) + size
        else:
            self._outside += size
        return tensor

    def _enter(self, number: int, module: nn.Module, args: tuple[object, ...]) -> None:
        if not self._stack:
            self._inputs[number] = sum(a.nbytes for a in args if isinstance(a, Tensor))
        self._stack.append(number)

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self._stack.pop()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        return out


@contextmanager
def fused_attention() -> Generator[None]:
    """On ``meta`` torch would choose the kernel that keeps every attention matrix; no GPU does."""
    original = F.scaled_dot_product_attention

    def fused(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        return _Fused.apply(q, k, v)

    F.scaled_dot_product_attention = cast(Any, fused)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def available_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return None


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
