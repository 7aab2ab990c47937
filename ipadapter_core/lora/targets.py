"""The modules of a model that a LoRA can change, under every name that files have for them.

Found by walking the model, as the sites are: a diffusers UNet knows its LDM names and a LDM UNet its diffusers names;
Flux and SD3 have layers that one side fuses and the other keeps apart, hence rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from .update import Layer
from .weights import TEXT_WIDTHS, Component


@dataclass(frozen=True, slots=True)
class Rows:
    """``length`` rows from ``source`` on in the file's layer are the rows from ``target`` on in the model's."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Target:
    """One layer of a model. ``label`` is its diffusers name (or its own), ``block`` its short name such as ``in4``."""

    path: str
    component: Component
    label: str
    block: str
    shape: tuple[int, ...]
    has_bias: bool
    is_embedding: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name of a file leads: a layer, or some rows of it."""

    path: str
    rows: Rows | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TargetTable:
    """All layers of one component of a model by path, and all names that lead to them."""

    component: Component
    family: str
    targets: Mapping[str, Target]
    names: Mapping[str, tuple[Place, ...]]


def targets_of(model: nn.Module, component: Component = "unet") -> TargetTable:
    """The table of a UNet, a transformer or a text encoder, of diffusers, transformers or ComfyUI (its bare module)."""
    if component != "unet":
        return _text_encoder(model, component)
    if hasattr(model, "down_blocks"):
        return _unet(model, {d: d for d, _ in _diffusers_pairs(model)}, dict(_diffusers_pairs(model)))
    if hasattr(model, "input_blocks"):
        pairs = {ldm: diffusers for diffusers, ldm in _ldm_pairs(model)}
        return _unet(model, pairs, {ldm: ldm for ldm in pairs})
    return _transformer(model)


# --- UNets -----------------------------------------------------------------------------------------------------------

# inside a res block: diffusers, LDM (diffusers' convert_original_stable_diffusion_to_diffusers.py)
RES_BLOCK = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
ENDS = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)


def _diffusers_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(diffusers, LDM) module prefixes of a diffusers UNet."""
    unet = cast(Any, model)
    yield from ENDS
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            yield from _block(f"down_blocks.{i}", j, f"input_blocks.{number}")
            number += 1
        if getattr(block, "downsamplers", None):
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    yield from _middle()
    number = 0
    for i, block in enumerate(unet.up_blocks):
        last = len(block.resnets) - 1
        for j in range(last + 1):
            yield from _block(f"up_blocks.{i}", j, f"output_blocks.{number}")
            if j == last and getattr(block, "upsamplers", None):
                place = 2 if getattr(block, "attentions", None) else 1
                yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number}.{place}.conv"
            number += 1


