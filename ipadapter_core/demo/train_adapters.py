"""The demo world's adapters while they learn, alone or together with their base model.

They enter the model as finished ones do, by the same patch and the same hooks; only their keys and values are made anew in every call
of the model, of tokens that learn.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ..attention.call import SiteCall
from ..attention.maths import KeyValue, split_heads
from ..attention.patch import AdapterPatch
from ..attention.schedule import WeightSchedule
from ..backends.diffusers.doors import apply
from ..checkpoints import AdapterModule
from ..checkpoints.projectors import Resampler
from ..features import ImageFeatures
from ..models import layout_of
from .train_base import Adapter
from .train_parts import normalise

MARK = 1.5
GRID_SHARPNESS = 3.0
LISTENING, SPEAKING = 0.1, 0.02
"""Keys are large enough that the sites' heads differ in what they look at, values small enough not to disturb."""


class LearningAdapter:
    """An adapter on a model: ``module`` learns; ``see`` gives it the references of the model's next call."""

    def __init__(self, model: nn.Module, encoder: nn.Module, adapter: Adapter, device: torch.device) -> None:
        layout = layout_of(model)
        self.roles, self.sites = layout.model.roles, layout.sites
        self.spec = spec = adapter.spec(layout)
        self.format, self._encoder = adapter.format, encoder
        with device:
            self.module = AdapterModule(spec)
        self.reached = self.format.reach.sites(layout)
        keys: list[LearningKeys | None] = [None] * len(layout.sites)
        for layer, site in enumerate(self.reached):
            keys[site] = LearningKeys(self, layer)
        schedule = WeightSchedule()
        patch = AdapterPatch(
            spec.family, layout, tuple(keys), schedule, None, schedule.site_weights(layout), reach=self.format.reach
        )
        self.tokens: Tensor | None = None
        self.gates: dict[int, Tensor] = {}
        self._applied = apply(model, patch, branches=("cond",))

    @torch.no_grad()
    def start(self, values: float) -> None:
        """Random keys, and values of this size; biases are zero."""
        for name, parameter in self.module.named_parameters():
            if not name.startswith("projector."):
                size = 0.0 if name.endswith(".bias") else LISTENING if name.startswith("to_k_ip.") else values
                parameter.normal_(0, 1).mul_(size)

    def features(self, references: Tensor, dropped: Tensor) -> Tensor:
        """What the adapter reads of references ``b 3 y x``; of dropped ones what stands for no image in its family."""
        rule, kept = self.format.unconditional, ~dropped[:, None, None, None]
        pixels = normalise(references * kept if rule == "black_picture" else references)
        if rule == "zero_pixels":
            pixels = pixels * kept
        with torch.no_grad():
            seen = self._encoder(pixels, output_hidden_states=True)
        found = self.format.feature.of(ImageFeatures(seen.image_embeds.float(), seen.hidden_states[-2].float()))
        return found * ~dropped[:, None] if rule == "zero_embeds" else found

    def see(self, tokens: Tensor, gates: dict[int, Tensor] | None = None) -> None:
        """The tokens ``b n d`` of the next call, and the strengths ``b`` of each at some sites; 1 at the others."""
        self.tokens, self.gates = tokens, gates or {}

    def state(self) -> dict[str, Tensor]:
        """The adapter as files have it."""
        return self.module.checkpoint_state()

    def remove(self) -> None:
        """Leave the model."""
        self._applied.remove()


class LearningKeys:
    """Image keys and values of one site (an ``attention.kv.SiteKV``), each time as the adapter is now."""

    constant = False
    silent: tuple[int, ...] = ()

    def __init__(self, adapter: LearningAdapter, layer: int) -> None:
        self.adapter, self.layer = adapter, layer

    def at(self, call: SiteCall, branches: tuple[int, ...], flipped: bool, per_image: bool = False) -> KeyValue:
        adapter = self.adapter
        assert adapter.tokens is not None, "see() comes before the model's call"
        k, v = adapter.format.key_value(adapter.module, self.layer, adapter.tokens, None)
        gate = adapter.gates.get(adapter.reached[self.layer])
        if gate is not None:
            v = v * gate[:, None, None]
        return KeyValue(*(split_heads(t.to(call.q.dtype), call.heads) for t in (k, v)))

    def release(self, device: torch.device) -> None:
        """Nothing is kept."""

    def forget(self) -> None:
        """Nothing is kept."""


@torch.no_grad()
def start_on_grid(projector: Resampler, features: Tensor) -> None:
    """Let each of the Resampler's 16 queries read its own sixteenth of the picture from the first step.

    ``features`` ``b 65 c`` are penultimate tokens of many pictures. The mean of a position's tokens over all pictures
    tells the positions apart, so a query that is the mean of its 2×2 positions, seen through the same random matrix as
    the keys, finds them. The queries are keys too and would find themselves: the picture's tokens bear a mark, the
    queries its opposite, and look for the mark. From the usual start all queries read everything alike, and the UNet sees sixteen times the
    same average: colours then follow the picture after some hundred steps, layout not after thousands.
    """
    places = features.mean(0)[1:]
    tokens = features[:, 1:].flatten(0, 1)
    width = projector.proj_in.out_features
    projector.proj_in.weight.copy_(torch.eye(width, tokens.shape[1]) / tokens.std(0))
    projector.proj_in.bias.copy_(-tokens.mean(0)[:width] / tokens.std(0)[:width])
    side = math.isqrt(projector.latents.shape[1])
    cells = rearrange(projector.proj_in(places), "(y i x j) c -> (y x) (i j) c", y=side, x=side, i=2).mean(1)
    projector.latents.copy_(cells[None])
    mark = torch.randn(width).sign() * MARK
    projector.proj_in.bias.add_(mark)
    projector.latents.sub_(mark)
    projector.proj_out.bias.add_(projector.proj_out.weight @ mark)  # what follows need not see it
    flip = torch.eye(width) - 2 * torch.outer(mark, mark) / mark.square().sum()
    for layer in projector.layers:
        attention = layer[0]
        shared = torch.randn_like(attention.to_q.weight) * GRID_SHARPNESS / width**0.5
        keys, values = attention.to_kv.weight.chunk(2)
        keys.copy_(shared)
        nn.init.orthogonal_(values)
        nn.init.orthogonal_(attention.to_out.weight)
        attention.to_q.weight.copy_(shared @ flip)
