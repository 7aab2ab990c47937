"""What SD3.5 predicts with image prompts, by the formula written into diffusers' tiny transformers.

``build(folder)`` writes the models' weights under their original names, the adapters' files, inputs, and every case's
prediction for sd3_parity.py, which runs the same in a ComfyUI. Tokens are those of diffusers' own IPAdapterTimeImageProjection;
``by_diffusers`` runs its whole adapter, with which the formula here is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from tiny_flux import randomised

HEADS, HEAD, TEXT_DIM, POOLED, BLOCKS = 3, 64, 32, 24, 3
WIDTH = HEADS * HEAD
FEATURE, SEEN, QUERIES, INNER, TIMES, DEPTH = 12, 7, 5, 128, 32, 4
"""Width of a picture's hidden states and their number; queries, width, sinusoids and layers of the resampler."""
SIGMA, LATER = 0.6, 0.35
ROWS, COLUMNS = 5, 3
CONFIG: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": BLOCKS, "attention_head_dim": HEAD,
    "num_attention_heads": HEADS, "joint_attention_dim": TEXT_DIM, "caption_projection_dim": WIDTH,
    "pooled_projection_dim": POOLED, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
}  # fmt: skip


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sd35(*, medium: bool = False) -> Any:
    dual = {"dual_attention_layers": (0, 1)} if medium else {}
    return randomised(SD3Transformer2DModel(**CONFIG, **dual), 5 if medium else 3)


def original(model: Any) -> dict[str, Tensor]:
    """The weights under the names of the released files (diffusers' convert_sd3_to_diffusers.py, backwards)."""
    state, found = dict(model.state_dict()), dict[str, Tensor]()

    def take(to: str, *names: str, halves_swapped: bool = False) -> None:
        for end in ("weight", "bias"):
            parts = [state[f"{name}.{end}"] for name in names if f"{name}.{end}" in state]
            if parts:
                joined = torch.cat(parts)
                found[f"{to}.{end}"] = torch.cat(joined.chunk(2)[::-1]) if halves_swapped else joined

    for i in range(BLOCKS):
        theirs, block, last = f"transformer_blocks.{i}", f"joint_blocks.{i}", i == BLOCKS - 1
        for name in ("attn", "attn2"):
            ours = f"{block}.x_block.{name}"
            take(f"{ours}.qkv", *(f"{theirs}.{name}.to_{p}" for p in "qkv"))
            take(f"{ours}.proj", f"{theirs}.{name}.to_out.0")
            take(f"{ours}.ln_q", f"{theirs}.{name}.norm_q")
            take(f"{ours}.ln_k", f"{theirs}.{name}.norm_k")
        context = f"{block}.context_block"
        take(f"{context}.attn.qkv", *(f"{theirs}.attn.add_{p}_proj" for p in "qkv"))
        take(f"{context}.attn.proj", f"{theirs}.attn.to_add_out")
        take(f"{context}.attn.ln_q", f"{theirs}.attn.norm_added_q")
        take(f"{context}.attn.ln_k", f"{theirs}.attn.norm_added_k")
        take(f"{block}.x_block.adaLN_modulation.1", f"{theirs}.norm1.linear")
        take(f"{context}.adaLN_modulation.1", f"{theirs}.norm1_context.linear", halves_swapped=last)
        for side, ff in ((f"{block}.x_block", "ff"), (context, "ff_context")):
            take(f"{side}.mlp.fc1", f"{theirs}.{ff}.net.0.proj")
            take(f"{side}.mlp.fc2", f"{theirs}.{ff}.net.2")
    for i, layer in ((0, "linear_1"), (2, "linear_2")):
        take(f"t_embedder.mlp.{i}", f"time_text_embed.timestep_embedder.{layer}")
        take(f"y_embedder.mlp.{i}", f"time_text_embed.text_embedder.{layer}")
    take("context_embedder", "context_embedder")
    take("x_embedder.proj", "pos_embed.proj")
    take("final_layer.linear", "proj_out")
    take("final_layer.adaLN_modulation.1", "norm_out.linear", halves_swapped=True)
    return found | {"pos_embed": state["pos_embed.pos_embed"]}