def _ldm_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(diffusers, LDM) module prefixes of a LDM UNet."""
    unet = cast(Any, model)
    yield from ENDS
    level, j = 0, 0
    for number, block in enumerate(unet.input_blocks):
        if number == 0:
            continue
        if hasattr(block[0], "op"):
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            level, j = level + 1, 0
        else:
            yield from _block(f"down_blocks.{level}", j, f"input_blocks.{number}")
            j += 1
    yield from _middle()
    level, j = 0, 0
    for number, block in enumerate(unet.output_blocks):
        yield from _block(f"up_blocks.{level}", j, f"output_blocks.{number}")
        j += 1
        for place, layer in enumerate(block):
            if type(layer).__name__ == "Upsample" and hasattr(layer, "conv"):
                yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{number}.{place}.conv"
                level, j = level + 1, 0


def _block(diffusers: str, j: int, ldm: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{diffusers}.resnets.{j}.{d}", f"{ldm}.0.{s}") for d, s in RES_BLOCK)
    yield f"{diffusers}.attentions.{j}", f"{ldm}.1"


def _middle() -> Iterator[tuple[str, str]]:
    for j, place in ((0, 0), (1, 2)):
        yield from ((f"mid_block.resnets.{j}.{d}", f"middle_block.{place}.{s}") for d, s in RES_BLOCK)
    yield "mid_block.attentions.0", "middle_block.1"


def _unet(model: nn.Module, diffusers: Mapping[str, str], ldm: Mapping[str, str]) -> TargetTable:
    """``diffusers`` and ``ldm`` map prefixes of the model's own paths to the two families of names."""
    targets: dict[str, Target] = {}
    names: dict[str, tuple[Place, ...]] = {}
    attentions: list[tuple[int, str]] = []
    for path, module in _layers(model):
        label, old = _renamed(path, diffusers), _renamed(path, ldm)
        targets[path] = _target(path, module, "unet", label or path, _unet_block(old or path))
        for name in (path, label, old):
            if name is not None:
                names[_name(name)] = (Place(path),)
        if label is not None and path.endswith((".attn1.to_q", ".attn2.to_q")):
            attentions.append((("down", "up_b", "mid_").index(label[:4]), path.removesuffix(".to_q")))
    # FaceID files number modules in the order of diffusers' attention processors: down, up, middle
    for number, (_, path) in enumerate(sorted(attentions, key=lambda found: found[0])):
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            if f"{path}.{layer}" in targets:
                names[_name(f"processor.{number}.{layer}")] = (Place(f"{path}.{layer}"),)
    widths = {t.shape[1] for t in targets.values() if t.path.endswith("attn2.to_k")}
    family = TEXT_WIDTHS.get(next(iter(widths)), "unknown") if len(widths) == 1 else "unknown"
    return TargetTable("unet", family, targets, names)


def _renamed(path: str, prefixes: Mapping[str, str]) -> str | None:
    prefix, rest = path, ""
    while prefix:
        if prefix in prefixes:
            return prefixes[prefix] + rest
        prefix, _, tail = prefix.rpartition(".")
        rest = f".{tail}{rest}"
    return None


def _unet_block(ldm: str) -> str:
    parts = ldm.split(".")
    match parts[0]:
        case "input_blocks":
            return f"in{parts[1]}"
        case "middle_block":
            return f"mid{parts[1]}"
        case "output_blocks":
            return f"out{parts[1]}"
        case _:
            return "base"


# --- transformers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Link:
    """Some rows of a layer of the original (fused) model are some rows of a layer of diffusers'; None: all of them."""

    original: str
    diffusers: str
    rows: tuple[int, int, int] | None = None
    """First row in the original, first row in diffusers, number."""
    open_name: str = ""
    """The same in the open model initiative's names, which number the parts of a fused layer."""


