"""Tiny FLUX.1 and Chroma transformers of random weights: diffusers' own, and the least of ComfyUI's.

What ComfyUI's blocks do was read in comfy/ldm/flux/{model,layers,math}.py and comfy/ldm/chroma/model.py of 0.33.0 and 0.3.64.
``newer`` is the former: its double blocks change the picture's tokens in place. tests/host/flux_parity.py proves the same in
the real ones.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel
from torch import Tensor, nn

TEXT_DIM, WIDTH, HEADS, DOUBLE, SINGLE = 32, 32, 2, 2, 3
AXES = (4, 6, 6)
CONFIG: dict[str, Any] = {
    "patch_size": 1, "in_channels": 16, "num_layers": DOUBLE, "num_single_layers": SINGLE, "attention_head_dim": WIDTH // HEADS,
    "num_attention_heads": HEADS, "joint_attention_dim": TEXT_DIM, "axes_dims_rope": AXES,
}  # fmt: skip


def randomised(model: nn.Module, seed: int = 1) -> Any:
    """Numbers of size 1 everywhere; norm weights are random, since ones would hide which norm acts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        size = 0.8 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.3
        base = 1.0 if parameter.ndim == 1 and parameter.mean() == 1 else 0.0
        parameter.data = base + size * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


# --- diffusers -------------------------------------------------------------------------------------------------------


def diffusers_flux(**changes: Any) -> FluxTransformer2DModel:
    config = {**CONFIG, "pooled_projection_dim": 24, "guidance_embeds": True, **changes}
    return randomised(FluxTransformer2DModel(**config))


def diffusers_chroma(**changes: Any) -> ChromaTransformer2DModel:
    sizes = {"approximator_num_channels": 64, "approximator_hidden_dim": 48, "approximator_layers": 1}
    return randomised(ChromaTransformer2DModel(**{**CONFIG, **sizes, **changes}))


