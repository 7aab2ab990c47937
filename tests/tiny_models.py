"""Tiny UNets of random weights with the real topologies, and the least of a ComfyUI that calls the backend as the host does.

What ComfyUI does was read in comfy/samplers.py, comfy/model_patcher.py, comfy/patcher_extension.py,
comfy/ldm/modules/attention.py and .../openaimodel.py of 0.33.0 and 0.3.64; tests/host proves the same in the real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import tiny_anima
import tiny_sd3
from ipadapter_core import AdapterWeights, ImagePrompt, load_adapter
from ipadapter_core.checkpoints.base import Base
from ipadapter_core.checkpoints.format import Format
from ipadapter_core.models.anima import walk_anima
from ipadapter_core.models.chroma import walk_chroma
from ipadapter_core.models.flux import walk_flux
from ipadapter_core.models.reach import Reach, every, sites_in
from ipadapter_core.models.sd3 import walk_sd3
from ipadapter_core.models.sites import ModelLayout, Walk
from ipadapter_core.models.unet import down_up_middle, walk_unet
from tiny import tiny_state
from tiny_flux import call_packed, comfy_chroma, comfy_flux, diffusers_chroma, diffusers_flux
from tiny_sd3 import call_sd3, comfy_sd3, diffusers_sd3

TOKEN_DIM = 32
FEATURE_DIM = 24
SD15 = "sd15"
SDXL = "sdxl"

# --- diffusers ---------------------------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    SD15: {"layers_per_block": 2, "block_out_channels": (8, 16, 16, 16), "attention_head_dim": 2},
    SDXL: {
        "layers_per_block": 2,
        "block_out_channels": (8, 8, 16),
        "attention_head_dim": (1, 2, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    },
    "small": {
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "one site": {
        "layers_per_block": 1,
        "block_out_channels": (8,),
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    },
}


def tiny_unet(kind: str = SD15, *, seed: int = 1, **changes: Any) -> UNet2DConditionModel:
    """A diffusers UNet in the shape of SD1.5 (16 sites) or SDXL (70), or small (4) or with one site; the same seed, the same weights."""
    return copy.deepcopy(_template(kind, seed, tuple(changes.items())))  # a copy is built 4 times faster than a UNet


@cache
def _template(kind: str, seed: int, changes: tuple[tuple[str, Any], ...]) -> UNet2DConditionModel:
    config = {"sample_size": 16, "norm_num_groups": 4, "cross_attention_dim": TOKEN_DIM} | CONFIGS[kind] | dict(changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(in_channels=4, out_channels=4, **config).eval().requires_grad_(False)


def call_unet(unet: UNet2DConditionModel, x: Tensor, context: Tensor, t: float = 500.0, **extra: Any) -> Tensor:
    """One denoising call with whatever else the kind of UNet asks for."""
    added = dict(extra.pop("added_cond_kwargs", {}))
    if unet.config.addition_embed_type == "text_time":
        b = x.shape[0]
        added |= {"text_embeds": torch.zeros(b, 8), "time_ids": torch.arange(6.0).repeat(b, 1)}
    with torch.no_grad():
        return unet(x, torch.tensor(t), context, added_cond_kwargs=added, **extra).sample


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- adapters and prompts ------------------------------------------------------------------------------------------


def checkpoint_channels(layout: ModelLayout) -> tuple[int, ...]:
    return tuple(layout.sites[i].channels for i in down_up_middle(layout))


def adapter_state(family: str, layout: ModelLayout, *, seed: int = 0, **sizes: Any) -> dict[str, Tensor]:
    """An adapter file that fits the layout, in sizes that diffusers' loader accepts (it knows depth 4 and no other)."""
    own = {"plus": {"depth": 4, "num_tokens": 16}, "full-face": {"hidden_dim": FEATURE_DIM}}.get(family, {})
    sizes = (
        {"token_dim": layout.token_dim, "feature_dim": FEATURE_DIM, "channels": checkpoint_channels(layout)}
        | own
        | sizes
    )
    return tiny_state(family, seed=seed, **sizes)


def tiny_adapter(layout: ModelLayout, family: str = "base", *, seed: int = 0, **sizes: Any) -> AdapterWeights:
    return load_adapter(adapter_state(family, layout, seed=seed, **sizes), name=f"tiny {family} {seed}")


