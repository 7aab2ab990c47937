"""What FLUX.1 and Chroma predict with image prompts, by formulas written into diffusers' tiny transformers.

``build(folder)`` writes the models' weights, adapters' files, inputs, and every case's prediction for flux_parity.py, which runs
the same in a ComfyUI. Formulas: x-flux's, InstantX' and InstantCharacter's processors; ``raw`` is the last's with constant tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb, get_timestep_embedding
from safetensors.torch import save_file
from torch import Tensor, nn

from ipadapter_core import load_adapter
from tiny import tiny_state
from tiny_flux import randomised

HEADS, HEAD, TEXT_DIM, POOLED = 2, 128, 48, 24
WIDTH, DOUBLE, SINGLE = HEADS * HEAD, 2, 2
FEATURE, TOKENS, HIDDEN, SEEN = 20, 4, 16, 128
"""Width of an image's feature, image tokens, the hidden width of InstantX' projector, and the width of InstantCharacter's feature."""
SIGMA, GUIDANCE = 0.6, 3.5
ROWS, COLUMNS = 5, 3
SHAPES: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": DOUBLE, "num_single_layers": SINGLE, "attention_head_dim": HEAD,
    "num_attention_heads": HEADS, "joint_attention_dim": TEXT_DIM, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
CHROMA_ROWS = 344
"""Modulations of the full-size Chroma, a number in ComfyUI's code."""


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux() -> Any:
    return randomised(FluxTransformer2DModel(**SHAPES, pooled_projection_dim=POOLED, guidance_embeds=True), 3)


def chroma() -> Any:
    sizes = {"approximator_num_channels": 64, "approximator_hidden_dim": 48, "approximator_layers": 1}
    model: Any = randomised(ChromaTransformer2DModel(**SHAPES, **sizes), 4)
    # ComfyUI counts the last layer's modulations from the end of the full-size table
    last = torch.arange(CHROMA_ROWS - 2, CHROMA_ROWS) * 1000
    table = model.time_text_embed.mod_proj
    table[-2:] = get_timestep_embedding(last, table.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return model


# --- adapters ----------------------------------------------------------------------------------------------------------


def linear(rows: int, columns: int, seed: int) -> Tensor:
    return numbers(rows, columns, seed=seed) / columns**0.5


def xlabs_file(seed: int) -> dict[str, Tensor]:
    proj = "ip_adapter_proj_model."
    state = {
        f"{proj}proj.weight": linear(TOKENS * TEXT_DIM, FEATURE, seed), f"{proj}proj.bias": numbers(TOKENS * TEXT_DIM, seed=seed + 1),
        f"{proj}norm.weight": 1 + 0.2 * numbers(TEXT_DIM, seed=seed + 2), f"{proj}norm.bias": 0.2 * numbers(TEXT_DIM, seed=seed + 3),
    }  # fmt: skip
    for i in range(DOUBLE):
        for j, part in enumerate("kv"):
            stem = f"double_blocks.{i}.processor.ip_adapter_double_stream_{part}_proj"
            state[f"{stem}.weight"] = linear(WIDTH, TEXT_DIM, seed + 10 + 2 * i + j)
            state[f"{stem}.bias"] = 0.3 * numbers(WIDTH, seed=seed + 30 + 2 * i + j)
    return state


def instantx_file(seed: int) -> dict[str, Tensor]:
    state = {
        "image_proj.proj.0.weight": linear(HIDDEN, FEATURE, seed), "image_proj.proj.0.bias": 0.2 * numbers(HIDDEN, seed=seed + 1),
        "image_proj.proj.2.weight": linear(TOKENS * TEXT_DIM, HIDDEN, seed + 2), "image_proj.proj.2.bias": numbers(TOKENS * TEXT_DIM, seed=seed + 3),
        "image_proj.norm.weight": 1 + 0.2 * numbers(TEXT_DIM, seed=seed + 4), "image_proj.norm.bias": 0.2 * numbers(TEXT_DIM, seed=seed + 5),
    }  # fmt: skip
    for i in range(DOUBLE + SINGLE):
        for j, part in enumerate("kv"):
            state[f"ip_adapter.{i}.to_{part}_ip.weight"] = linear(WIDTH, TEXT_DIM, seed + 10 + 2 * i + j)
    return state


def character_file(seed: int) -> dict[str, Tensor]:
    sizes = {
        "token_dim": TEXT_DIM,
        "num_tokens": TOKENS,
        "feature_dim": SEEN,
        "hidden_dim": 64,
        "inner_dim": 64,
        "depth": 2,
    }
    return tiny_state("instantcharacter", seed=seed, channels=(WIDTH,) * (DOUBLE + SINGLE), **sizes)


def character_tokens(state: dict[str, Tensor], seen: Tensor) -> Tensor:
    """At the timestep of SIGMA, by the core's own projector, which is compared module by module elsewhere."""
    adapter = load_adapter(dict(state))
    with torch.no_grad():
        return adapter.tokens_at(adapter.tokens(seen), 1000 * SIGMA)


def xlabs_tokens(state: dict[str, Tensor], features: Tensor) -> Tensor:
    proj, norm = ([state[f"ip_adapter_proj_model.{m}.{end}"] for end in ("weight", "bias")] for m in ("proj", "norm"))
    return F.layer_norm(F.linear(features, *proj).unflatten(-1, (TOKENS, TEXT_DIM)), (TEXT_DIM,), *norm)


def instantx_tokens(state: dict[str, Tensor], features: Tensor) -> Tensor:
    one, two, norm = ([state[f"image_proj.{m}.{end}"] for end in ("weight", "bias")] for m in ("proj.0", "proj.2", "norm"))  # fmt: skip
    x = F.linear(F.gelu(F.linear(features, *one)), *two)
    return F.layer_norm(x.unflatten(-1, (TOKENS, TEXT_DIM)), (TEXT_DIM,), *norm)


# --- formulas ----------------------------------------------------------------------------------------------------------


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, HEAD))


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries ``b l h d`` of latents to keys and values ``b n h d``; returns ``b l c``."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)


