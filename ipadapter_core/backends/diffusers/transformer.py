"""diffusers' transformers of text and picture in one attention (Flux, Chroma, SD3).

Every attention processor (default, with fused projections, custom, with LoRA layers) norms the query of the stream that goes
through ``to_q`` by ``attn.norm_q``, before any rotation. In double and joint blocks that stream is the picture's and ends in
``attn.to_out[0]``; in single blocks it is text and picture in one sequence, text first, and the attention has no output
projection of its own.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.call import ModelCall, SiteCall
from ...attention.maths import inside
from ...errors import IncompatibleAdapterError
from ...models.reach import Reach
from ...models.sites import ModelLayout, Site


@dataclass(frozen=True, slots=True, eq=False)
class TransformerEntry:
    """The attention of a block in which text and picture attend together, for adapters of one reach.

    ``undone`` are the norms, ``q`` and ``k``, which adapters with norms of their own can undo by their weight. It is settled when
    the adapter is applied: weights that are offloaded come and go within a call.
    """

    block: nn.Module
    attention: nn.Module
    heads: int
    reach: Reach
    undone: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, layout: ModelLayout, site: Site, reach: Reach) -> TransformerEntry:
        if reach.query == "projected" or reach.gated:
            what = "a gate of every block" if reach.gated else "the query of a UNet's cross-attention"
            raise IncompatibleAdapterError(
                f"this adapter acts on {what}, and {layout.name} is a transformer without one; load an adapter made for this model"
            )
        block, attention = (model.get_submodule(path) for path in (site.path.rpartition(".")[0], site.path))
        norms = {letter: _children(attention).get(f"norm_{letter}") for letter in "qk" if reach.query == "raw"}
        undone = frozenset(letter for letter, norm in norms.items() if norm is not None and can_be_undone(norm))
        entry = cls(block, attention, site.heads, reach, undone)
        if reach.own_keys and entry.single:
            raise IncompatibleAdapterError(
                f"this adapter attends to the picture's own keys, which {layout.label(site)} of {layout.name} has in one "
                "sequence with the text's; load an adapter made for this model"
            )
        return entry

    @property
    def single(self) -> bool:
        """Whether text and picture are one sequence."""
        return "to_out" not in _children(self.attention)

    @property
    def before(self) -> bool:
        return self.reach.join == "attention" and not self.single

    @property
    def bypassed(self) -> str:
        fused = " it has fused projections (call unfuse_qkv_projections())," if self.reach.query == "raw" else ""
        return (
            f"{' and '.join(self._names())} of the attention did not run:{fused} a cache skipped it (call disable_cache()), or its "
            "processor passes them by (set the one that the model came with by set_attn_processor())"
        )

    @property
    def skipped(self) -> bool:
        """A first block cache gives what a block gave before, the image's part included; its hooks stand before the forward."""
        registry = self.block.__dict__.get("_diffusers_hook")
        return self.reach.join == "residual" and bool(getattr(registry, "hooks", None))

    def _names(self) -> list[str]:
        """The modules that are listened to."""
        names = [self._normed("q", sound=self.reach.query == "raw")]
        return [*names, self._normed("k", sound=True), "to_v"] if self.reach.own_keys else names

    def _normed(self, letter: str, *, sound: bool) -> str:
        """The norm of queries or keys; their projection where there is none, or none that can be undone."""
        usable = letter in self.undone if sound else _children(self.attention).get(f"norm_{letter}") is not None
        return f"norm_{letter}" if usable else f"to_{letter}"

    def modules(self) -> tuple[nn.Module, ...]:
        children = _children(self.attention)
        heard = [children[name] for name in self._names()]
        if self.reach.join == "residual":
            return (*heard, self.block)
        return (*heard, self.attention if self.single else children["to_out"]._modules["0"])

    def site(self, outputs: Sequence[Tensor], call: ModelCall) -> SiteCall:
        q, *more = (joined_heads(output, self.heads, self.attention) for output in outputs)
        text, part = self._part(call)
        at = SiteCall(call, q if part is None else q[:, part], self.heads, text=text)
        children = _children(self.attention)
        if self.reach.query == "raw":
            at.query_norm = _weight(children, self._normed("q", sound=True))
        if more:
            at.k, at.v = more if part is None else (tokens[:, part] for tokens in more)
            at.key_norm = _weight(children, self._normed("k", sound=True))
        return at

    def _part(self, call: ModelCall) -> tuple[int, slice | None]:
        """How many tokens of text ask, and which of the attention's tokens do; None: all."""
        if not self.single:
            return 0, None if call.picture is None else slice(0, call.picture)
        end = None if call.picture is None else call.text + call.picture
        if self.reach.span == "all":
            return call.text, None if end is None else slice(0, end)
        return 0, slice(call.text, end)

    def added(self, value: Any, call: ModelCall, add: Callable[[Tensor], Tensor]) -> object:
        part = self._part(call)[1]
        if isinstance(value, Tensor):
            return add(value) if part is None else inside(value, part, add)
        text, picture = value  # a block gives both, one after the other in single blocks too
        if not self.single:
            return text, add(picture) if part is None else inside(picture, part, add)
        both = torch.cat([text, picture], 1)
        both = add(both) if part is None else inside(both, part, add)
        return both[:, : text.shape[1]], both[:, text.shape[1] :]


def _children(module: nn.Module) -> dict[str, Any]:
    return module.__dict__["_modules"]  # ten times faster than attributes


def _weight(children: dict[str, Any], name: str) -> Tensor | None:
    """The weight of a norm; ones where it has none, None for a projection."""
    if not name.startswith("norm"):
        return None
    weight = children[name].weight
    return weight if isinstance(weight, Tensor) else None


def can_be_undone(norm: nn.Module) -> bool:
    """Whether a norm's weight is all that it does but for the length, and can be divided by: none is nearly 0 beside the others.

    A weight on ``meta`` is not known to be.
    """
    weight = getattr(norm, "weight", None)
    if "RMS" not in type(norm).__name__ or (weight is not None and weight.is_meta):
        return False
    if weight is None:
        return True
    size = weight.detach().float().abs()
    return bool(size.min() >= 1e-3 * size.median())


def joined_heads(output: Tensor, heads: int, attention: nn.Module) -> Tensor:
    """Tokens ``b l c`` of what a projection gives, ``b l c``, or a norm, ``b l h d`` or ``b h l d``.

    Processors of diffusers' newer FluxAttention have tokens first, those of Attention heads first; others choose for themselves,
    so sizes decide where they tell.
    """
    if output.ndim == 3:
        return output
    tokens_first = output.shape[2] == heads
    if tokens_first and output.shape[1] == heads:
        tokens_first = type(attention).__name__ != "Attention"
    return (output if tokens_first else output.transpose(1, 2)).flatten(2)