def tiny_prompt(adapter: AdapterWeights, *, seed: int = 0, latents: int = 1, tokens: int = 5) -> ImagePrompt:
    """A prompt of random features, its unconditional made of zeros; ``tokens`` is what an encoder gives besides embeds."""
    shape = (latents, FEATURE_DIM) if adapter.spec.format.feature.rank == 2 else (latents, tokens, FEATURE_DIM)
    features = noise(*shape, seed=100 + seed)
    with torch.no_grad():
        cond, uncond = adapter.tokens(features), adapter.tokens(torch.zeros_like(features))
    return ImagePrompt(
        cond,
        uncond,
        features[:, None],
        torch.zeros_like(features)[:, None],
        adapter.name,
        "none",
        adapter.spec.token_dim,
    )


# --- an LDM UNet as ComfyUI has it -----------------------------------------------------------------------------------


def host_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    """The host's optimized_attention: ``b l c``, heads split inside, more groups of tokens than queries are no matter here."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(
            host_attention(q, k, v, self.heads, attn_precision=None, transformer_options=transformer_options)
        )


class BasicTransformerBlock(nn.Module):
    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads)
        self.attn2 = CrossAttention(channels, context_dim, heads)
        self.ff = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        extra = {k: v for k, v in transformer_options.items() if k not in ("patches", "patches_replace")}
        extra |= {"n_heads": self.attn2.heads, "dim_head": x.shape[-1] // self.attn2.heads, "attn_precision": None}
        n = self.norm1(x)
        x = x + self.attn1(n, n, transformer_options)
        n = self.norm2(x)
        replace = transformer_options.get("patches_replace", {}).get("attn2", {})
        block = transformer_options["block"]
        key = (*block, transformer_options["block_index"])
        if key not in replace:  # a three-part key beats a two-part one
            key = block
        if key in replace:
            q, k, v = self.attn2.to_q(n), self.attn2.to_k(context), self.attn2.to_v(context)
            n = self.attn2.to_out(replace[key](q, k, v, extra))
        else:
            n = self.attn2(n, context, transformer_options)
        x = x + n
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context_dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.proj_in, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads) for _ in range(depth)
        )

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        transformer_options["activations_shape"] = list(x.shape)
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.transformer_blocks):
            transformer_options["block_index"] = i
            h = block(h, context, transformer_options)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, in_channels)
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.emb = nn.Linear(8, channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x))) + self.emb(emb)[..., None, None]


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(x, size=tuple(size)))


LDM: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]] = {
    # channels and transformer depth per level, depth in the middle, heads per level: the same sites as CONFIGS
    SD15: ((8, 16, 16, 16), (1, 1, 1, 0), 1, (2, 2, 2, 2)),
    SDXL: ((8, 8, 16), (0, 2, 10), 10, (1, 2, 4)),
    "small": ((8, 8), (1, 1), 1, (2, 2)),
}


class LdmUNet(nn.Module):
    """``input_blocks``, ``middle_block`` and ``output_blocks`` as in openaimodel.py, two res blocks per level (one if small)."""

    def __init__(self, kind: str = "small") -> None:
        super().__init__()
        channels, depths, middle, heads = LDM[kind]
        res_blocks = 1 if kind == "small" else 2
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, channels[0], 3, padding=1)])])
        skips, current = [channels[0]], channels[0]
        for level, (c, depth) in enumerate(zip(channels, depths, strict=True)):
            for _ in range(res_blocks):
                self.input_blocks.append(self._block(current, c, depth, heads[level]))
                current = c
                skips.append(c)
            if level < len(channels) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(c)]))
                skips.append(c)
        self.middle_block = nn.ModuleList(
            [*self._block(current, current, middle, heads[-1]), ResBlock(current, current)]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for i in range(res_blocks + 1):
                block = self._block(current + skips.pop(), channels[level], depths[level], heads[level])
                current = channels[level]
                if level and i == res_blocks:
                    block.append(Upsample(current))
                self.output_blocks.append(block)
        self.out = nn.Conv2d(current, 4, 3, padding=1)

    @staticmethod
    def _block(in_channels: int, channels: int, depth: int, heads: int) -> nn.ModuleList:
        block = nn.ModuleList([ResBlock(in_channels, channels)])
        if depth:
            block.append(SpatialTransformer(channels, TOKEN_DIM, heads, depth))
        return block

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        transformer_options["original_shape"] = list(x.shape)
        emb = torch.sin(timesteps[:, None] * 0.01 + torch.arange(8.0))
        skips: list[Tensor] = []

        def run(block: Any, name: str, number: int, h: Tensor, size: Sequence[int] = ()) -> Tensor:
            transformer_options["block"] = (name, number)
            for layer in block:
                if isinstance(layer, ResBlock):
                    h = layer(h, emb)
                elif isinstance(layer, SpatialTransformer):
                    h = layer(h, context, transformer_options)
                else:
                    h = layer(h, size) if isinstance(layer, Upsample) else layer(h)
            return h

        h = x
        for number, block in enumerate(self.input_blocks):
            h = run(block, "input", number, h)
            skips.append(h)
        h = run(self.middle_block, "middle", 0, h)
        for number, block in enumerate(self.output_blocks):
            h = torch.cat([h, skips.pop()], 1)
            h = run(block, "output", number, h, skips[-1].shape[-2:] if skips else ())
        return self.out(h)


# --- the least of ComfyUI ----------------------------------------------------------------------------------------------


class Sampling:
    """ModelSamplingDiscrete with SD's schedule."""

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        kept = torch.cumprod(1 - betas, 0)
        self.log_sigmas = (((1 - kept) / kept) ** 0.5).log().float()

    def sigma(self, t: Tensor) -> Tensor:
        t = t.clamp(0, 999)
        low, high = t.floor().long(), t.ceil().long()
        w = t.frac()
        return ((1 - w) * self.log_sigmas[low] + w * self.log_sigmas[high]).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log() - self.log_sigmas[:, None]).abs().argmin(0).view(sigma.shape)

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0:
            return 999999999.9
        if percent >= 1:
            return 0.0
        return self.sigma(torch.tensor((1 - percent) * 999.0)).item()


