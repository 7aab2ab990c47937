"""diffusers: what a call of a model consists of, told to every hook inside of it."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ...attention.call import COND, UNCOND, ModelCall
from ...errors import InvalidInputError
from ...models import family_of
from ...models.grids import Size
from ...models.sites import BaseModel, Clock
from ...narrowing import is_row
from ..calls import Calls, eagerly, watch_hooks

Branch = Literal["uncond", "cond"]
Branches = Sequence[Branch] | Callable[[], Sequence[Branch]]
"""What the batch of a call consists of, in order, or a function that is asked at every call."""

_NUMBERS = {"uncond": UNCOND, "cond": COND}


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """How a pipeline's scheduler spaces the noise of a flow model: its ``shift``, the ``timesteps`` of this run, where it stands.

    The shift moves a time t, linear in the steps, to the noise shift · t / (1 + (shift - 1) · t). ``index`` is None until the
    first step was taken.
    """

    shift: float = 1.0
    timesteps: Tensor | None = None
    index: int | None = None

    def now(self) -> float | None:
        """The timestep at which the scheduler stands, without a look at the device; None where it does not tell."""
        numbers = () if self.timesteps is None or self.index is None else _numbers(self.timesteps)
        return numbers[self.index] if self.index is not None and 0 <= self.index < len(numbers) else None

    def time(self, noise: float) -> float:
        """The time that was shifted to this noise, 1 at the start and 0 at the end."""
        return noise / (self.shift - (self.shift - 1) * noise)

    def exact(self, timestep: float) -> float:
        """The scheduler's timestep that half precision rounded to this one; the same where there is none."""
        if self.timesteps is None:
            return timestep
        nearest = min(_numbers(self.timesteps), key=lambda other: abs(other - timestep), default=timestep)
        return nearest if abs(nearest - timestep) <= _HALF * nearest else timestep


STRAIGHT = Flow()
"""Nothing is known of a scheduler, or nothing is shifted."""
_HALF = 2.0**-7
"""What bfloat16 loses of a timestep that is rounded, divided by 1000 and rounded again."""
_NUMBERS_OF: MutableMapping[Tensor, tuple[float, ...]] = WeakTensorKeyDictionary()


def _numbers(timesteps: Tensor) -> tuple[float, ...]:
    """What a tensor holds, read from its device once."""
    found = _NUMBERS_OF.get(timesteps)
    if found is None:
        found = _NUMBERS_OF[timesteps] = tuple(map(float, timesteps.flatten().tolist()))
    return found


@dataclass(slots=True, eq=False)
class Step:
    """How far sampling is by the timestep that a model is called with."""

    called_with: Tensor | float
    clock: Clock
    flow: Flow = STRAIGHT
    _timestep: float | None = None

    def timestep(self) -> float:
        """The timestep of training, 0..1000; reading it synchronises the device, once per call and only where it is asked.

        Where a pipeline's scheduler has begun to step, its own account of the step is taken instead of the device's. Pipelines
        call Flux and Chroma in the model's dtype; the scheduler's timesteps then tell what was rounded.
        """
        if self._timestep is None and isinstance(self.called_with, Tensor) and self.called_with.device.type != "cpu":
            self._timestep = self.flow.now()
        if self._timestep is None:
            given = self.called_with
            value = float(given.flatten()[0]) if isinstance(given, Tensor) else float(given)
            whole = not given.is_floating_point() if isinstance(given, Tensor) else isinstance(given, int)
            value = 1 - value if self.clock == "signal" else value
            value = value * 1000 if self.clock != "steps" and not whole and value <= 1.0 else value
            rounded = isinstance(given, Tensor) and given.dtype.itemsize < 4
            self._timestep = self.flow.exact(value) if rounded else value
        return self._timestep

    def percent(self) -> float:
        """Sampling progress: 0 is pure noise, 1 done, as ComfyUI's ``percent_to_sigma`` has it.

        Of a UNet it is linear in the timesteps of training: ComfyUI takes the sigma of timestep (1 - percent) · 999. These
        are 0..999 with every scheduler, also the fractions that Karras and exponential sigmas end on: 0.5 is nearly done.
        Transformers are trained on sigma · 1000: pipelines pass that (SD3, Sana) or sigma itself (Flux, Chroma, Qwen), of
        which 0.5 is the middle; whole numbers are never sigmas. ComfyUI shifts 1 - percent to the sigma, so the shift of
        the pipeline's scheduler is undone: 0.5 is half of the steps of the plain schedule, whatever the shift (ComfyUI's
        Flux has that of one megapixel at every size). A model that is called without a pipeline tells no shift; progress
        is linear in sigma then. Nobody counts steps, so fewer of them or another scheduler leave a window at the same noise.
        """
        noise = self.timestep() / (999.0 if self.clock == "steps" else 1000.0)
        return 1 - self.flow.time(min(max(noise, 0.0), 1.0))