FLUX_DOUBLE = (
    ("img_attn.proj", "attn.to_out.0"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("img_mod.lin", "norm1.linear"),
    ("txt_mod.lin", "norm1_context.linear"),
    ("img_mlp.0", "ff.net.0.proj"),
    ("img_mlp.2", "ff.net.2"),
    ("txt_mlp.0", "ff_context.net.0.proj"),
    ("txt_mlp.2", "ff_context.net.2"),
)
FLUX_ENDS = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
)
SD3_BLOCK = (
    ("x_block.attn.proj", "attn.to_out.0"),
    ("x_block.attn2.proj", "attn2.to_out.0"),
    ("context_block.attn.proj", "attn.to_add_out"),
    ("x_block.adaLN_modulation.1", "norm1.linear"),
    ("context_block.adaLN_modulation.1", "norm1_context.linear"),
    ("x_block.mlp.fc1", "ff.net.0.proj"),
    ("x_block.mlp.fc2", "ff.net.2"),
    ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    ("context_block.mlp.fc2", "ff_context.net.2"),
)
SD3_ENDS = (
    ("context_embedder", "context_embedder"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("x_embedder.proj", "pos_embed.proj"),
    ("final_layer.linear", "proj_out"),
)


def _flux_links(double: int, single: int, width: int, mlp: int) -> Iterator[_Link]:
    for i in range(double):
        original, diffusers = f"double_blocks.{i}", f"transformer_blocks.{i}"
        yield from _fused(f"{original}.img_attn.qkv", f"{diffusers}.attn.to_{{}}", width)
        yield from _fused(f"{original}.txt_attn.qkv", f"{diffusers}.attn.add_{{}}_proj", width)
        yield from (_Link(f"{original}.{a}", f"{diffusers}.{b}") for a, b in FLUX_DOUBLE)
    for i in range(single):
        original, diffusers = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        yield from _fused(f"{original}.linear1", f"{diffusers}.attn.to_{{}}", width)
        yield _Link(f"{original}.linear1", f"{diffusers}.proj_mlp", (3 * width, 0, mlp), f"{original}.linear1.3")
        yield _Link(f"{original}.linear2", f"{diffusers}.proj_out")
        yield _Link(f"{original}.modulation.lin", f"{diffusers}.norm.linear")
    yield from (_Link(a, b) for a, b in FLUX_ENDS)
    yield from _swapped("final_layer.adaLN_modulation.1", "norm_out.linear", width)


def _sd3_links(blocks: int, width: int) -> Iterator[_Link]:
    for i in range(blocks):
        original, diffusers = f"joint_blocks.{i}", f"transformer_blocks.{i}"
        yield from _fused(f"{original}.x_block.attn.qkv", f"{diffusers}.attn.to_{{}}", width)
        yield from _fused(f"{original}.x_block.attn2.qkv", f"{diffusers}.attn2.to_{{}}", width)
        yield from _fused(f"{original}.context_block.attn.qkv", f"{diffusers}.attn.add_{{}}_proj", width)
        for a, b in SD3_BLOCK:
            if i == blocks - 1 and b == "norm1_context.linear":  # the last block has scale and shift only
                yield from _swapped(f"{original}.{a}", f"{diffusers}.{b}", width)
            else:
                yield _Link(f"{original}.{a}", f"{diffusers}.{b}")
    yield from (_Link(a, b) for a, b in SD3_ENDS)
    yield from _swapped("final_layer.adaLN_modulation.1", "norm_out.linear", width)


def _fused(original: str, diffusers: str, width: int) -> Iterator[_Link]:
    for i, part in enumerate("qkv"):
        yield _Link(original, diffusers.format(part), (i * width, 0, width), f"{original}.{i}")


def _swapped(original: str, diffusers: str, width: int) -> Iterator[_Link]:
    """The original holds shift and scale, diffusers scale and shift."""
    yield _Link(original, diffusers, (0, width, width))
    yield _Link(original, diffusers, (width, 0, width))


def _transformer(model: nn.Module) -> TargetTable:
    layers = dict(_layers(model))
    targets: dict[str, Target] = {}
    family, links, is_original = _links_of(model, layers)
    names: dict[str, tuple[Place, ...]] = {_name(path): (Place(path),) for path in layers}
    labels: dict[str, str] = {}
    for link in links:
        own, other = (link.original, link.diffusers) if is_original else (link.diffusers, link.original)
        if own not in layers:
            continue
        if link.rows is None:
            names.setdefault(_name(other), (Place(own),))
            labels[own] = link.diffusers
        else:
            first, second, length = link.rows
            rows = Rows(second, first, length) if is_original else Rows(first, second, length)
            names[_name(other)] = (*names.get(_name(other), ()), Place(own, rows))
            labels.setdefault(own, own if is_original else link.diffusers)
        if link.open_name:
            names[_name(link.open_name)] = names[_name(link.diffusers)]
    if family == "Flux":
        if "img_in" in names:
            names["img_in_proj"] = names["img_in"]  # the open model initiative's name
        names.update(_xlabs_names(names, _flux_width(layers)))
    for path, module in layers.items():
        targets[path] = _target(path, module, "unet", labels.get(path, path), _transformer_block(path, family))
    return TargetTable("unet", family, targets, names)


XLABS = (
    ("qkv_lora1", "img_attn_qkv"),
    ("proj_lora1", "img_attn_proj"),
    ("qkv_lora2", "txt_attn_qkv"),
    ("proj_lora2", "txt_attn_proj"),
)
"""XLabs' processors of double blocks and the layers that they stand beside (x-flux, layers.py)."""


def _xlabs_names(names: Mapping[str, tuple[Place, ...]], width: int) -> dict[str, tuple[Place, ...]]:
    """Names by processor. A single block's `qkv` acts on the part of `linear1` that is no MLP, its `proj` on all of `linear2`."""
    found: dict[str, tuple[Place, ...]] = {}
    for name, places in names.items():
        block = re.fullmatch(r"((?:double|single)_blocks_\d+)_(.*)", name)
        if block is None:
            continue
        stem, layer = f"{block[1]}_processor_", block[2]
        found |= {stem + theirs: places for theirs, ours in XLABS if layer == ours}
        if layer == "linear2":
            found[stem + "proj"] = places
        if layer == "linear1":
            found[stem + "qkv"] = found[f"{name}_qkv"] = tuple(
                replace(place, rows=place.rows or Rows(0, 0, 3 * width))
                for place in places
                if place.rows is None or place.rows.source < 3 * width
            )
    return found


def _flux_width(layers: Mapping[str, nn.Module]) -> int:
    """Rows of q."""
    fused = layers.get("double_blocks.0.img_attn.qkv")
    return Layer(layers["transformer_blocks.0.attn.to_q"]).shape[0] if fused is None else Layer(fused).shape[0] // 3


def _links_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[str, Iterable[_Link], bool]:
    def rows(path: str) -> int:
        return Layer(layers[path]).shape[0]

    unet = cast(Any, model)
    if hasattr(model, "double_blocks") and "double_blocks.0.img_attn.qkv" in layers:
        width = rows("double_blocks.0.img_attn.qkv") // 3
        single = list(getattr(unet, "single_blocks", ()))
        mlp = rows("single_blocks.0.linear1") - 3 * width if single else 0
        return "Flux", _flux_links(len(unet.double_blocks), len(single), width, mlp), True
    if hasattr(model, "single_transformer_blocks") and "transformer_blocks.0.attn.to_q" in layers:
        width = rows("transformer_blocks.0.attn.to_q")
        single = list(unet.single_transformer_blocks)
        mlp = rows("single_transformer_blocks.0.proj_mlp") if single else 0
        return "Flux", _flux_links(len(unet.transformer_blocks), len(single), width, mlp), False
    if hasattr(model, "joint_blocks") and "joint_blocks.0.x_block.attn.qkv" in layers:
        width = rows("joint_blocks.0.x_block.attn.qkv") // 3
        return "SD3", _sd3_links(len(unet.joint_blocks), width), True
    if "transformer_blocks.0.attn.add_q_proj" in layers:
        return "SD3", _sd3_links(len(unet.transformer_blocks), rows("transformer_blocks.0.attn.to_q")), False
    return "unknown", (), True


def _transformer_block(path: str, family: str) -> str:
    parts = path.split(".")
    if len(parts) < 3 or not parts[1].isdigit():
        return "base"
    double = "joint" if family == "SD3" else "double"
    kinds = {"single_blocks": "single", "single_transformer_blocks": "single", "joint_blocks": "joint"}
    return (
        f"{kinds.get(parts[0], double if parts[0] in ('double_blocks', 'transformer_blocks') else 'block')}{parts[1]}"
    )


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
        targets[path] = _target(path, module, component, inner, component)
        short = inner.removeprefix("text_model.")
        for name in (inner, short, f"text_model.{short}"):
            names[_name(name)] = (Place(path),)
    return TargetTable(component, "unknown", targets, names)


# --- all -------------------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if getattr(module, "weight", None) is not None and Layer(module).kind != "other":
            yield path, module


def _target(path: str, module: nn.Module, component: Component, label: str, block: str) -> Target:
    layer = Layer(module)
    has_bias = getattr(module, "bias", None) is not None
    return Target(path, component, label, block, layer.shape, has_bias, layer.kind == "embedding")


def _name(path: str) -> str:
    return path.replace(".", "_")