class HostModel(nn.Module):
    """The host's model around a UNet; ``calls`` keeps what each call of the UNet consisted of."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = unet
        self.model_sampling = Sampling()
        self.calls: list[list[int]] = []

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        self.calls.append(transformer_options["cond_or_uncond"])
        with torch.no_grad():
            return self.diffusion_model(x, t, c_crossattn, transformer_options=transformer_options.copy())


def _copy_lists_and_dicts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy_lists_and_dicts(item) for key, item in value.items()}
    return [_copy_lists_and_dicts(item) for item in value] if isinstance(value, list) else value


class FakePatcher:
    """A duck of ModelPatcher. Clones copy dicts and lists and share everything else (0.13 and later), or deep-copy (before)."""

    def __init__(self, model: nn.Module, *, deepcopy_options: bool = False) -> None:
        self.model = model
        self.deepcopy_options = deepcopy_options
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}
        self.patches: dict[str, list[Any]] = {}

    def clone(self) -> FakePatcher:
        clone = FakePatcher(self.model, deepcopy_options=self.deepcopy_options)
        copied = copy.deepcopy if self.deepcopy_options else _copy_lists_and_dicts
        clone.model_options = copied(self.model_options)
        clone.wrappers = {kind: {key: list(w) for key, w in keys.items()} for kind, keys in self.wrappers.items()}
        clone.patches = {key: list(entries) for key, entries in self.patches.items()}
        return clone

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> None:
        known = self.model.state_dict()
        for key, patch in patches.items():
            assert key in known, key
            self.patches.setdefault(key, []).append((strength_patch, patch, strength_model, None, None))

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def set_model_attn2_replace(
        self, patch: object, block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        self.set_model_patch_replace(patch, "attn2", block_name, number, transformer_index)

    def set_model_patch_replace(
        self, patch: object, name: str, block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        options = self.model_options["transformer_options"] = self.model_options["transformer_options"].copy()
        replace = options["patches_replace"] = options.get("patches_replace", {}).copy()
        slots = replace[name] = replace.get(name, {}).copy()
        slots[(block_name, number) if transformer_index is None else (block_name, number, transformer_index)] = patch

    def set_model_patch(self, patch: object, name: str) -> None:
        options = self.model_options["transformer_options"] = self.model_options["transformer_options"].copy()
        lists = options["patches"] = options.get("patches", {}).copy()
        lists[name] = [*lists.get(name, []), patch]

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None:
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    @property
    def slots(self) -> dict[tuple[Any, ...], Any]:
        """What sits in the attn2 slots."""
        return self.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})


class Executor:
    """patcher_extension.WrapperExecutor: calls the wrappers in turn, then the original."""

    def __init__(
        self, original: Callable[..., Any], owner: object, wrappers: Mapping[str, list[Any]] | Sequence[Any]
    ) -> None:
        self.original, self.class_obj = original, owner
        self.wrappers = [w for ws in wrappers.values() for w in ws] if isinstance(wrappers, Mapping) else list(wrappers)

    def __call__(self, *args: Any) -> Any:
        if not self.wrappers:
            return self.original(*args)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args)


_ids = count()


def conditioning(context: Tensor, area: tuple[int, int, int, int] | None = None, **more: Any) -> dict[str, Any]:
    """One processed conditioning entry ``1|b n d``; area in latents: height, width, top, left."""
    return {"context": context, "uuid": f"uuid {next(_ids)}", **({} if area is None else {"area": area}), **more}


class Guider:
    """CFGGuider up to the point where predictions are mixed: returns the prediction of every conditioning by its name.

    ``order`` is the order in which the guider hands them to calc_cond_batch; ``chunks`` how many fit into one model
    call, as free memory decides in the host, which takes them from the last to the first.
    """

    def __init__(
        self,
        patcher: FakePatcher,
        conds: dict[str, list[dict[str, Any]] | None],
        order: Sequence[str] = ("positive", "negative"),
        *,
        chunks: int = 8,
        wrapped: bool = True,
    ) -> None:
        self.patcher, self.conds, self.order, self.chunks, self.wrapped = patcher, conds, order, chunks, wrapped
        self.inner_model = patcher.model

    def __call__(self, x: Tensor, percent: float = 0.5) -> dict[str, Tensor]:
        sampling: Any = self.inner_model.model_sampling
        sigma = sampling.sigma(torch.tensor((1 - percent) * 999.0)).expand(x.shape[0])
        wrappers = self.patcher.wrappers.get("predict_noise", {}) if self.wrapped else {}
        outputs = Executor(self.predict_noise, self, wrappers)(x, sigma, self.patcher.model_options, 0)
        return dict(zip(self.order, outputs, strict=True))

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any) -> list[Tensor]:
        wrappers = self.patcher.wrappers.get("calc_cond_batch", {}) if self.wrapped else {}
        conds = [self.conds.get(name) for name in self.order]
        return Executor(self._calc_cond_batch, None, wrappers)(self.inner_model, conds, x, timestep, model_options)

    def _calc_cond_batch(
        self, model: Any, conds: Sequence[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> list[Tensor]:
        sums = [torch.zeros_like(x) for _ in conds]
        counts = [torch.full_like(x, 1e-37) for _ in conds]
        to_run = [(entry, i) for i, entries in enumerate(conds) for entry in entries or ()]
        while to_run:
            first = _shape(to_run[0][0], x)
            alike = [n for n, (entry, _) in enumerate(to_run) if _shape(entry, x) == first][::-1]
            batch = [to_run.pop(n) for n in alike[: self.chunks]]
            options = dict(model_options["transformer_options"])
            options["cond_or_uncond"] = [i for _, i in batch]
            options["uuids"] = [entry["uuid"] for entry, _ in batch]
            options["sigmas"] = timestep
            inputs = torch.cat([_crop(x, entry.get("area")) for entry, _ in batch])
            context = torch.cat([entry["context"].expand(x.shape[0], -1, -1) for entry, _ in batch])
            kept = self.patcher.wrappers.get("apply_model", {}) if self.wrapped else {}
            called = Executor(
                lambda x, t, concat, text, control, options: model.apply_model(x, t, text, options), model, kept
            )(inputs, timestep.repeat(len(batch)), None, context, None, options)
            outputs = called.chunk(len(batch))
            for (entry, i), output in zip(batch, outputs, strict=True):
                _crop(sums[i], entry.get("area")).add_(output)
                _crop(counts[i], entry.get("area")).add_(1)
        return [total / n for total, n in zip(sums, counts, strict=True)]


def _crop(x: Tensor, area: tuple[int, int, int, int] | None) -> Tensor:
    if area is None:
        return x
    height, width, top, left = area
    return x[..., top : top + height, left : left + width]


def _shape(entry: dict[str, Any], x: Tensor) -> tuple[int, ...]:
    return (*_crop(x, entry.get("area")).shape, entry["context"].shape[1])


def tiny_host(kind: str = "small", *, seed: int = 1, deepcopy_options: bool = False) -> FakePatcher:
    """A patched-model socket of a fake ComfyUI around an LDM UNet; the same seed, the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = LdmUNet(kind).eval().requires_grad_(False)
    return FakePatcher(HostModel(unet), deepcopy_options=deepcopy_options)


