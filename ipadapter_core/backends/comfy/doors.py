"""ComfyUI: image prompts on a duck-typed MODEL, through the door of its kind of model (comfy is not imported)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ...attention.patch import AdapterPatch
from ...errors import IncompatibleAdapterError
from ...models import BASE_MODELS, layout_of, listed
from ...models.anima import walk_anima
from ...models.chroma import walk_chroma
from ...models.flux import walk_flux
from ...models.sd3 import walk_sd3
from ...models.sites import ModelLayout, Walk
from ...models.unet import walk_unet
from ..calls import watch_hooks
from .anima import AnimaBlocks
from .flux import FluxBlocks
from .notes import Attention, PatcherLike, denoiser, install_notes
from .sd3 import SD3Blocks
from .transformer import TransformerDoor
from .unet import UNetDoor, torch_attention


class Door(Protocol):
    """How image prompts get into one kind of model.

    Into transformers by hooks on the modules of their blocks for the time of a call: ``TransformerDoor`` of what one file says of
    its kind. Into UNets by hooks in the host's slots, which keep what is there and call it first. Such a hook

    - calls what was in its slot before it first, or joins a hook of its own kind that is there, in a new object;
    - learns of its model call by ``notes.call_at(options)``, makes a ``SiteCall`` of the site's query, and adds every patch
      to the attention or behind the block, as the patch's ``reach`` says;
    - is itself in a deep copy (``__deepcopy__``), since hosts before 0.13 copy options in every clone;
    - gives a device's copies back when the host moves the model off it (``to(device)``, by ``AdapterPatch.release``);
    - is a ``compiled.CompiledHook`` if compiled models shall run without a graph break: ``index``, ``kind`` and ``at_site``.
      What tells code compiled for one block from code for another stands on the layers that ``marks`` names.
    """

    def install(self, clone: PatcherLike, patch: AdapterPatch, attention: Attention) -> None:
        """Let a prompt act at every site where it is active. Hooks are never changed: clones share them.

        Raises IncompatibleAdapterError for an adapter whose reach the door does not know.
        """
        ...

    def installed(self, model: PatcherLike) -> Iterable[AdapterPatch]:
        """The prompts in this kind of hook on a MODEL, perhaps each several times; nothing for a model of another kind."""
        ...


DOORS: dict[Walk | None, Door] = {
    walk_unet: UNetDoor(),
    walk_flux: TransformerDoor(FluxBlocks()),
    walk_chroma: TransformerDoor(FluxBlocks()),
    walk_sd3: TransformerDoor(SD3Blocks()),
    walk_anima: TransformerDoor(AnimaBlocks()),
}
"""By the walk that finds a model's sites, which related base models share."""


def door_of(layout: ModelLayout) -> Door:
    """The door of a model. Raises IncompatibleAdapterError where there is none yet."""
    door = DOORS.get(layout.model.walk)
    if door is None:
        raise IncompatibleAdapterError(
            f"image prompts cannot act in {layout.name} in ComfyUI yet; use a model of the "
            f"{listed((base for base in BASE_MODELS if base.walk in DOORS), 'or')} family"
        )
    return door


def comfy_layout(model: PatcherLike) -> ModelLayout:
    """Sites of a ComfyUI MODEL; IncompatibleAdapterError if it has none that an image prompt could act at."""
    return layout_of(denoiser(model))


def apply(model: PatcherLike, patch: AdapterPatch, attention: Attention | None = None) -> PatcherLike:
    """A clone of ``model`` on which ``patch`` acts besides everything already applied; ``model`` itself is untouched.

    ``attention`` is the host's ``(q, k, v, heads, attn_precision=, transformer_options=)`` for the text part.
    """
    watch_hooks()
    layout = comfy_layout(model)
    if layout != patch.layout:
        raise IncompatibleAdapterError(
            f"the image prompt was prepared for {patch.layout.name}, the model is {layout.name}; prepare it for this model"
        )
    clone = model.clone()
    door_of(layout).install(clone, patch, attention or torch_attention)
    install_notes(clone)
    return clone


def applied_patches(model: PatcherLike) -> tuple[AdapterPatch, ...]:
    """The image prompts that act on a MODEL, in order; one that acts nowhere leaves no trace and is not listed."""
    return tuple(dict.fromkeys(patch for door in DOORS.values() for patch in door.installed(model)))
