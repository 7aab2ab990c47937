"""diffusers' UNets: every attention processor (default, sliced, xformers, custom, with LoRA layers) reads ``attn.to_q`` and
ends in ``attn.to_out[0]``, so the query is taken behind the one and the image attention added before the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...attention.call import ModelCall, SiteCall
from ...errors import IncompatibleAdapterError
from ...models.reach import Reach
from ...models.sites import ModelLayout, Site


@dataclass(frozen=True, slots=True, eq=False)
class UNetEntry:
    """A cross-attention of a UNet."""

    attention: nn.Module
    heads: int
    bypassed: str = "the attention processor did not use attn.to_q; reset it with unet.set_default_attn_processor()"
    before: bool = True
    skipped: bool = False

    @classmethod
    def of(cls, model: nn.Module, layout: ModelLayout, site: Site, reach: Reach) -> UNetEntry:
        if (reach.query, reach.join) != ("projected", "attention"):
            raise IncompatibleAdapterError(
                f"this adapter acts on the {reach.query} query and the {reach.join} of a transformer, and {layout.name} is a "
                "UNet; load an adapter made for this model"
            )
        return cls(model.get_submodule(site.path), site.heads)

    def modules(self) -> tuple[nn.Module, nn.Module]:
        children = self.attention.__dict__["_modules"]  # ten times faster than attributes
        return children["to_q"], children["to_out"]._modules["0"]

    def site(self, outputs: Sequence[Tensor], call: ModelCall) -> SiteCall:
        return SiteCall(call, outputs[0], self.heads)

    def added(self, value: Tensor, call: ModelCall, add: Callable[[Tensor], Tensor]) -> Tensor:
        return add(value)