# --- one tiny model for every kind of base model -----------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A kind of base model in both hosts' forms, with latents of 4 channels and text tokens ``TOKEN_DIM`` wide.

    It pads sizes that its patches do not divide, as the hosts' own models do. ComfyUI's is called
    ``(x, timesteps, context, transformer_options=)``, diffusers' ``(x, timestep, text)``, or as ``call`` does with the model
    before them. ``format`` is the family of adapters that acts in it, None for the first, which acts on the projected query at
    every site. ``families`` are those whose files people have for it, with sizes that the model asks for.
    """

    comfy: Callable[[], nn.Module]
    diffusers: Callable[[], nn.Module]
    format: Format | None = None
    call: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None = None
    families: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])


class AtEverySite(Base):
    """Image tokens at every attention of a transformer: the normed query, added before the output projection (as InstantX)."""

    name = "every site"
    reach = Reach(every, query="normed", span="all")


class BehindDoubleBlocks(Base):
    """Image tokens at double blocks alone, added to the picture's stream behind the block (as XLabs)."""

    name = "double blocks"
    reach = Reach(sites_in("double"), query="normed", join="residual")


class TimedWithOwnKeys(Base):
    """The picture's own keys and the image's in one softmax, behind norms of the adapter's own, at every timestep anew (as SD3.5)."""

    name = "own keys"
    reach = Reach(every, query="raw", own_keys=True, timed=True, text_wide=False)

    def tokens_at(self, projector: nn.Module, constant: Tensor, timestep: float) -> Tensor:
        return constant * (1 + timestep / 1000)

    def query_weight(self, module: Any, index: int) -> Tensor:
        return 1 + 0.3 * noise(HEAD_WIDTH, seed=40 + index)

    def self_weight(self, module: Any, index: int) -> Tensor:
        return 1 + 0.3 * noise(HEAD_WIDTH, seed=50 + index)