def call_packed(model: Any, x: Tensor, timestep: Tensor, text: Tensor, *, kept: Callable[[Tensor], Tensor] | None = None) -> Tensor:  # fmt: skip
    """The model on latents ``b 4 h w`` as pipelines call it: patches of 2 by 2 in a row, their places beside them."""
    height, width = x.shape[-2:]
    x = F.pad(x, (0, width % 2, 0, height % 2), mode="circular")
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    more: dict[str, Any] = {}
    if isinstance(getattr(model, "_orig_mod", model), FluxTransformer2DModel):
        more = {"pooled_projections": torch.zeros(len(x), 24), "guidance": torch.full((len(x),), 3.5)}
    out = model(
        hidden_states=F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
        encoder_hidden_states=text,
        timestep=(timestep / 1000).expand(len(x)),
        img_ids=ids.flatten(0, 1),
        txt_ids=torch.zeros(text.shape[1], 3),
        **more,
    ).sample
    return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, columns)), 2)[..., :height, :width]


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class QKNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), QKNorm(WIDTH // HEADS)

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return [*self.norm(q, k, v), v]


def rotated(x: Tensor, pe: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, options: Mapping[str, Any] | None) -> Tensor:
    q, k = rotated(q, pe), rotated(k, pe)

    def plain(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    override = (options or {}).get("optimized_attention_override")
    if override is None:
        return plain(q, k, v, HEADS)
    return override(plain, q, k, v, HEADS, skip_reshape=True, mask=None, transformer_options=options)


class Block(nn.Module):
    newer = True

    def modulations(self, layer: str, vec: Any, stream: int) -> Any:
        """Shift, scale and gate once or twice: of the block's own layer (Flux), or given for every stream (Chroma)."""
        own = getattr(self, layer, None)
        return (vec[stream] if isinstance(vec, tuple) else vec) if own is None else own(F.silu(vec))[:, None]


class DoubleStreamBlock(Block):
    def __init__(self, modulation: bool) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = WIDTH, HEADS
        self.img_attn, self.txt_attn = SelfAttention(), SelfAttention()
        self.img_mlp, self.txt_mlp = (
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(2)
        )
        if modulation:
            self.img_mod, self.txt_mod = nn.Linear(WIDTH, 6 * WIDTH), nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, img: Tensor, txt: Tensor, vec: Any, pe: Tensor, attn_mask: Any = None, transformer_options: Any = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        mods = [self.modulations(f"{name}_mod", vec, i).chunk(6, -1) for i, name in enumerate(("img", "txt"))]
        normed = [F.layer_norm(x, (WIDTH,)) * (1 + m[1]) + m[0] for x, m in zip((img, txt), mods, strict=True)]
        of_img, of_txt = self.img_attn.heads(normed[0]), self.txt_attn.heads(normed[1])
        q, k, v = (torch.cat(pair, 2) for pair in zip(of_txt, of_img, strict=True))
        attn = attention(q, k, v, pe, transformer_options)
        outs: list[Tensor] = []
        streams = (("img", img, attn[:, txt.shape[1] :]), ("txt", txt, attn[:, : txt.shape[1]]))
        for (name, x, part), m in zip(streams, mods, strict=True):
            if name == "img" and not self.newer:
                x = x.clone()
            x += m[2] * getattr(self, f"{name}_attn").proj(part)
            x += m[5] * getattr(self, f"{name}_mlp")(F.layer_norm(x, (WIDTH,)) * (1 + m[4]) + m[3])
            outs.append(x)
        return outs[0], outs[1]


class SingleStreamBlock(Block):
    def __init__(self, modulation: bool) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = WIDTH, HEADS
        self.linear1, self.linear2 = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.norm = QKNorm(WIDTH // HEADS)
        if modulation:
            self.modulation = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, vec: Any, pe: Tensor, attn_mask: Any = None, transformer_options: Any = None) -> Tensor:  # fmt: skip
        shift, scale, gate = self.modulations("modulation", vec, 0).chunk(3, -1)
        qkv, mlp = self.linear1(F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift).split((3 * WIDTH, 2 * WIDTH), -1)
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.norm(q, k, v)
        attn = attention(q, k, v, pe, transformer_options)
        x += gate * self.linear2(torch.cat([attn, F.gelu(mlp)], 2))
        return x


class ComfyTransformer(nn.Module):
    """What FLUX.1 and Chroma share; ``reference`` are latents of a picture behind the sampled one, as Kontext has them."""

    def __init__(self, *, newer: bool = True, modulation: bool = True) -> None:
        super().__init__()
        self.img_in, self.txt_in, self.time_in = nn.Linear(16, WIDTH), nn.Linear(TEXT_DIM, WIDTH), nn.Linear(8, WIDTH)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(modulation) for _ in range(DOUBLE))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(modulation) for _ in range(SINGLE))
        self.final_layer = nn.Linear(WIDTH, 16)
        self.newer, self.reference = newer, None
        for block in self.double_blocks:
            block.newer = newer  # type: ignore[assignment]

    reference: Tensor | None

    def vec(self, timesteps: Tensor) -> Tensor:
        return self.time_in(torch.sin(timesteps[:, None] * 0.1 + torch.arange(8.0)))

    def of_block(self, vec: Tensor, group: str, i: int) -> Any:
        return vec

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: Any = None) -> Tensor:
        options = dict(transformer_options or {})
        height, width = x.shape[-2:]
        img, ids = self.tokens(x, 0)
        tokens, (rows, columns) = img.shape[1], (-(-height // 2), -(-width // 2))
        if self.reference is not None:
            other, other_ids = self.tokens(self.reference.expand(len(x), -1, -1, -1), 1)
            img, ids = torch.cat([img, other], 1), torch.cat([ids, other_ids])
        img, txt, vec = self.img_in(img), self.txt_in(context), self.vec(timesteps)
        pe = self.rotations(torch.cat([torch.zeros(context.shape[1], 3), ids]))
        replaced = options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.double_blocks):
            args = {"img": img, "txt": txt, "vec": self.of_block(vec, "double", i), "pe": pe, "attn_mask": None}
            img, txt = self.run(block, replaced.get(("double_block", i)), args, options, ("img", "txt"))
        img = torch.cat([txt, img], 1)
        for i, block in enumerate(self.single_blocks):
            args = {"img": img, "vec": self.of_block(vec, "single", i), "pe": pe, "attn_mask": None}
            (img,) = self.run(block, replaced.get(("single_block", i)), args, options, ("img",))
        out = self.final_layer(img[:, txt.shape[1] : txt.shape[1] + tokens])
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, columns)), 2)[..., :height, :width]

    @staticmethod
    def run(block: Any, occupant: Any, args: dict[str, Any], options: dict[str, Any], names: tuple[str, ...]) -> list[Tensor]:  # fmt: skip
        def original(args: dict[str, Any]) -> dict[str, Tensor]:
            given = {"x" if name == "img" and len(names) == 1 else name: value for name, value in args.items()}
            given["transformer_options"] = args.get("transformer_options")
            outs = block(**given)
            return dict(zip(names, (outs,) if len(names) == 1 else outs, strict=True))

        args = {**args, "transformer_options": options}
        outs = original(args) if occupant is None else occupant(args, {"original_block": original})
        return [outs[name] for name in names]

    @staticmethod
    def tokens(x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="circular")
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        ids = torch.full((rows, columns, 3), float(index))
        ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
        return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2), ids.flatten(0, 1)

    @staticmethod
    def rotations(ids: Tensor) -> Tensor:
        turns = [ids[:, i, None] / 10000 ** torch.linspace(0, (d - 2) / d, d // 2) for i, d in enumerate(AXES)]
        angle = torch.cat(turns, -1)
        matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
        return matrix.unflatten(-1, (2, 2))[None, None]


class ComfyFlux(ComfyTransformer):
    def __init__(self, *, newer: bool = True) -> None:
        super().__init__(newer=newer)
        self.vector_in = nn.Linear(24, WIDTH)


class ComfyChroma(ComfyTransformer):
    def __init__(self, *, newer: bool = True) -> None:
        super().__init__(newer=newer, modulation=False)
        self.distilled_guidance_layer = nn.Linear(WIDTH, (12 * DOUBLE + 3 * SINGLE) * WIDTH)

    def of_block(self, vec: Tensor, group: str, i: int) -> Any:
        table = self.distilled_guidance_layer(vec)[:, None].chunk(12 * DOUBLE + 3 * SINGLE, -1)
        if group == "single":
            return torch.cat(table[3 * i : 3 * i + 3], -1)
        start = 3 * SINGLE + 12 * i
        return torch.cat(table[start : start + 6], -1), torch.cat(table[start + 6 : start + 12], -1)


def comfy_flux(*, newer: bool = True) -> ComfyFlux:
    return randomised(ComfyFlux(newer=newer), 2)


def comfy_chroma(*, newer: bool = True) -> ComfyChroma:
    return randomised(ComfyChroma(newer=newer), 2)
