"""A base model that the package has never heard of: what a newcomer writes to add one, and the two hosts' ways into it.

A transformer whose image tokens stand in the middle of the sequence, with one group of blocks at one level. Its adapters act
on the normed query and join the residual behind the block, and their keys and values depend on the timestep: the hardest case.
The plain one, a projected query and the image before the output projection, is that of both hosts' ``backends/<host>/unet.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipadapter_core.attention.call import ModelCall, SiteCall
from ipadapter_core.attention.maths import inside
from ipadapter_core.attention.patch import AdapterPatch
from ipadapter_core.backends.comfy.notes import Attention, PatcherLike, call_at
from ipadapter_core.checkpoints.base import Base
from ipadapter_core.models.grids import Patches
from ipadapter_core.models.reach import Reach, every
from ipadapter_core.models.sites import BaseModel, ModelLayout, Site

CHANNELS, HEADS, TEXT, TAIL, WIDTH = 16, 2, 7, 3, 32


class FakeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))
        self.norm_q = nn.LayerNorm(CHANNELS)

    def forward(self, x: Tensor, taps: tuple[Callable[[Tensor], object], ...] = ()) -> Tensor:
        q = self.norm_q(self.to_q(x))
        for tap in taps:
            tap(q)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, self.to_k(x), self.to_v(x)))
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FakeTransformer(nn.Module):
    """``[text | image | tail]`` through three blocks; as diffusers calls it, and with options as ComfyUI does."""

    def __init__(self) -> None:
        super().__init__()
        self.patchify, self.read = nn.Conv2d(4, CHANNELS, 2, stride=2), nn.Linear(WIDTH, CHANNELS)
        self.tail = nn.Parameter(torch.randn(1, TAIL, CHANNELS))
        self.blocks = nn.ModuleList(FakeBlock() for _ in range(3))
        self.out = nn.Linear(CHANNELS, 16)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, transformer_options: dict[str, Any] | None = None) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, width % 2, 0, height % 2))
        image = self.patchify(x)
        rows, columns = image.shape[-2:]
        image = image.flatten(2).transpose(1, 2) + torch.sin(t.float().reshape(-1, 1, 1))
        x = torch.cat([self.read(text), image, self.tail.expand(x.shape[0], -1, -1)], 1)
        replaced = (transformer_options or {}).get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.blocks):
            hook = replaced.get(("block", i))
            x = block(x) if hook is None else hook({"img": x, "transformer_options": transformer_options}, block)
        image = self.out(x[:, TEXT : TEXT + rows * columns])
        return F.pixel_shuffle(image.transpose(1, 2).unflatten(2, (rows, columns)), 2)[..., :height, :width]


# --- what the package asks of a base model, and of a family of adapters -------------------------------------------------


def walk_fake(model: nn.Module) -> ModelLayout | None:
    if not isinstance(model, FakeTransformer):
        return None
    sites = (Site(f"blocks.{i}", "block", i, 0, i, CHANNELS, HEADS) for i in range(len(model.blocks)))
    return ModelLayout(FAKE, WIDTH, tuple(sites))


FAKE = BaseModel(name="Fake", walk=walk_fake, groups=("block",), tokens=Patches(2), reference_width=CHANNELS)


class FakeFormat(Base):
    name = "timed"
    reach = Reach(every, query="normed", join="residual", timed=True)

    def key_value(self, module: Any, index: int, tokens: Tensor, timestep: float | None) -> tuple[Tensor, Tensor]:
        assert timestep is not None
        k, v = super().key_value(module, index, tokens, timestep)
        return k, v * (1 + timestep / 1000)


FORMAT = FakeFormat()

# --- the doors -------------------------------------------------------------------------------------------------------


def image_tokens(call: ModelCall, length: int) -> slice:
    assert call.seen is not None
    grid = FAKE.tokens.grid(call.seen, length)
    assert grid is not None
    return slice(TEXT, TEXT + grid.rows * grid.columns)


@dataclass(frozen=True)
class FakeEntry:
    """diffusers: the query behind its norm, the result behind the block."""

    block: nn.Module
    before: bool = False
    skipped: bool = False
    bypassed: str = "the block ran without its query"

    @classmethod
    def of(cls, model: nn.Module, layout: ModelLayout, site: Site, reach: Reach) -> FakeEntry:
        return cls(model.get_submodule(site.path))

    def modules(self) -> tuple[nn.Module, nn.Module]:
        return self.block.norm_q, self.block  # type: ignore[return-value]

    def site(self, outputs: Sequence[Tensor], call: ModelCall) -> SiteCall:
        (q,) = outputs
        return SiteCall(call, q[:, image_tokens(call, q.shape[1])], HEADS)

    def added(self, value: Tensor, call: ModelCall, add: Callable[[Tensor], Tensor]) -> Tensor:
        return inside(value, image_tokens(call, value.shape[1]), add)


@dataclass(frozen=True, eq=False)
class FakeHook:
    """ComfyUI: around the block; the query is tapped inside of it."""

    index: int
    patches: tuple[AdapterPatch, ...]
    previous: Callable[..., Tensor] | None

    def __call__(self, args: dict[str, Any], block: Callable[..., Tensor]) -> Tensor:
        taken: list[Tensor] = []

        def tapped(x: Tensor, taps: Any = ()) -> Tensor:
            return block(x, (*taps, taken.append))

        out = tapped(args["img"]) if self.previous is None else self.previous(args, tapped)
        call = call_at(args["transformer_options"])
        part = image_tokens(call, out.shape[1])
        at = SiteCall(call, taken[-1][:, part], HEADS)

        def add(image: Tensor) -> Tensor:
            for patch in self.patches:
                image = patch.add_to(image, self.index, at)
            return image

        return inside(out, part, add)

    def __deepcopy__(self, memo: object) -> FakeHook:
        return self


class FakeDoor:
    def install(self, clone: PatcherLike, patch: AdapterPatch, attention: Attention) -> None:
        for i in filter(patch.active, range(len(patch.layout.sites))):
            there = self.slots(clone).get(("block", i))
            before, previous = (there.patches, there.previous) if isinstance(there, FakeHook) else ((), there)
            clone.set_model_patch_replace(FakeHook(i, (*before, patch), previous), "dit", "block", i)

    def installed(self, model: PatcherLike) -> Iterator[AdapterPatch]:
        for hook in self.slots(model).values():
            yield from hook.patches if isinstance(hook, FakeHook) else ()

    @staticmethod
    def slots(model: PatcherLike) -> Mapping[tuple[str, int], Callable[..., Tensor]]:
        return model.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
