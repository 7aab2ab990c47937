"""Vision transformers that adapters of transformers read: SigLIP, DINOv2 and PE-Core, built from the weights of a file.

One module serves all three and both hosts. transformers has two of them under names that change with its version, ComfyUI has
two without what adapters need (SigLIP's pooling head, DINOv2's inner layers); neither has PE-Core.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CorruptFileError, one_line
from ..features import HALF, IMAGENET_MEAN, IMAGENET_STD, Rgb


@dataclass(frozen=True, slots=True)
class TowerKind:
    """A kind of vision transformer: how files name its tensors, and what shapes do not tell.

    ``marks`` are keys that only its files have, below ``prefixes``, and ``foreign`` ones that make them another model's;
    ``keys`` lead from a file's key to the module's. ``heads``
    are those of the published ones by width, and ``per_head`` the width of one head of all others (0: unknown).
    """

    name: str
    model_types: tuple[str, ...]
    prefixes: tuple[str, ...]
    marks: tuple[str, ...]
    keys: tuple[tuple[str, str], ...]
    mean: Rgb
    std: Rgb
    eps: float
    activation: str
    heads: Mapping[int, int]
    per_head: int = 0
    resize: str = "bicubic"
    rotary: bool = False
    class_token: bool = True
    foreign: tuple[str, ...] = ()

    def module_key(self, key: str) -> str | None:
        """Where the tensor of a file belongs in the module; None for one that is no part of it."""
        for pattern, replacement in self.keys:
            match = re.fullmatch(pattern, key)
            if match is not None:
                return match.expand(replacement)
        return None

    def prefix_in(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What stands before the names in a file of this kind; None if it is of another."""
        for prefix in self.prefixes:
            if all(prefix + mark in tensors for mark in self.marks):
                own = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
                flat = [
                    key for key in own if self.module_key(key) == "patches.weight" and tensors[prefix + key].ndim == 2
                ]
                return None if flat or not own.isdisjoint(self.foreign) else prefix
        return None


_PARAMETER = r"(weight|bias)"
_LINEARS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}

SIGLIP = TowerKind(
    "SigLIP",
    ("siglip", "siglip_vision_model"),
    ("vision_model.", "model.vision_model.", ""),
    ("embeddings.patch_embedding.bias", "embeddings.position_embedding.weight", "encoder.layers.0.layer_norm1.weight"),
    (
        (rf"embeddings\.patch_embedding\.{_PARAMETER}", r"patches.\1"),
        (r"embeddings\.position_embedding\.weight", "positions"),
        *((rf"encoder\.layers\.([0-9]+)\.self_attn\.{old}\.{_PARAMETER}", rf"blocks.\1.{new}.\2") for new, old in _LINEARS.items()),
        (rf"encoder\.layers\.([0-9]+)\.layer_norm([12])\.{_PARAMETER}", r"blocks.\1.norm\2.\3"),
        (rf"encoder\.layers\.([0-9]+)\.mlp\.fc([12])\.{_PARAMETER}", r"blocks.\1.fc\2.\3"),
        (rf"post_layernorm\.{_PARAMETER}", r"norm.\1"),
        (r"head\.probe", "head.probe"),
        (r"head\.attention\.in_proj_(weight|bias)", r"head.qkv.\1"),
        (rf"head\.attention\.out_proj\.{_PARAMETER}", r"head.out.\1"),
        (rf"head\.layernorm\.{_PARAMETER}", r"head.norm.\1"),
        (rf"head\.mlp\.fc([12])\.{_PARAMETER}", r"head.fc\1.\2"),
    ),
    HALF, HALF, 1e-6, "tanh", {768: 12, 1024: 16, 1152: 16, 1536: 16}, class_token=False,
)  # fmt: skip
"""transformers' modeling_siglip.py; SigLIP 2 of a fixed size is the same model."""