@dataclass
class Adapter:
    """One image prompt in a formula: ``tokens`` ``b n d``, ``mask`` of the picture's tokens."""

    family: str
    state: dict[str, Tensor]
    tokens: Tensor
    scale: float
    mask: Tensor | None = None

    def added(self, layer: int, raw: Tensor, normed: Tensor, text: int, picture: int) -> Tensor:
        """What is added to the tokens of a sequence of ``text``, ``picture`` and others."""
        if self.family == "xlabs":
            stem = f"double_blocks.{layer}.processor.ip_adapter_double_stream_"
            k, v = (F.linear(self.tokens, self.state[f"{stem}{p}_proj.weight"], self.state[f"{stem}{p}_proj.bias"]) for p in "kv")  # fmt: skip
            q, k = normed, split(k)
        elif self.family == "instantcharacter":
            stem = f"ip_adapter.{layer}."
            k, v = (F.linear(self.tokens, self.state[f"{stem}to_{p}_ip.weight"], self.state[f"{stem}to_{p}_ip.bias"]) for p in "kv")  # fmt: skip
            q, k = (
                t / (t.square().mean(-1, keepdim=True).sqrt() + 1e-6) * self.state[f"{stem}norm_ip_{part}.scale"]
                for part, t in (("q", raw), ("k", split(k)))
            )
        else:
            k, v = (F.linear(self.tokens, self.state[f"ip_adapter.{layer}.to_{p}_ip.weight"]) for p in "kv")
            q, k = normed, rms(split(k), 1e-5)
            if self.family == "raw":
                own = 0.5 + torch.linspace(0, 1, HEAD)  # the adapter's norms, of queries and keys
                q, k = rms(raw) * own, k * own.flip(0)
        out = self.scale * attend(q, k, split(v))
        mask = torch.ones(1, picture, 1) if self.mask is None else self.mask
        of_text = mask.mean(1, keepdim=True).expand(-1, text, -1) * (self.family == "instantx")
        others = torch.zeros(1, out.shape[1] - text - picture, 1)
        return out * torch.cat([of_text, mask, others], 1)