# --- adapters ----------------------------------------------------------------------------------------------------------


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of InstantX/SD3.5-Large-IP-Adapter, in these sizes."""
    yield "image_proj.latents", (1, QUERIES, INNER)
    yield from _layer("image_proj.proj_in", INNER, FEATURE)
    yield from _layer("image_proj.proj_out", WIDTH, INNER)
    yield from _norm("image_proj.norm_out", WIDTH)
    yield from _layer("image_proj.time_embedding.linear_1", INNER, TIMES)
    yield from _layer("image_proj.time_embedding.linear_2", INNER, INNER)
    for i in range(DEPTH):
        stem = f"image_proj.layers.{i}"
        yield from _norm(f"{stem}.0.norm1", INNER)
        yield from _norm(f"{stem}.0.norm2", INNER)
        yield f"{stem}.0.to_q.weight", (INNER, INNER)
        yield f"{stem}.0.to_kv.weight", (2 * INNER, INNER)
        yield f"{stem}.0.to_out.weight", (INNER, INNER)
        yield from _norm(f"{stem}.1.0", INNER)
        yield f"{stem}.1.1.weight", (4 * INNER, INNER)
        yield f"{stem}.1.3.weight", (INNER, 4 * INNER)
        yield from _layer(f"{stem}.2.1", 4 * INNER, INNER)
    for i in range(BLOCKS):
        yield f"ip_adapter.{i}.to_k_ip.weight", (WIDTH, WIDTH)
        yield f"ip_adapter.{i}.to_v_ip.weight", (WIDTH, WIDTH)
        yield from _layer(f"ip_adapter.{i}.norm_ip.linear", 2 * WIDTH, INNER)
        for name in ("norm_q", "norm_k", "norm_ip_k"):
            yield f"ip_adapter.{i}.{name}.weight", (HEAD,)


def _layer(stem: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{stem}.weight", (rows, columns)
    yield f"{stem}.bias", (rows,)


def _norm(stem: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{stem}.weight", (width,)
    yield f"{stem}.bias", (width,)


def adapter_file(seed: int) -> dict[str, Tensor]:
    """Random numbers; norms of the adapter's own far from the model's."""
    state: dict[str, Tensor] = {}
    for i, (key, shape) in enumerate(shapes()):
        drawn = numbers(*shape, seed=seed + i)
        if len(shape) > 1:
            state[key] = drawn / shape[-1] ** 0.5
        else:
            is_norm = "norm" in key and key.endswith("weight")
            state[key] = (1.2 if is_norm else 0.0) + 0.3 * drawn
    return state


def parts(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {
        group: {
            key.removeprefix(f"{group}."): tensor.clone()
            for key, tensor in state.items()
            if key.startswith(f"{group}.")
        }
        for group in ("image_proj", "ip_adapter")
    }


@dataclass
class Adapter:
    """One image prompt in a formula: hidden states ``b t e`` of its picture, and a mask of the picture's tokens."""

    state: dict[str, Tensor]
    features: Tensor
    scale: float
    mask: Tensor | None = None
    tokens: Tensor | None = None
    embedding: Tensor | None = None

    def prepare(self, model: Any, timestep: Tensor) -> None:
        projector = model._convert_ip_adapter_image_proj_to_diffusers(
            parts(self.state)["image_proj"], low_cpu_mem_usage=False
        )
        self.tokens, self.embedding = projector.eval()(self.features, timestep)

    def added(self, layer: int, raw: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
        """What is added to the picture's tokens, whose raw queries, keys and values ``b l h d`` these are."""
        stem = f"ip_adapter.{layer}."
        of = {key.removeprefix(stem): tensor for key, tensor in self.state.items() if key.startswith(stem)}
        shift, scale = F.linear(F.silu(self.embedding), of["norm_ip.linear.weight"], of["norm_ip.linear.bias"])[:, None].chunk(2, -1)  # fmt: skip
        tokens = F.layer_norm(self.tokens, (WIDTH,), eps=1e-6) * (1 + scale) + shift
        k, v = (split(F.linear(tokens, of[f"to_{p}_ip.weight"])) for p in "kv")
        keys = torch.cat([rms(own_k) * of["norm_k.weight"], rms(k) * of["norm_ip_k.weight"]], 1)
        out = attend(rms(raw) * of["norm_q.weight"], keys, torch.cat([own_v, v], 1))
        return self.scale * out * (1.0 if self.mask is None else self.mask)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, HEAD))


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)


