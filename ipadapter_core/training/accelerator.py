"""accelerate's Accelerator for a run: what the trainer asks of it, and how it is made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .config import RunConfig
from .rendezvous import init_method
from .saved_state import Stateful

PATIENCE = timedelta(hours=2)
"""How long processes wait for one another: one may have much more to encode, or draw a sheet. torch's 10 minutes of NCCL are too few."""


class Accelerator(Protocol):
    """The processes of a run and their device, as far as the trainer needs them."""

    @property
    def device(self) -> torch.device: ...
    @property
    def is_main_process(self) -> bool: ...
    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-step ends an optimiser step."""
        ...

    @property
    def scaler(self) -> Stateful | None:
        """Of fp16's gradients."""
        ...

    def prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]: ...
    def accumulate(self, module: nn.Module) -> AbstractContextManager[None]: ...
    def autocast(self) -> AbstractContextManager[None]: ...
    def backward(self, loss: Tensor) -> None: ...
    def clip_grad_norm_(self, parameters: Sequence[nn.Parameter], norm: float) -> Tensor: ...
    def gather(self, tensor: Tensor) -> Tensor: ...
    def reduce(self, tensor: Tensor, how: str) -> Tensor: ...
    def wait_for_everyone(self) -> None: ...


def build_accelerator(config: RunConfig, *, find_unused: bool = False) -> Accelerator:
    """accelerate's Accelerator for this run; also inside accelerate launch and torchrun.

    ``find_unused``: some parameters may get no gradient in a step.
    """
    import accelerate
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

    _quiet_libraries()
    state: Any = AcceleratorState
    if state._shared_state:  # a run before this one in the same process may have computed in another precision
        state._reset_state(reset_partial_state=False)
    method = init_method()
    parallel = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True, broadcast_buffers=False, find_unused_parameters=find_unused
    )
    meeting: dict[str, Any] = {"timeout": PATIENCE} | ({} if method is None else {"init_method": method})
    made = accelerate.Accelerator(
        mixed_precision={"fp32": "no"}.get(config.train.precision, config.train.precision),
        # by the plugin: the plain argument gives way to ACCELERATE_GRADIENT_ACCUMULATION_STEPS of the launcher
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.train.accumulate),
        cpu=config.train.device == "cpu",
        kwargs_handlers=[parallel, InitProcessGroupKwargs(**meeting)],
    )
    return cast(Accelerator, made)


def _quiet_libraries() -> None:
    """Their progress bars of loading weights would tear ours apart."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
