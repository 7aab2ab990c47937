"""ComfyUI: image attention through ``attn2`` replace patches of a duck-typed ModelPatcher (comfy is not imported).

A hook sits in every site's slot, keeps whatever was there and calls it first.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention.call import ModelCall, SiteCall
from ...attention.maths import split_heads
from ...attention.patch import AdapterPatch
from ...errors import IncompatibleAdapterError
from ...models.sites import ModelLayout, Site
from ..calls import eagerly
from .compiled import add_at_site
from .notes import Attention, Options, PatcherLike, call_at

Occupant = Callable[..., Tensor] | None
"""What sits in one ``attn2`` slot."""
Slots = Mapping[tuple[object, ...], Occupant]


class UNetDoor:
    """Prompts in the ``attn2`` slots of a UNet's cross-attentions."""

    def install(self, clone: PatcherLike, patch: AdapterPatch, attention: Attention) -> None:
        layout, reach = patch.layout, patch.reach
        if (reach.query, reach.join) != ("projected", "attention"):
            raise IncompatibleAdapterError(
                f"{patch.name!r} acts on the {reach.query} query and the {reach.join} of a transformer, and {layout.name} is a "
                "UNet; load an adapter made for this model"
            )
        slots = _slots(clone)
        for index, site in enumerate(layout.sites):
            if patch.active(index):
                hook = AttentionHook.joining(_occupant(slots, site), index, patch, attention)
                clone.set_model_attn2_replace(hook, site.group, site.number, _key_part(slots, layout, site))

    def installed(self, model: PatcherLike) -> Iterator[AdapterPatch]:
        for hook in _slots(model).values():
            if isinstance(hook, AttentionHook):
                yield from hook.patches


def occupant_of(model: PatcherLike, site: Site) -> Occupant:
    """What sits in a site's ``attn2`` slot of a MODEL, None if nothing."""
    return _occupant(_slots(model), site)


def key_part(model: PatcherLike, layout: ModelLayout, site: Site) -> int | None:
    """The third part of the key under which a hook for this site belongs; None for a two-part key."""
    return _key_part(_slots(model), layout, site)


def _slots(model: PatcherLike) -> Slots:
    options: Options = model.model_options.get("transformer_options", {})
    return options.get("patches_replace", {}).get("attn2", {})


def _key_part(slots: Slots, layout: ModelLayout, site: Site) -> int | None:
    # The field's convention: the only block of a spatial transformer is addressed without its index.
    two_part = layout.alone(site) and (site.group, site.number, site.depth) not in slots
    return None if two_part else site.depth


def _occupant(slots: Slots, site: Site) -> Occupant:
    """What the host would call at this site: a three-part key beats a two-part one."""
    return slots.get((site.group, site.number, site.depth), slots.get((site.group, site.number)))


# --- the hook ---------------------------------------------------------------------------------------------------------


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: object) -> Tensor:
    """Plain attention ``b l c`` for callers outside ComfyUI."""
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionHook:
    """Occupies one ``attn2`` slot: text attention (or what was there before), then every image prompt in turn.

    Frozen: applying another prompt makes a new hook, so model clones that share this one never change.
    """

    index: int
    patches: tuple[AdapterPatch, ...]
    previous: Occupant
    attention: Attention

    @classmethod
    def joining(cls, occupant: Occupant, index: int, patch: AdapterPatch, attention: Attention) -> AttentionHook:
        """A hook for a slot that may hold nothing, a hook of ours or somebody else's callable."""
        if isinstance(occupant, AttentionHook):
            return cls(index, (*occupant.patches, patch), occupant.previous, attention)
        return cls(index, (patch,), occupant, attention)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        if torch.compiler.is_compiling():
            return self._traced(q, k, v, extra_options)
        return self._run(q, k, v, extra_options)

    def _traced(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        if add_at_site is None or self.previous is not None or torch.is_grad_enabled():
            # Somebody else's hook may read what must not be frozen, and the operation has no gradient.
            return eagerly(self._run, q, k, v, extra_options)
        rows, columns = (extra_options.get("activations_shape") or (0, 0))[-2:]
        heads: int = extra_options["n_heads"]
        return add_at_site(self._base(q, k, v, extra_options), q, self.index, heads, rows, columns)

    def at_site(self, call: ModelCall, base: Tensor, q: Tensor, heads: int, shape: tuple[int, int]) -> Tensor:
        """What compiled code does here, see CompiledHook."""
        at = SiteCall(call, q, heads, shape if shape[0] else None)
        for patch in self.patches:
            base = patch.add_to(base, self.index, at)
        return base

    @property
    def kind(self) -> str:
        """What is part of code compiled for this hook."""
        return "image prompts" if self.previous is None else "image prompts after another node's hook"

    def _run(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        base = self._base(q, k, v, extra_options)
        at = SiteCall(call_at(extra_options), q, extra_options["n_heads"], extra_options.get("activations_shape"))
        for patch in self.patches:
            base = patch.add_to(base, self.index, at)
        return base

    def _base(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        if self.previous is not None:
            return self.previous(q, k, v, extra_options)
        heads: int = extra_options["n_heads"]
        precision = extra_options.get("attn_precision")
        return self.attention(q, k, v, heads, attn_precision=precision, transformer_options=extra_options)

    def to(self, device: object) -> AttentionHook:
        """The host moves patches when it (un)loads a model: copies on an accelerator are dropped with it."""
        if isinstance(device, torch.device) and device.type == "cpu":
            for patch in self.patches:
                patch.release(self.index, device)
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> AttentionHook:
        return self  # hosts before 0.13 deep-copy model options in every clone