@dataclass
class Steered:
    """The attention processor of a joint block with image prompts."""

    layer: int
    adapters: list[Adapter]

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Any = None) -> Any:  # fmt: skip
        raw, raw_k, own_v = (split(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        more = [split(layer(encoder_hidden_states)) for layer in layers]
        more[0], more[1] = attn.norm_added_q(more[0]), attn.norm_added_k(more[1])
        own = (attn.norm_q(raw), attn.norm_k(raw_k), own_v)
        out = attend(*(torch.cat(pair, 1) for pair in zip(own, more, strict=True)))
        picture = hidden_states.shape[1]
        out, text = out[:, :picture], out[:, picture:]
        for adapter in self.adapters:
            out = out + adapter.added(self.layer, raw, raw_k, own_v)
        return attn.to_out[0](out), text if attn.context_pre_only else attn.to_add_out(text)


def predict(model: Any, x: Tensor, text: Tensor, adapters: list[Adapter], sigma: float = SIGMA) -> Tensor:
    """The velocity for latents ``b 16 h w``."""
    timestep = torch.full((len(x),), 1000 * sigma)
    before = dict(model.attn_processors)
    with torch.no_grad():
        for adapter in adapters:
            adapter.prepare(model, timestep)
        steered = {f"transformer_blocks.{i}.attn.processor": Steered(i, adapters) for i in range(BLOCKS)}
        model.set_attn_processor(before | steered)
        pooled = numbers(1, POOLED, seed=9).expand(len(x), -1)
        out = model(x, text.expand(len(x), -1, -1), pooled, timestep).sample
    model.set_attn_processor(before)
    return out


def by_diffusers(model: Any, state: dict[str, Tensor], x: Tensor, text: Tensor, features: Tensor, scale: float) -> Tensor:  # fmt: skip
    """diffusers' own adapter, which stays on the model."""
    model._load_ip_adapter_weights(parts(state), low_cpu_mem_usage=False)
    for processor in model.attn_processors.values():
        processor.scale = scale
    with torch.no_grad():
        out = model(
            x, text.expand(len(x), -1, -1), numbers(1, POOLED, seed=9).expand(len(x), -1), torch.full((len(x),), 1000 * SIGMA),
            joint_attention_kwargs={"ip_adapter_image_embeds": features.expand(len(x), -1, -1)},
        ).sample  # fmt: skip
    return out


# --- cases -------------------------------------------------------------------------------------------------------------

INPUTS = {
    "x": numbers(2, 16, 2 * ROWS, 2 * COLUMNS, seed=5),
    "positive": numbers(1, 7, TEXT_DIM, seed=6),
    "negative": numbers(1, 7, TEXT_DIM, seed=7),
    "longer": numbers(1, 9, TEXT_DIM, seed=8),
    "pooled": numbers(1, POOLED, seed=9),
    "features": numbers(2, SEEN, FEATURE, seed=10),
    "neutral": torch.zeros(1, SEEN, FEATURE),
    "mask": torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(12)),
}


def build(folder: Path) -> float:
    """Write everything; returns how far diffusers' own adapter and the formula here are apart."""
    files = {"instantx": adapter_file(100), "other": adapter_file(600)}
    for name, state in files.items():
        save_file(state, folder / f"{name}.safetensors")
    models = {"large": sd35(), "medium": sd35(medium=True)}
    for name, model in models.items():
        save_file(original(model), folder / f"{name}.safetensors")
    x, features, neutral = INPUTS["x"], INPUTS["features"], INPUTS["neutral"]
    mask = INPUTS["mask"].flatten()[None, :, None]
    expected: dict[str, Tensor] = {}

    def case(name: str, *given: dict[str, Any], model: str = "large", texts: dict[str, str] | None = None, branches: tuple[str, ...] = ("positive", "negative"), crop: Any = (), sigma: float = SIGMA) -> None:  # fmt: skip
        for branch in branches:
            adapters: list[Adapter] = []
            for file, scale, mask, each in map(_given, given):
                feature = neutral if branch == "negative" else features if each else features[:1]
                adapters.append(Adapter(files[file], feature.expand(len(x), -1, -1), scale, mask))
            text = INPUTS[(texts or {}).get(branch, branch)]
            expected[f"{name}/{branch}"] = predict(models[model], x[crop], text, adapters, sigma)

    for model in models:
        case(f"{model} plain", model=model)
        case(f"{model} instantx", {}, model=model)
    case("apart", {}, texts={"negative": "longer"})
    case("each", {"each": True})
    case("mask", {"mask": mask})
    case("later", {}, sigma=LATER)
    case("two", {"mask": mask}, {"file": "other", "scale": -0.4})
    corner = (..., slice(2, 8), slice(2, 6))
    case("area", {"mask": INPUTS["mask"][1:4, 1:3].flatten()[None, :, None]}, branches=("positive",), crop=corner)
    broken = [models["large"].transformer_blocks[0].attn.norm_q, models["large"].transformer_blocks[1].attn.norm_k]
    kept = [norm.weight.data.clone() for norm in broken]
    for norm in broken:
        norm.weight.data[3] = 1e-9
    case("unsound", {})
    for norm, weight in zip(broken, kept, strict=True):
        norm.weight.data = weight
    save_file({k: v.contiguous() for k, v in INPUTS.items()}, folder / "inputs.safetensors")
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    sizes = {"heads": HEADS, "blocks": BLOCKS, "text": TEXT_DIM, "pooled": POOLED, "width": WIDTH}
    (folder / "shapes.json").write_text(json.dumps({**sizes, "sigma": SIGMA, "later": LATER}))
    theirs = by_diffusers(models["large"], files["instantx"], x, INPUTS["positive"], features[:1], 0.7)
    return float((theirs - expected["large instantx/positive"]).abs().max())


def _given(how: dict[str, Any]) -> tuple[str, float, Tensor | None, bool]:
    return how.get("file", "instantx"), how.get("scale", 0.7), how.get("mask"), how.get("each", False)
