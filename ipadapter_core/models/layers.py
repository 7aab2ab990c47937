"""Names of a base model's layers in files of every kind.

Files name a layer by its path in the model they were made for, and hosts build the same model with other paths: original
(LDM, ComfyUI) or diffusers. Some layers one of them fuses and the other keeps apart, hence rows. Names are compared with
underscores for dots, as kohya's trainers write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Parameter = Literal["weight", "bias"]

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every layer's weight by the layer's path, in the model's order."""


@dataclass(frozen=True, slots=True)
class Rows:
    """``length`` rows from ``source`` on in the file's layer are the rows from ``target`` on in the model's."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name of a file leads: a layer, or some rows of it; seldom to its bias alone."""

    path: str
    rows: Rows | None = None
    parameter: Parameter = "weight"


Names = dict[str, tuple[Place, ...]]
"""Places by underscored name."""


@dataclass(frozen=True, slots=True)
class LayerPart:
    """Some rows of a fused layer, with the name of the layer that they are in the other form, and the selector's words for it."""

    label: str
    start: int
    length: int
    words: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class LayerNames:
    """All names of the layers of one model.

    By path: ``labels`` are diffusers' paths, ``blocks`` short names such as ``in4``, ``words`` what the selector calls a layer, where the
    family says it, and ``parts`` the rows of a fused layer.
    """

    family: str
    names: Names
    labels: Mapping[str, str]
    blocks: Mapping[str, str]
    words: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    parts: Mapping[str, tuple[LayerPart, ...]] = field(default_factory=dict[str, tuple[LayerPart, ...]])


def underscored(path: str) -> str:
    return path.replace(".", "_")


def spellings(path: str) -> tuple[str, ...]:
    """A path as names are compared; files write ``to_out`` for the ``to_out.0`` of others, so one without a number has both names."""
    name = underscored(path)
    return (name, f"{name}_0") if name.endswith("_to_out") else (name,)


def own_names(shapes: Shapes) -> Names:
    return {name: (Place(path),) for path in shapes for name in spellings(path)}


def numbered_blocks(shapes: Shapes, words: Mapping[str, str]) -> dict[str, str]:
    """``double3`` for the layers of ``double_blocks.3``; ``words`` has the word for a list of blocks."""
    return {path: numbered_block(path, words) for path in shapes}


def numbered_block(path: str, words: Mapping[str, str]) -> str:
    """The word for the outermost list that a layer is in, and its number there; ``base`` if it is in none."""
    *parts, _ = path.split(".")
    at = next((i for i, part in enumerate(parts) if i and part.isdecimal() and len(part) < 5), None)
    return "base" if at is None else f"{words.get('.'.join(parts[:at]), 'block')}{parts[at]}"


COMMON_WORDS = (
    "attn", "attn1", "self", "attn2", "cross", "q", "k", "v", "out", "ff", "mod", "proj", "resnet", "sampler", "img", "txt",
)  # fmt: skip
"""What layers are called in every family that has such layers."""
_ATTENTIONS = {"attn1": "attn1 self", "attn2": "attn2 cross", "self_attn": "attn1 self", "cross_attn": "attn2 cross"}
_ATTENTION = frozenset(("attn", "attention", "img_attn", "txt_attn", *_ATTENTIONS))
_LAST = {
    "q": "to_q q_proj add_q_proj wq q q_linear",
    "k": "to_k k_proj add_k_proj wk k k_linear k_img",
    "v": "to_v v_proj add_v_proj wv v v_linear v_img",
    "out": "to_out to_add_out out_proj o_proj output_proj proj wo o out",
}
_PROJECTIONS = {name: word for word, names in _LAST.items() for name in names.split()}
_FEED_FORWARD = frozenset(["ff", "ff_context", "mlp", "img_mlp", "txt_mlp", "proj_mlp", "feed_forward", "ffn"])
_KINDS = {"resnets": "resnet", "downsamplers": "sampler", "upsamplers": "sampler"}


def common_words(path: str) -> frozenset[str]:
    """What the selector calls a layer whose family has no table, by the names that most models have for their parts."""
    parts = path.split(".")
    words = {_KINDS[part] for part in parts if part in _KINDS}
    if any(part in _ATTENTION for part in parts):
        last = parts[-2] if parts[-1] == "0" and len(parts) > 1 else parts[-1]
        words |= {"attn", _PROJECTIONS.get(last, "attn")}
        words |= {word for part in parts if part in _ATTENTIONS for word in _ATTENTIONS[part].split()}
    if any(part in _FEED_FORWARD for part in parts):
        words.add("ff")
    if any("modulation" in part.lower() or part.endswith("_mod") for part in parts):
        words.add("mod")
    if parts[-1] in ("proj_in", "proj_out"):
        words.add("proj")
    return frozenset(words)


def fused_attentions(shapes: Shapes) -> dict[str, tuple[LayerPart, ...]]:
    """The queries, keys and values of every ``qkv`` of a model without a table, where they are equally many rows."""
    found: dict[str, tuple[LayerPart, ...]] = {}
    for path, (rows, *_) in shapes.items():
        if path.rpartition(".")[2] in ("qkv", "to_qkv") and rows % 3 == 0:
            third, words = rows // 3, common_words(path)
            found[path] = tuple(LayerPart(path, i * third, third, words | {letter}) for i, letter in enumerate("qkv"))
    return found
