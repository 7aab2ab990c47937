"""diffusers: what a call of a model consists of, told to every hook inside of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...attention.call import COND, UNCOND, ModelCall
from ...errors import InvalidInputError
from ...models import clock_of
from ...models.sites import Clock
from ..calls import Calls, eagerly, watch_hooks

Branch = Literal["uncond", "cond"]
Branches = Sequence[Branch] | Callable[[], Sequence[Branch]]
"""What the batch of a call consists of, in order, or a function that is asked at every call."""

_NUMBERS = {"uncond": UNCOND, "cond": COND}


@dataclass(slots=True, eq=False)
class Step:
    """How far sampling is by the timestep that a model is called with."""

    called_with: Tensor | float
    clock: Clock
    _timestep: float | None = None

    def timestep(self) -> float:
        """The timestep of training, 0..1000; reading it synchronises the device, once per call and only where it is asked."""
        if self._timestep is None:
            given = self.called_with
            value = float(given.flatten()[0]) if isinstance(given, Tensor) else float(given)
            whole = not given.is_floating_point() if isinstance(given, Tensor) else isinstance(given, int)
            self._timestep = value * 1000 if self.clock == "sigma" and not whole and value <= 1.0 else value
        return self._timestep

    def percent(self) -> float:
        """Sampling progress: 0 is pure noise, 1 done, linear in the timesteps of training.

        So start_percent and end_percent mean what they mean in ComfyUI, whose ``percent_to_sigma`` takes the sigma of
        timestep (1 - percent) · 999 of a UNet; neither counts steps, so fewer steps or another scheduler leave a window at
        the same noise. A UNet's timesteps are 0..999 with every scheduler, also the fractions that Karras and exponential
        sigmas end on: 0.5 is nearly done. Transformers are trained on sigma · 1000: pipelines pass that (SD3, Sana) or
        sigma itself (Flux, Qwen), of which 0.5 is the middle; whole numbers are never sigmas. The shift of a flow
        scheduler is not undone here, as a model is not told it.
        """
        return min(max(1 - self.timestep() / (999.0 if self.clock == "steps" else 1000.0), 0.0), 1.0)


class Beginning:
    """A call of a module that begins, described once for all owners who say the same of its batch."""

    def __init__(self, clock: Clock, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        self.clock: Clock = clock
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        self.sample: Tensor | None = sample if isinstance(sample, Tensor) else None
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        self.timestep = timestep if isinstance(timestep, (Tensor, float, int)) else None
        self._described: dict[tuple[Branch, ...], ModelCall] = {}

    def described(self, branches: Branches) -> ModelCall:
        """The call as one of a batch of these branches."""
        names = tuple(branches() if callable(branches) else branches)
        found = self._described.get(names)
        if found is None:
            found = self._described[names] = self._describe(names)
        return found

    def _describe(self, names: tuple[Branch, ...]) -> ModelCall:
        sample, timestep = self.sample, self.timestep
        batch = 1 if sample is None else int(sample.shape[0])
        if batch % len(names):
            raise InvalidInputError(
                f"the model got a batch of {batch}, which cannot hold the branches {names} in equal parts; "
                "pass branches=('cond',) where classifier-free guidance is off"
            )
        step = Step(0.0 if timestep is None else timestep, self.clock)
        latent = None if sample is None or sample.ndim < 4 else (int(sample.shape[-2]), int(sample.shape[-1]))
        return ModelCall(tuple(_NUMBERS[name] for name in names), step.percent, step.timestep, latent)


class Owner(Protocol):
    """What acts in a module's calls: it keeps them, each as it sees it."""

    @property
    def calls(self) -> Calls[Any]: ...
    def begin(self, call: Beginning) -> None:
        """Begin a call, with ``calls.begin``."""
        ...


class Around:
    """The one pair of hooks around a module's calls, for all who act in them. It is on the module while it has owners."""

    def __init__(self, module: nn.Module) -> None:
        self._owners: tuple[Owner, ...] = ()
        self._clock: Clock = clock_of(module)
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, always_call=True),
        ]

    @staticmethod
    def join(module: nn.Module, owner: Owner) -> Around:
        """From now on ``owner`` hears of every call."""
        watch_hooks()
        with _JOINING:
            hooks = (getattr(hook, "__self__", None) for hook in vars(module)["_forward_pre_hooks"].values())
            around = next((hook for hook in hooks if isinstance(hook, Around)), None) or Around(module)
            around._owners = (*around._owners, owner)
        return around

    def leave(self, owner: Owner) -> None:
        """``owner`` hears of no more calls."""
        with _JOINING:
            self._owners = tuple(other for other in self._owners if other is not owner)
            if not self._owners:
                for handle in self._handles:
                    handle.remove()

    def _before(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        eagerly(self._begin, module, args, kwargs)

    def _begin(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        watch_hooks()
        call = Beginning(self._clock, args, kwargs)
        for owner in self._owners:
            owner.begin(call)

    def _after(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        eagerly(self._end, output)

    def _end(self, output: object) -> None:
        for owner in self._owners:
            owner.calls.end(output)


_JOINING = Lock()