DINOV2 = TowerKind(
    "DINOv2",
    ("dinov2",),
    ("", "dinov2.", "model."),
    ("embeddings.position_embeddings", "encoder.layer.0.layer_scale1.lambda1"),
    (
        (rf"embeddings\.patch_embeddings\.projection\.{_PARAMETER}", r"patches.\1"),
        (r"embeddings\.position_embeddings", "positions"),
        (r"embeddings\.cls_token", "cls"),
        *(
            (rf"encoder\.layer\.([0-9]+)\.attention\.attention\.{old}\.{_PARAMETER}", rf"blocks.\1.{new}.\2")
            for new, old in (("q", "query"), ("k", "key"), ("v", "value"))
        ),
        (rf"encoder\.layer\.([0-9]+)\.attention\.output\.dense\.{_PARAMETER}", r"blocks.\1.out.\2"),
        (rf"encoder\.layer\.([0-9]+)\.norm([12])\.{_PARAMETER}", r"blocks.\1.norm\2.\3"),
        (r"encoder\.layer\.([0-9]+)\.layer_scale([12])\.lambda1", r"blocks.\1.scale\2"),
        (rf"encoder\.layer\.([0-9]+)\.mlp\.fc([12])\.{_PARAMETER}", r"blocks.\1.fc\2.\3"),
        (rf"encoder\.layer\.([0-9]+)\.mlp\.weights_in\.{_PARAMETER}", r"blocks.\1.fc1.\2"),
        (rf"encoder\.layer\.([0-9]+)\.mlp\.weights_out\.{_PARAMETER}", r"blocks.\1.fc2.\2"),
        (rf"layernorm\.{_PARAMETER}", r"norm.\1"),
    ),
    IMAGENET_MEAN, IMAGENET_STD, 1e-6, "none", {}, per_head=64, foreign=("embeddings.register_tokens",),
)  # fmt: skip
"""transformers' modeling_dinov2.py."""

PE_CORE = TowerKind(
    "PE-Core",
    (),
    ("visual.", "module.visual.", ""),
    ("class_embedding", "positional_embedding", "transformer.resblocks.0.attn.in_proj_weight", "attn_pool.probe"),
    (
        (r"conv1\.weight", "patches.weight"),
        (r"positional_embedding", "positions"),
        (r"class_embedding", "cls"),
        (rf"ln_pre\.{_PARAMETER}", r"norm_before.\1"),
        (rf"ln_post\.{_PARAMETER}", r"norm.\1"),
        (r"transformer\.resblocks\.([0-9]+)\.attn\.in_proj_(weight|bias)", r"blocks.\1.qkv.\2"),
        (rf"transformer\.resblocks\.([0-9]+)\.attn\.out_proj\.{_PARAMETER}", r"blocks.\1.out.\2"),
        (rf"transformer\.resblocks\.([0-9]+)\.ln_([12])\.{_PARAMETER}", r"blocks.\1.norm\2.\3"),
        (rf"transformer\.resblocks\.([0-9]+)\.mlp\.c_fc\.{_PARAMETER}", r"blocks.\1.fc1.\2"),
        (rf"transformer\.resblocks\.([0-9]+)\.mlp\.c_proj\.{_PARAMETER}", r"blocks.\1.fc2.\2"),
    ),
    HALF, HALF, 1e-5, "none", {384: 6, 768: 12, 1024: 16}, resize="bilinear", rotary=True,
    foreign=("transformer.resblocks.0.ls_1.gamma",),
)  # fmt: skip
"""facebookresearch/perception_models, core/vision_encoder/pe.py and rope.py; the published ones with a class token."""

KINDS = (SIGLIP, DINOV2, PE_CORE)

MOST_LAYERS = 100
"""The largest published one has 50."""

ROTARY_BASE = 10_000.0


def kind_of(tensors: Mapping[str, Tensor]) -> tuple[TowerKind, str] | None:
    """The kind of tower that a file's tensors are of, and what stands before their names; None if none of KINDS.

    Patches without a shape of their own are of SigLIP 2's other kind, which takes any number of them.
    """
    for kind in KINDS:
        prefix = kind.prefix_in(tensors)
        if prefix is not None:
            return kind, prefix
    return None