class Beginning:
    """A call of a module that begins, described once for all owners who say the same of its batch.

    ``names`` are those of the positional arguments, ``family`` is what the module is.
    """

    def __init__(
        self, family: BaseModel, args: Sequence[object], kwargs: Mapping[str, object], names: Sequence[str] = ()
    ) -> None:
        self.family = family
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        sample = given.get("hidden_states", given.get("sample", given.get("x", args[0] if args else None)))
        apart = [one for one in sample if isinstance(one, Tensor)] if is_row(sample) else []
        self.sample: Tensor | None = sample if isinstance(sample, Tensor) else apart[0][None] if apart else None
        """The latents; where they come apart, as in Z-Image, the first."""
        self.batch = len(apart) if apart else 1 if self.sample is None else int(self.sample.shape[0])
        timestep = given.get("timestep", given.get("t", args[1] if len(args) > 1 else None))
        self.timestep = timestep if isinstance(timestep, (Tensor, float, int)) else None
        text = given.get("encoder_hidden_states")
        self.text: Tensor | None = text if isinstance(text, Tensor) else None
        self.skips_blocks = given.get("skip_layers") is not None
        """Whether it is a third pass, with the positive prompt and without some blocks (SD3's skip layer guidance)."""
        places = given.get("img_ids")
        self._places: Tensor | None = places if isinstance(places, Tensor) else None
        self._shapes = _first_shape(given.get("img_shapes"))
        self._described: dict[tuple[object, ...], ModelCall] = {}

    @property
    def packed(self) -> Size | None:
        """Rows and columns of the picture's tokens where the latent comes as tokens with their places; None where not."""
        return self._shapes if self._places is None else raster(self._places)

    @property
    def latent(self) -> Size | None:
        """Height and width of the latent; diffusers packs 2 by 2 latents into a token."""
        packed = self.packed
        if packed is not None:
            return 2 * packed[0], 2 * packed[1]
        sample = self.sample
        return None if sample is None or sample.ndim < 4 else (int(sample.shape[-2]), int(sample.shape[-1]))

    def described(self, branches: Branches, flow: Flow = STRAIGHT) -> ModelCall:
        """The call as one of a batch of these branches, under this scheduler."""
        names = tuple(branches() if callable(branches) else branches)
        key = (names, flow.shift, id(flow.timesteps))
        found = self._described.get(key)
        if found is None:
            found = self._described[key] = self._describe(names, flow)
        return found

    def _describe(self, names: tuple[Branch, ...], flow: Flow) -> ModelCall:
        sample, timestep, batch = self.sample, self.timestep, self.batch
        if batch % len(names):
            raise InvalidInputError(
                f"the model got a batch of {batch}, which cannot hold the branches {names} in equal parts; "
                "pass branches=('cond',) where classifier-free guidance is off"
            )
        step = Step(0.0 if timestep is None else timestep, self.family.clock, flow)
        numbers = tuple(_NUMBERS[name] for name in names)
        if self._places is None or sample is None:
            times = 1 if sample is None or sample.ndim != 5 else int(sample.shape[2])
            return ModelCall(numbers, step.percent, step.timestep, self.latent, times=times, batch=batch)
        packed = self.packed
        picture = None if packed is None or packed[0] * packed[1] >= sample.shape[1] else packed[0] * packed[1]
        text = 0 if self.text is None else int(self.text.shape[1])
        return ModelCall(numbers, step.percent, step.timestep, self.latent, text=text, picture=picture, batch=batch)


def _first_shape(shapes: object) -> Size | None:
    """Rows and columns of the first picture, the sampled one, of what Qwen-Image is told of every latent's pictures."""
    while is_row(shapes) and len(shapes) and not isinstance(shapes[0], int):
        shapes = shapes[0]
    if not is_row(shapes):
        return None
    sizes = [size for size in shapes if isinstance(size, int)]
    return (sizes[1], sizes[2]) if len(sizes) == len(shapes) == 3 else None


_RASTERS: MutableMapping[Tensor, Size | None] = WeakTensorKeyDictionary()


def raster(places: Tensor) -> Size | None:
    """Rows and columns of the tokens at ``places`` (``n 3``: which picture, row, column), reference pictures left out.

    None if they are no raster. A pipeline has one such tensor for all its steps; it is read from its device once.
    """
    if places in _RASTERS:
        return _RASTERS[places]
    found = _RASTERS[places] = _raster(places)
    return found


def _raster(places: Tensor) -> Size | None:
    if places.ndim == 3:  # older versions have one for each member of the batch
        places = places[0]
    if places.ndim != 2 or places.shape[1] < 3 or not places.shape[0]:
        return None
    which, row, _ = places.detach()[:, :3].to("cpu", torch.float32).unbind(1)
    count, columns = (_first(values) for values in (which, row))
    columns = min(columns, count)
    return None if count % columns else (count // columns, columns)


def _first(values: Tensor) -> int:
    """How many at the start are the same."""
    others = (values != values[0]).nonzero()
    return int(others[0]) if len(others) else len(values)


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
        self._family = family_of(module)
        # of the class: an offloading hook may stand in front of the module's own
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:]
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
        call = Beginning(self._family, args, kwargs, self._names)
        for owner in self._owners:
            owner.begin(call)

    def _after(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        eagerly(self._end, output)

    def _end(self, output: object) -> None:
        for owner in self._owners:
            owner.calls.end(output)


_JOINING = Lock()
