"""ComfyUI: the door of all kinds of transformers whose image prompts act by hooks inside their blocks."""

from __future__ import annotations

from collections.abc import Iterator

from ...attention.patch import AdapterPatch
from ...errors import IncompatibleAdapterError
from .blocks import PATCHES, BlockPrompt, Kind, find_modules, prompts_in
from .notes import Attention, PatcherLike, denoiser


class TransformerDoor:
    """Prompts on the blocks of one kind of transformer, which ``of`` describes."""

    def __init__(self, of: Kind) -> None:
        self.of = of

    def install(self, clone: PatcherLike, patch: AdapterPatch, attention: Attention) -> None:
        refusal = self.of.refusal(patch.layout, patch.reach)
        if refusal:
            raise IncompatibleAdapterError(
                f"{patch.name!r} acts on {refusal}, which {patch.layout.name} lacks; load an adapter made for this model"
            )
        if any(map(patch.active, range(len(patch.layout.sites)))):
            find_modules(denoiser(clone), patch.layout, self.of)
            clone.set_model_patch(BlockPrompt(patch, self.of), PATCHES)

    def installed(self, model: PatcherLike) -> Iterator[AdapterPatch]:
        for prompt in prompts_in(model.model_options.get("transformer_options", {})):
            yield prompt.patch