class _Block(nn.Module):
    """One layer: attention and an MLP, each behind a norm, added at a learned scale where the file has one."""

    def __init__(self, width: int, heads: int, inner: int, gated: bool, scaled: bool, kind: TowerKind, operations: Any):
        super().__init__()
        self.heads, self.gated, self.activation = heads, gated, kind.activation
        self.norm1, self.norm2 = (operations.LayerNorm(width, eps=kind.eps) for _ in range(2))
        self.q, self.k, self.v, self.out = (operations.Linear(width, width) for _ in range(4))
        self.fc1 = operations.Linear(width, 2 * inner if gated else inner)
        self.fc2 = operations.Linear(inner, width)
        self.scale1, self.scale2 = (nn.Parameter(torch.empty(width)) if scaled else None for _ in range(2))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if rotation is not None:
            q, k = (_rotated(t, *rotation) for t in (q, k))
        x = x + _scaled(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), self.scale1)
        return x + _scaled(self.fc2(self._active(self.fc1(self.norm2(x)))), self.scale2)

    def _active(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, value = x.chunk(2, -1)
            return F.silu(gate) * value
        return F.gelu(x, approximate=self.activation)


class PoolingHead(nn.Module):
    """SigLIP's attention pooling: one learned query looks at all tokens, ``b t c -> b c`` (transformers' modeling_siglip.py)."""

    def __init__(self, width: int, heads: int, inner: int, eps: float, operations: Any = nn):
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.q, self.k, self.v, self.out = (operations.Linear(width, width) for _ in range(4))
        self.norm = operations.LayerNorm(width, eps=eps)
        self.fc1, self.fc2 = operations.Linear(width, inner), operations.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        probe = self.probe.to(tokens).expand(len(tokens), -1, -1)
        q, k, v = (
            part(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, t in ((self.q, probe), (self.k, tokens), (self.v, tokens))
        )
        x = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (x + self.fc2(F.gelu(self.fc1(self.norm(x)), approximate="tanh")))[:, 0]


class VisionTower(nn.Module):
    """A vision transformer in the shapes of ``state``, which has the module's own keys; empty.

    ``operations`` has the layers (``Linear``, ``LayerNorm``, ``Conv2d``): torch.nn's, or ComfyUI's that cast their weights.
    """

    def __init__(self, kind: TowerKind, state: Mapping[str, Tensor], heads: int, operations: Any = nn):
        super().__init__()
        width, _, patch, _ = _shape(state, "patches.weight", 4)
        self.kind, self.patch, self.width, self.heads = kind, patch, width, heads
        self.depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        positions = _shape(state, "positions", 2)[0]
        self.side = math.isqrt(max(0, positions - kind.class_token))
        if self.side**2 + kind.class_token != positions or not self.side:
            raise CorruptFileError(
                f"the {kind.name} tower has {positions} positions, which are no square picture; download it again"
            )
        inner = _shape(state, "blocks.0.fc2.weight", 2)[1]
        gated = _shape(state, "blocks.0.fc1.weight", 2)[0] == 2 * inner
        self.patches = operations.Conv2d(3, width, patch, stride=patch, bias="patches.bias" in state)
        self.positions = nn.Parameter(torch.empty(positions, width))
        self.cls = nn.Parameter(torch.empty(width)) if kind.class_token else None
        self.norm_before = operations.LayerNorm(width, eps=kind.eps) if "norm_before.weight" in state else None
        scaled = "blocks.0.scale1" in state
        self.blocks = nn.ModuleList(
            _Block(width, heads, inner, gated, scaled, kind, operations) for _ in range(self.depth)
        )
        self.norm = operations.LayerNorm(width, eps=kind.eps)
        self.head = (
            PoolingHead(width, heads, _shape(state, "head.fc1.weight", 2)[0], kind.eps, operations)
            if "head.probe" in state
            else None
        )

    def forward(self, pixels: Tensor, layers: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Normalised pixels ``b 3 y x`` to the last hidden state ``b t c``, and the outputs of ``layers`` (1: of the first)."""
        x: Tensor = self.patches(pixels)
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        if self.cls is not None:
            x = torch.cat([self.cls.to(x).expand(len(x), 1, -1), x], 1)
        x = x + resized_positions(self.positions, rows, columns, self.kind.resize).to(x)
        if self.norm_before is not None:
            x = self.norm_before(x)
        rotation = _rotation(rows, columns, self.width // self.heads, x) if self.kind.rotary else None
        kept: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks, 1):
            x = block(x, rotation)
            if number in layers:
                kept[number] = x
        return self.norm(x), kept


def resized_positions(positions: Tensor, rows: int, columns: int, mode: str = "bicubic") -> Tensor:
    """Learned positions ``t c`` of a square picture, a class token's first where there is one, for one of ``rows`` x ``columns``."""
    side = math.isqrt(len(positions))
    if (rows, columns) == (side, side):
        return positions
    first = len(positions) - side * side
    grid = positions[first:].float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, (rows, columns), mode=mode, align_corners=False)
    return torch.cat([positions[:first].float(), grid[0].flatten(1).T]).to(positions.dtype)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x)


def _rotation(rows: int, columns: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``t d`` of PE-Core's rotation: columns turn the first half of a head, rows the second, pairs lie side by side.
    Both count from 1; the class token is not turned."""
    quarter = torch.arange(0, width // 2, 2, device=like.device, dtype=torch.float32)
    frequencies = ROTARY_BASE ** -(quarter / (width // 2))
    y, x = (
        torch.arange(1, n + 1, device=like.device, dtype=torch.float32)[:, None] * frequencies for n in (rows, columns)
    )
    angles = torch.cat([x.expand(rows, -1, -1), y[:, None].expand(-1, columns, -1)], -1).flatten(0, 1)
    angles = F.pad(angles, (0, 0, 1, 0)).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def read_tower(tensors: Mapping[str, Tensor], heads: int = 0, operations: Any = nn) -> VisionTower | None:
    """The tower in a file's tensors, with its weights as they are; None for a file that is none of KINDS.

    ``heads`` are those that a config says, 0: as published. Raises CorruptFileError where tensors are missing or do not fit.
    """
    found = kind_of(tensors)
    if found is None:
        return None
    kind, prefix = found
    state = _module_state(kind, {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    width = _shape(state, "patches.weight", 4)[0]
    heads = heads or kind.heads.get(width, 0) or (width // kind.per_head if kind.per_head else 0)
    if heads < 1 or width % heads:
        raise CorruptFileError(
            f"the {kind.name} tower is {width} wide, and how many attention heads that makes is not known; use one of the published "
            "sizes, or a folder whose config.json says num_attention_heads"
        )
    with torch.device("meta"):
        tower = VisionTower(kind, state, heads, operations)
    _check(kind, tower, state)
    tower.load_state_dict(state, assign=True)
    return tower.requires_grad_(False).eval()


def read_head(tensors: Mapping[str, Tensor], operations: Any = nn) -> PoolingHead:
    """SigLIP's pooling head alone, in tensors named as below ``vision_model.``. Raises CorruptFileError like read_tower()."""
    state = {k.removeprefix("head."): t for k, t in _placed(SIGLIP, tensors).items() if k.startswith("head.")}
    width = _shape(state, "probe", 3)[2]
    heads = SIGLIP.heads.get(width, 0)
    if not heads:
        raise CorruptFileError(f"the SigLIP head is {width} wide, which no published one is")
    with torch.device("meta"):
        head = PoolingHead(width, heads, _shape(state, "fc1.weight", 2)[0], SIGLIP.eps, operations)
    _check(SIGLIP, head, state)
    head.load_state_dict(state, assign=True)
    return head.requires_grad_(False).eval()


def _module_state(kind: TowerKind, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the module's keys, with layers that are numbered without a gap."""
    state = _placed(kind, tensors)
    numbers = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    if not numbers or len(numbers) > MOST_LAYERS or numbers != {str(i) for i in range(len(numbers))}:
        raise CorruptFileError(
            f"the {kind.name} tower has {len(numbers)} layers; they must be numbered from 0 without a gap, {MOST_LAYERS} at most: "
            "the file is incomplete; download it again"
        )
    return state


def _placed(kind: TowerKind, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the module's keys; fused queries, keys and values apart."""
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        place = kind.module_key(key)
        if place is None:
            continue
        owner, dot, parameter = place.rpartition(".")
        if owner.endswith("qkv"):
            for name, part in zip("qkv", tensor.chunk(3), strict=False):
                state[f"{owner.removesuffix('qkv')}{name}{dot}{parameter}"] = part
        elif place in ("positions", "cls"):
            state[place] = (
                tensor.reshape(-1, tensor.shape[-1]) if place == "positions" and tensor.ndim else tensor.flatten()
            )
        else:
            state[place] = tensor
    return state


def _check(kind: TowerKind, tower: nn.Module, state: Mapping[str, Tensor]) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in tower.state_dict().items()}
    missing = [key for key in expected if key not in state]
    if missing:
        raise CorruptFileError(
            f"the {kind.name} tower lacks {len(missing)} of its weights (the first is {missing[0]}): the file is incomplete; download it again"
        )
    wrong = [key for key in state if expected.get(key) != tuple(state[key].shape) or not state[key].is_floating_point()]
    if wrong:
        raise CorruptFileError(
            f"weights of the {kind.name} tower do not fit the rest (the first is {one_line(wrong[0])}): the file is damaged; download it again"
        )


def _shape(state: Mapping[str, Tensor], key: str, rank: int) -> tuple[int, ...]:
    shape = tuple(state[key].shape) if key in state else ()
    if len(shape) != rank or 0 in shape:
        raise CorruptFileError(f"not found: {key} with {rank} axes: the file is incomplete; download it again")
    return shape