@dataclass
class Steered:
    """An attention processor of a block with image prompts, in double blocks on the picture's stream."""

    layer: int
    adapters: list[Adapter]
    text: int
    picture: int
    queries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None, image_rotary_emb: Any = None, **_: Any) -> Any:  # fmt: skip
        raw, k, v = (split(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        normed, k = attn.norm_q(raw), attn.norm_k(k)
        q, text = normed, 0 if encoder_hidden_states is not None else self.text
        if encoder_hidden_states is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            more = [split(layer(encoder_hidden_states)) for layer in layers]
            more[0], more[1] = attn.norm_added_q(more[0]), attn.norm_added_k(more[1])
            q, k, v = (torch.cat(pair, 1) for pair in zip(more, (q, k, v), strict=True))
        q, k = (apply_rotary_emb(t, image_rotary_emb, sequence_dim=1) for t in (q, k))
        out = attend(q, k, v)
        self.queries[0] = raw, normed
        of_text, out = (None, out) if encoder_hidden_states is None else (out[:, : self.text], out[:, self.text :])
        for adapter in self.adapters:
            if adapter.family != "xlabs":
                out = out + adapter.added(self.layer, raw, normed, text, self.picture)
        return out if of_text is None else (attn.to_out[0](out), attn.to_add_out(of_text))

    def behind(self, block: nn.Module, args: Any, outputs: Any) -> Any:
        of_text, picture = outputs
        for adapter in self.adapters:
            if adapter.family == "xlabs":
                picture = picture + adapter.added(self.layer, *self.queries[0], 0, self.picture)
        return of_text, picture


def packed(x: Tensor, index: int = 0) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    ids = torch.full((rows, columns, 3), float(index))
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2), ids.flatten(0, 1)


def predict(model: Any, x: Tensor, text: Tensor, adapters: list[Adapter], *, reference: Tensor | None = None, **more: Any) -> Tensor:  # fmt: skip
    """The velocity for latents ``b 16 h w``, with reference pictures' tokens behind the picture's (Kontext)."""
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    tokens, ids = packed(x)
    if reference is not None:
        other, other_ids = packed(reference.expand(len(x), -1, -1, -1), 1)
        tokens, ids = torch.cat([tokens, other], 1), torch.cat([ids, other_ids])
    handles, names = [], sorted(model.attn_processors, key=lambda name: ("single" in name, name))
    before = dict(model.attn_processors)
    count = text.shape[1]
    steered = [Steered(i, adapters, count, rows * columns) for i in range(len(names))]
    if not more:
        model.set_attn_processor(dict(zip(names, steered, strict=True)))
        handles = [
            block.register_forward_hook(own.behind)
            for block, own in zip(model.transformer_blocks, steered[:DOUBLE], strict=True)
        ]
    if isinstance(model, FluxTransformer2DModel):
        more |= {"pooled_projections": numbers(1, POOLED, seed=9).expand(len(x), -1), "guidance": torch.full((len(x),), GUIDANCE)}  # fmt: skip
    with torch.no_grad():
        out = model(
            hidden_states=tokens, encoder_hidden_states=text.expand(len(x), -1, -1), timestep=torch.full((len(x),), SIGMA),
            img_ids=ids, txt_ids=torch.zeros(count, 3), **more,
        ).sample  # fmt: skip
    for handle in handles:
        handle.remove()
    model.set_attn_processor(before)
    out = out[:, : rows * columns].transpose(1, 2).unflatten(2, (rows, columns))
    return F.pixel_shuffle(out, 2)


def by_diffusers(model: Any, state: dict[str, Tensor], x: Tensor, text: Tensor, features: Tensor, scale: float) -> Tensor:  # fmt: skip
    """diffusers' own XLabs adapter, with which the formula here is compared."""
    layers = {
        f"{i}.to_{p}_ip.{end}": state[f"double_blocks.{i}.processor.ip_adapter_double_stream_{p}_proj.{end}"]
        for i in range(DOUBLE)
        for p in "kv"
        for end in ("weight", "bias")
    }
    projector = {
        k.removeprefix("ip_adapter_proj_model."): v for k, v in state.items() if k.startswith("ip_adapter_proj")
    }
    model._load_ip_adapter_weights([{"image_proj": projector, "ip_adapter": layers}], low_cpu_mem_usage=False)
    for processor in model.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]
    embeds = features[:, None].expand(len(x), -1, -1)
    return predict(model, x, text, [], joint_attention_kwargs={"ip_adapter_image_embeds": [embeds]})


# --- cases -------------------------------------------------------------------------------------------------------------

INPUTS = {
    "x": numbers(2, 16, 2 * ROWS, 2 * COLUMNS, seed=5),
    "positive": numbers(1, 7, TEXT_DIM, seed=6),
    "negative": numbers(1, 7, TEXT_DIM, seed=7),
    "longer": numbers(1, 9, TEXT_DIM, seed=8),
    "pooled": numbers(1, POOLED, seed=9),
    "features": numbers(2, FEATURE, seed=10),
    "neutral": 0.3 * numbers(1, FEATURE, seed=11),
    "mask": torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(12)),
    "reference": numbers(1, 16, 4, 8, seed=13),
    "seen": numbers(1, 8 * 9, SEEN, seed=14),
}