class GatedBehindBlocks(Base):
    """Image tokens behind every block, through a gate of the block's conditioning (as Anima's character reference)."""

    name = "gated"
    reach = Reach(every, query="normed", join="residual", gated=True, text_wide=False)

    def gate(self, module: Any, index: int) -> Callable[[Tensor], Tensor]:
        weight = noise(tiny_anima.WIDTH, tiny_anima.WIDTH, seed=60 + index) / tiny_anima.WIDTH**0.5
        return lambda emb: F.silu(emb) @ weight.to(emb)


def no_such_model() -> nn.Module:
    raise NotImplementedError("diffusers has no such model")


HEAD_WIDTH = tiny_sd3.WIDTH // tiny_sd3.HEADS
FLUX_FAMILIES: Mapping[str, Mapping[str, int]] = {"xlabs": {}, "instantx": {}, "instantcharacter": {}}
ANIMA_FAMILIES = {"anima-character": {"token_dim": FEATURE_DIM, "hidden_dim": tiny_anima.WIDTH}, "anima-pe": {}}
TINY: dict[Walk | None, Tiny] = {
    walk_unet: Tiny(lambda: tiny_host().model.diffusion_model, lambda: tiny_unet("small")),
    walk_flux: Tiny(comfy_flux, diffusers_flux, AtEverySite(), call_packed, FLUX_FAMILIES),
    walk_chroma: Tiny(lambda: comfy_chroma(newer=False), diffusers_chroma, BehindDoubleBlocks(), call_packed),
    walk_sd3: Tiny(
        lambda: comfy_sd3(medium=True), lambda: diffusers_sd3(medium=True), TimedWithOwnKeys(), call_sd3, {"sd3.5": {}}
    ),
    walk_anima: Tiny(tiny_anima.comfy_anima, no_such_model, GatedBehindBlocks(), None, ANIMA_FAMILIES),
}
"""By the walk that finds a model's sites; ``test_invariants`` runs all of them on both hosts."""
