"""diffusers: image attention added between an attention's heads and its output projection, by module hooks.

Every attention processor of diffusers (default, sliced, xformers, custom, with LoRA layers) reads ``attn.to_q`` and ends
in ``attn.to_out[0]``. Hooking these two leaves all processors in place, so others' work on the same UNet keeps running,
and removing the hooks restores the model exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import IncompatibleAdapterError, InvalidInputError
from ..layouts import layout_of
from ..masks import RegionMask, token_grid
from ..patch import COND, UNCOND, AdapterPatch, SiteCall
from ..schedule import WeightSchedule
from ..sites import CrossAttentionSite

Branch = Literal["uncond", "cond"]
Branches = Sequence[Branch] | Callable[[], Sequence[Branch]]
_NUMBERS = {"uncond": UNCOND, "cond": COND}


@dataclass(slots=True)
class _Call:
    """What the running UNet call is about; set by the hook on the UNet."""

    branches: tuple[int, ...] = (COND,)
    latent: tuple[int, int] | None = None
    timestep: Tensor | float | None = None
    _percent: float | None = None

    def percent(self) -> float:
        """Sampling progress as ComfyUI defines it: timestep 999 is 0, timestep 0 is 1."""
        if self._percent is None:
            assert self.timestep is not None
            t = self.timestep
            value = float(t.flatten()[0]) if isinstance(t, Tensor) else float(t)
            self._percent = min(max(1 - value / 999, 0.0), 1.0)
        return self._percent


class AppliedAdapters:
    """Adapters acting on one UNet until ``remove()``; also a context manager that removes them at its end."""

    def __init__(self, unet: nn.Module, patches: Sequence[AdapterPatch], branches: Branches) -> None:
        self._unet = unet
        self._patches = list(patches)
        self._branches = branches
        self._call = _Call()
        self._hooks = [
            _SiteHook(self, i, site, unet.get_submodule(site.path)) for i, site in enumerate(patches[0].layout.sites)
        ]
        self._handle: RemovableHandle | None = unet.register_forward_pre_hook(self._before, with_kwargs=True)
        self._arm()

    @property
    def patches(self) -> tuple[AdapterPatch, ...]:
        """What is applied now, in order."""
        return tuple(self._patches)

    def set_schedule(self, schedule: WeightSchedule, index: int = 0) -> None:
        """Another schedule for one adapter from the next UNet call on; computes no keys or values."""
        self._patches[index] = self._patches[index].with_schedule(schedule)
        self._arm()

    def set_mask(self, mask: RegionMask | Tensor | None, index: int = 0) -> None:
        """Another region for one adapter from the next UNet call on."""
        self._patches[index] = self._patches[index].with_mask(mask)
        self._arm()

    def remove(self) -> None:
        """Take every hook off the UNet; it is then as it was before. Calling it again does nothing."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        for hook in self._hooks:
            hook.detach()

    def __enter__(self) -> AppliedAdapters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _arm(self) -> None:
        if self._handle is None:
            raise InvalidInputError("these adapters were removed from their UNet; apply them again")
        for hook in self._hooks:
            hook.patches = tuple(patch for patch in self._patches if patch.active(hook.index))
            hook.attach()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample: Tensor = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        names = self._branches() if callable(self._branches) else self._branches
        if sample.shape[0] % len(names):
            raise InvalidInputError(
                f"the UNet got a batch of {sample.shape[0]}, which cannot hold the branches {tuple(names)} in equal parts; "
                "pass branches=('cond',) where classifier-free guidance is off"
            )
        branches = tuple(_NUMBERS[name] for name in names)
        self._call = _Call(branches, (int(sample.shape[-2]), int(sample.shape[-1])), timestep)
        for hook in self._hooks:
            hook.attach()  # a LoRA may have replaced the layers since

    def add(self, q: Tensor, base: Tensor, index: int, heads: int, patches: Sequence[AdapterPatch]) -> Tensor:
        """Text attention ``base`` plus all image attention of one site."""
        call = self._call
        masked = any(patch.mask is not None for patch in patches)
        grid = token_grid(call.latent, q.shape[1]) if masked and call.latent is not None else None
        site_call = SiteCall(q, heads, call.branches, call.percent, call.latent, grid)
        for patch in patches:
            base = patch.add_to(base, index, site_call)
        return base


class _SiteHook:
    """The pair of hooks on one attention: remember q, add before the output projection."""

    def __init__(self, owner: AppliedAdapters, index: int, site: CrossAttentionSite, attention: nn.Module) -> None:
        self.owner, self.index, self.site, self.attention = owner, index, site, attention
        self.patches: tuple[AdapterPatch, ...] = ()
        self._q: Tensor | None = None
        self._modules: tuple[nn.Module, nn.Module] | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        if not self.patches:
            return self.detach()
        attention = cast(Any, self.attention)
        modules: tuple[nn.Module, nn.Module] = (attention.to_q, attention.to_out[0])
        if self._modules is None or self._modules[0] is not modules[0] or self._modules[1] is not modules[1]:
            self.detach()
            self._modules = modules
            self._handles = [
                modules[0].register_forward_hook(self._remember),
                modules[1].register_forward_pre_hook(self._extend),
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._modules, self._q = [], None, None

    def _remember(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._q = output

    def _extend(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q, self._q = self._q, None
        if q is None:
            raise IncompatibleAdapterError(
                f"the attention processor of {self.site.path} did not use attn.to_q, so an image prompt cannot act there; "
                "reset it with unet.set_default_attn_processor()"
            )
        return (self.owner.add(q, args[0], self.index, self.site.heads, self.patches), *args[1:])


def apply(unet: nn.Module, *patches: AdapterPatch, branches: Branches = ("uncond", "cond")) -> AppliedAdapters:
    """Let image prompts act on a diffusers UNet2DConditionModel, besides whatever else is installed on it.

    ``branches`` says what the batch of a UNet call consists of, in order: diffusers' pipelines put the negative prompt
    first; without classifier-free guidance it is ``("cond",)``; a callable is asked at every call.
    Raises IncompatibleAdapterError if a patch was baked for another layout; the UNet is then untouched.
    """
    if not patches:
        raise InvalidInputError("apply() needs at least one image prompt")
    layout = layout_of(unet)
    for patch in patches:
        if patch.layout != layout:
            raise IncompatibleAdapterError(
                f"{patch.name!r} was prepared for {patch.layout.name}, the model is {layout.name}; prepare it for this model"
            )
    return AppliedAdapters(unet, patches, branches)


def apply_to_pipeline(pipeline: Any, *patches: AdapterPatch) -> AppliedAdapters:
    """Like ``apply`` on ``pipeline.unet``, asking the pipeline at every call whether guidance is on."""

    def branches() -> Sequence[Branch]:
        return ("uncond", "cond") if pipeline.do_classifier_free_guidance else ("cond",)

    return apply(pipeline.unet, *patches, branches=branches)
