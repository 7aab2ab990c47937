"""The modules of a model that a LoRA can change, under every name that files have for them."""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from ..models import names_of_layers, streams_of
from ..models.layers import LayerNames, LayerPart, Place, common_words, underscored
from ..models.streams import Stream
from .layer import Layer
from .weights import Component


@dataclass(frozen=True, slots=True)
class Target:
    """One layer of a model. ``label`` is its diffusers name (or its own), ``block`` its short name such as ``in4``.

    ``words`` are what the selector calls it. ``parts`` are rows of a fused layer that are layers in the other form of the model,
    with words of their own. ``stream`` is what tokens it sees, None where that is not known.
    ``bare``: a parameter of no layer, whose name is the path. ``beside``: whether a side path can stand beside it; else only
    a merge can change it. ``ahead``: whether the host runs it once for a prompt, before the model's calls, and so outside of all that
    lives as long as one. ``grouped``: a convolution whose channels are in groups, so that no two smaller ones stand for it.
    """

    path: str
    component: Component
    label: str
    block: str
    shape: tuple[int, ...]
    has_bias: bool
    is_embedding: bool = False
    words: frozenset[str] = frozenset()
    parts: tuple[LayerPart, ...] = ()
    stream: Stream | None = None
    bare: bool = False
    grouped: bool = False
    beside: bool = True
    ahead: bool = False

    def apart(self) -> Iterator[tuple[LayerPart, Target]]:
        """Every part of a fused layer as a layer of its own; none of another."""
        for part in self.parts:
            shape = (part.length, *self.shape[1:])
            yield part, replace(self, label=part.label, shape=shape, words=part.words, parts=())


@dataclass(frozen=True, slots=True, eq=False)
class TargetTable:
    """All layers of one component of a model by path, and all names that lead to them.

    ``spelled``: names as files spell them, prefix included, where two prefixes give one name to two layers. ``widens``:
    whether the model takes a layer with more inputs than it was built with.
    """

    component: Component
    family: str
    targets: Mapping[str, Target]
    names: Mapping[str, tuple[Place, ...]]
    spelled: Mapping[str, tuple[Place, ...]] = field(default_factory=dict[str, tuple[Place, ...]])
    widens: bool = False


def targets_of(model: nn.Module, component: Component = "denoiser") -> TargetTable:
    """The table of a UNet, a transformer or a text encoder, of diffusers, transformers or ComfyUI (its bare module)."""
    if component != "denoiser":
        return _text_encoder(model, component)
    layers = dict(_layers(model))
    named = names_of_layers(model, {path: Layer(module).shape for path, module in layers.items()})
    streams = streams_of(model)
    targets = {
        path: replace(
            target_of(path, module, "denoiser", named.labels.get(path, path), named.blocks[path], named),
            stream=None if streams is None else streams.of(path),
        )
        for path, module in layers.items()
    }
    return TargetTable("denoiser", named.family, targets, named.names)


# --- text encoders ---------------------------------------------------------------------------------------------------

_COMFY_ENCODERS: Mapping[Component, tuple[str, ...]] = {
    "te1": ("clip_l.transformer.", "clip_h.transformer.", "clip_g.transformer."),
    "te2": ("clip_g.transformer.",),
    "te3": ("t5xxl.transformer.",),
}


def _text_encoder(model: nn.Module, component: Component) -> TargetTable:
    """A transformers text encoder, or the part of ComfyUI's ``cond_stage_model`` that is this one."""
    targets: dict[str, Target] = {}
    names: dict[str, tuple[Place, ...]] = {}
    layers = list(_layers(model))
    prefixes = [p for p in _COMFY_ENCODERS.get(component, ()) if any(path.startswith(p) for path, _ in layers)]
    composite = any(path.startswith(p) for p in ("clip_l.", "clip_g.", "clip_h.", "t5xxl.") for path, _ in layers)
    for path, module in layers:
        inner = path
        if composite:
            if not prefixes or not path.startswith(prefixes[0]):
                continue
            inner = path.removeprefix(prefixes[0])
        targets[path] = target_of(path, module, component, inner, component)
        short = inner.removeprefix("text_model.")
        for name in (inner, short, f"text_model.{short}"):
            names[underscored(name)] = (Place(path),)
    return TargetTable(component, "unknown", targets, names)


# --- all -------------------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if getattr(module, "weight", None) is not None and Layer(module).kind != "other":
            yield path, module


def target_of(
    path: str, module: nn.Module, component: Component, label: str, block: str, named: LayerNames | None = None
) -> Target:
    """A module with a weight; one of no known kind has no side path."""
    layer = Layer(module)
    bias, kind = getattr(module, "bias", None), layer.kind
    has_bias = bias is not None and tuple(bias.shape) == layer.shape[:1]
    words = None if named is None else named.words.get(path)
    if words is None:
        words = common_words(label) if component == "denoiser" else common_words(label) - {"attn1", "attn2"}
    return Target(
        path,
        component,
        label,
        block,
        layer.shape,
        has_bias,
        kind == "embedding",
        words,
        () if named is None else named.parts.get(path, ()),
        grouped=layer.groups > 1,
        beside=kind != "other",
    )