def build(folder: Path) -> dict[str, float]:
    """Write everything; returns how far diffusers' own adapter and the formula here are apart, by model."""
    files = {
        "xlabs": xlabs_file(100), "xlabs two": xlabs_file(300), "instantx": instantx_file(500),
        "instantcharacter": character_file(7),
    }  # fmt: skip
    tokens_of: dict[str, Callable[..., Tensor]] = {
        "xlabs": xlabs_tokens, "instantx": instantx_tokens, "instantcharacter": character_tokens
    }  # fmt: skip
    for name, state in files.items():
        save_file(state, folder / f"{name}.safetensors")
    expected: dict[str, Tensor] = {}
    models = {"flux": flux(), "chroma": chroma()}
    x, features, neutral = INPUTS["x"], INPUTS["features"], INPUTS["neutral"]
    mask = INPUTS["mask"].flatten()[None, :, None]

    def adapter(file: str, branch: str, *, family: str = "", scale: float = 0.7, each: bool = False, mask: Tensor | None = None) -> Adapter:  # fmt: skip
        kind = file.split()[0]
        feature = neutral if branch == "negative" else features if each else features[:1]
        if kind == "instantcharacter":  # both branches see the same
            feature = INPUTS["seen"]
        tokens = tokens_of[kind](files[file], feature).expand(len(x), -1, -1)
        return Adapter(family or kind, files[file], tokens, scale, mask)

    def case(name: str, model: str, *given: Any, branches: tuple[str, ...] = ("positive", "negative"), texts: dict[str, str] | None = None, crop: Any = (), **how: Any) -> None:  # fmt: skip
        for branch in branches:
            adapters = [adapter(file, branch, **options) for file, options in given]
            text = INPUTS[(texts or {}).get(branch, branch)]
            expected[f"{name}/{branch}"] = predict(models[model], x[crop], text, adapters, **how)

    for model in models:
        case(f"{model} plain", model)
        for family in ("xlabs", "instantx"):
            case(f"{model} {family}", model, (family, {}))
        case(f"{model} raw", model, ("instantx", {"family": "raw"}))
        case(f"{model} instantcharacter", model, ("instantcharacter", {}))
    for family in ("xlabs", "instantx"):
        case(f"{family} apart", "flux", (family, {}), texts={"negative": "longer"})
        case(f"{family} each", "flux", (family, {"each": True}))
        case(f"{family} mask", "flux", (family, {"mask": mask}))
        case(f"{family} reference", "flux", (family, {}), reference=INPUTS["reference"])
        case(f"{family} reference mask", "flux", (family, {"mask": mask}), reference=INPUTS["reference"])
    case("two xlabs", "flux", ("xlabs", {}), ("xlabs two", {"scale": -0.4}))
    case("xlabs and instantx", "flux", ("xlabs", {}), ("instantx", {"scale": 0.5}))
    corner = (..., slice(2, 8), slice(2, 6))
    part = INPUTS["mask"][1:4, 1:3].flatten()[None, :, None]
    for family in ("xlabs", "instantx"):
        case(f"{family} area", "flux", (family, {"mask": part}), branches=("positive",), crop=corner)
    case("instantcharacter mask", "flux", ("instantcharacter", {"mask": mask}))
    weight = models["flux"].transformer_blocks[0].attn.norm_q.weight
    kept = weight.data.clone()
    weight.data[3] = 1e-9
    case("raw unsound", "flux", ("instantx", {"family": "raw"}))
    weight.data = kept
    for name, model in models.items():
        weights = dict(model.state_dict())
        save_file(
            {k: v.contiguous() for k, v in weights.items() if "mod_proj" not in k}, folder / f"{name}.safetensors"
        )
    save_file({k: v.contiguous() for k, v in INPUTS.items()}, folder / "inputs.safetensors")
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    shapes = {"width": WIDTH, "heads": HEADS, "double": DOUBLE, "single": SINGLE, "text": TEXT_DIM, "pooled": POOLED}
    (folder / "shapes.json").write_text(json.dumps({**shapes, "sigma": SIGMA, "guidance": GUIDANCE}))
    text = INPUTS["positive"]
    return {
        name: float((by_diffusers(model, files["xlabs"], x, text, features[:1], 0.7) - expected[f"{name} xlabs/positive"]).abs().max())
        for name, model in models.items()
    }  # fmt: skip
