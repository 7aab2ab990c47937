"""Train the demo world's IP-Adapters: ``python -m ipadapter_core.demo.train_adapters base --pictures … --world …``.

The recipe is the original's (frozen UNet; projector, ``to_k_ip`` and ``to_v_ip`` learn; image, text and both dropped in
5 % of the cases each) with one addition: in half of the pairs the reference stands on another background than the target
and the caption names the target's, so that the adapter learns to leave the background to the text where text speaks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..attention import split_heads
from ..checkpoints import load_adapter, save_adapter
from ..image_encoder import CLIP_MEAN, CLIP_STD, TransformersImageEncoder
from ..processors import IPAttnProcessor, build_processors
from ..projectors import ImageProjModel, Resampler
from .pictures import BACKGROUNDS, Pictures, caption, colour_table, load_pictures, on_background, place, recolour
from .train_world import build_scheduler, encode, fit, sample, save_sheet, tokenize, velocity_loss

DROP = 0.05
"""Share of pairs without image, without text, and without both (tencent tutorial_train.py)."""
MARK = 1.5
GRID_SHARPNESS = 3.0


class TrainedAdapter(nn.Module):
    """The trainable part: projector and one ``to_k_ip``/``to_v_ip`` per cross-attention, keyed as released files."""

    def __init__(self, projector: nn.Module, unet: UNet2DConditionModel, num_tokens: int) -> None:
        super().__init__()
        self.projector = projector
        processors = build_processors(unet, num_tokens=num_tokens, init="zero_v")
        self.layers = nn.ModuleList(processors.values())
        self.names = list(processors)

    def checkpoint(self) -> dict[str, Tensor]:
        state = {f"image_proj.{key}": value for key, value in self.projector.state_dict().items()}
        return state | {f"ip_adapter.{key}": value for key, value in self.layers.state_dict().items()}


class MatmulIPAttention(nn.Module):
    """IPAttnProcessor's maths with plain matmuls: torch's CPU flash attention is slow in bfloat16 backward.

    ``gate`` ``b 1 1`` is a strength per sample; None is 1.
    """

    gate: Tensor | None = None

    def __init__(self, inner: IPAttnProcessor) -> None:
        super().__init__()
        self.inner = inner

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        n = self.inner.num_tokens
        text, image = encoder_hidden_states[:, :-n], encoder_hidden_states[:, -n:]
        q = split_heads(attn.to_q(hidden_states), attn.heads)

        def attend(k: Tensor, v: Tensor) -> Tensor:
            weights = (q @ split_heads(k, attn.heads).transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            return (weights.to(v.dtype) @ split_heads(v, attn.heads)).transpose(1, 2).flatten(2)

        base = attend(attn.to_k(text), attn.to_v(text))
        added = attend(self.inner.to_k_ip(image), self.inner.to_v_ip(image))
        return attn.to_out[0](base + (added if self.gate is None else added * self.gate.to(added.dtype)))


@torch.no_grad()
def start_on_grid(projector: Resampler, features: Tensor) -> None:
    """Let each of the Resampler's 16 queries read its own sixteenth of the picture from the first step.

    ``features`` ``b 65 c`` are penultimate tokens of many pictures. The mean of a position's tokens over all pictures
    tells the positions apart, so a query that is the mean of its 2×2 positions, seen through the same random matrix as
    the keys, finds them. The queries are keys too and would find themselves: the picture's tokens bear a mark, the
    queries its opposite, and look for the mark. From the usual start all queries read everything alike, and the UNet sees sixteen times the
    same average: colours then follow the picture after some hundred steps, layout not after thousands.
    """
    places = features.mean(0)[1:]
    tokens = features[:, 1:].flatten(0, 1)
    width = projector.proj_in.out_features
    projector.proj_in.weight.copy_(torch.eye(width, tokens.shape[1]) / tokens.std(0))
    projector.proj_in.bias.copy_(-tokens.mean(0)[:width] / tokens.std(0)[:width])
    side = math.isqrt(projector.latents.shape[1])
    cells = rearrange(projector.proj_in(places), "(y i x j) c -> (y x) (i j) c", y=side, x=side, i=2).mean(1)
    projector.latents.copy_(cells[None])
    mark = torch.randn(width).sign() * MARK
    projector.proj_in.bias.add_(mark)
    projector.latents.sub_(mark)
    projector.proj_out.bias.add_(projector.proj_out.weight @ mark)  # what follows need not see it
    flip = torch.eye(width) - 2 * torch.outer(mark, mark) / mark.square().sum()
    for layer in projector.layers:
        attention = cast(Any, layer)[0]
        shared = torch.randn_like(attention.to_q.weight) * GRID_SHARPNESS / width**0.5
        keys, values = attention.to_kv.weight.chunk(2)
        keys.copy_(shared)
        nn.init.orthogonal_(values)
        nn.init.orthogonal_(attention.to_out.weight)
        attention.to_q.weight.copy_(shared @ flip)


@torch.no_grad()
def listen(adapter: TrainedAdapter) -> None:
    """Keys large enough that the sites' heads differ in what they look at, values small enough not to disturb."""
    for layer in adapter.layers:
        if isinstance(layer, IPAttnProcessor):
            layer.to_k_ip.weight.normal_(0, 0.1)
            layer.to_v_ip.weight.normal_(0, 0.02)


def draw_pairs(
    pictures: Pictures, index: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """Reference and target images ``b 3 64 64`` (0..1), captions, and which references are dropped."""
    b = index.shape[0]

    def chance(rate: float) -> Tensor:
        return torch.rand(b, generator=generator) < rate

    recoloured = chance(0.2)
    cutouts = recolour(
        pictures.rgba[index], torch.where(recoloured, torch.rand(b, generator=generator) * 5.0 + 0.6, 0.0)
    )
    reference_cutouts, target_cutouts = place(cutouts, generator), place(cutouts, generator)
    moved = chance(0.15)
    target_cutouts = torch.where(moved[:, None, None, None], target_cutouts, reference_cutouts)
    background = torch.randint(len(BACKGROUNDS), (b,), generator=generator)
    other = (background + torch.randint(1, len(BACKGROUNDS), (b,), generator=generator)) % len(BACKGROUNDS)
    conflict, r = chance(0.5), torch.rand(b, generator=generator)
    no_image, no_text = (r < DROP) | ((r >= 2 * DROP) & (r < 3 * DROP)), (r >= DROP) & (r < 3 * DROP)
    conflict = conflict & ~no_text
    colours = colour_table()
    references = on_background(reference_cutouts, colours[torch.where(conflict, other, background)])
    targets = on_background(target_cutouts, colours[background])
    named, styled, told = chance(0.25) & ~recoloured, chance(0.2) & ~recoloured, conflict | chance(0.2)
    names = list(BACKGROUNDS)
    captions = [
        ""
        if no_text[i]
        else caption(
            pictures.studios[p] if styled[i] else None,
            pictures.names[p] if named[i] else None,
            names[int(background[i])] if told[i] else None,
        )
        for i, p in enumerate(index.tolist())
    ]
    return references, targets, captions, no_image


def train_adapter(
    family: str, pictures: Pictures, world: Path, work: Path, steps: int, batch: int
) -> dict[str, Tensor]:
    """Train one adapter on the world's frozen models; returns the tensors of a flat checkpoint."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(5)
    seen, unseen = pictures.where(held_out=False), pictures.where(held_out=True)
    unet = UNet2DConditionModel.from_pretrained(world / "unet").float().requires_grad_(False)
    unet = unet.to(memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(world / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(world / "text_encoder").float().requires_grad_(False)
    autoencoder = AutoencoderTiny.from_pretrained(world / "vae").float().requires_grad_(False)
    encoder = TransformersImageEncoder.from_pretrained(world / "image_encoder")
    width = unet.config.cross_attention_dim
    if family == "base":
        projector: nn.Module = ImageProjModel(encoder.projection_dim, width, 4)
        num_tokens = 4
    else:
        num_tokens = 16
        projector = Resampler(encoder.hidden_size, width, width, queries=num_tokens, depth=2)
    adapter = TrainedAdapter(projector, unet, num_tokens)
    processors = {
        name: MatmulIPAttention(layer) if isinstance(layer, IPAttnProcessor) else AttnProcessor()
        for name, layer in zip(adapter.names, adapter.layers, strict=True)
    }
    unet.set_attn_processor(cast(Any, processors))
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]

    @torch.no_grad()
    def features(images: Tensor, dropped: Tensor) -> Tensor:
        pixels = (images - mean) / std
        if family == "base":
            return encoder.encode(pixels).image_embeds * ~dropped[:, None]
        return encoder.encode(pixels * ~dropped[:, None, None, None]).penultimate

    def loss(step: int) -> Tensor:
        index = seen[torch.randint(len(seen), (batch,), generator=generator)]
        references, targets, captions, dropped = draw_pairs(pictures, index, generator)
        text = text_encoder(tokenize(tokenizer, captions)).last_hidden_state
        tokens = adapter.projector(features(references, dropped))
        context = torch.cat([text, tokens], 1)
        return velocity_loss(unet, encode(autoencoder, targets), context, scheduler, generator)

    scheduler = build_scheduler()
    shown = torch.cat([unseen[::5][:10], seen[::97][:6]])
    references = on_background(place(pictures.rgba[shown], None), colour_table()[torch.arange(16) % 12])

    def preview(averaged: nn.Module, step: int) -> None:
        kept = {key: value.clone() for key, value in adapter.state_dict().items()}
        adapter.load_state_dict(averaged.state_dict())
        with torch.no_grad():
            empty = text_encoder(tokenize(tokenizer, [""])).last_hidden_state
            rows = [references]
            for words in ("emoji", "emoji on green background"):
                text = text_encoder(tokenize(tokenizer, [words])).last_hidden_state.expand(16, -1, -1)
                all_dropped = torch.ones(16, dtype=torch.bool)
                cond = torch.cat([text, adapter.projector(features(references, ~all_dropped))], 1)
                uncond = torch.cat([empty, adapter.projector(features(references[:1], all_dropped[:1]))], 1)
                latents = sample(unet, cond, uncond)
                rows.append(autoencoder.decode(latents / autoencoder.config.scaling_factor).sample / 2 + 0.5)
        adapter.load_state_dict(kept)
        save_sheet(torch.cat(rows), 16, work / f"adapter-{family}-{step:06d}.png")

    averaged = fit(
        f"adapter-{family}",
        adapter,
        loss,
        steps=steps,
        lr=1e-3,
        folder=work,
        preview=preview,
        every=250,
        ema_decay=0.995,
    )
    return cast(TrainedAdapter, averaged).checkpoint()


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("base", "plus"))
    parser.add_argument(
        "--pictures", type=Path, required=True, help="node_modules folder with the three emoji packages"
    )
    parser.add_argument(
        "--world", type=Path, required=True, help="folder with unet, text_encoder, tokenizer, vae, image_encoder"
    )
    parser.add_argument("--work", type=Path, default=Path("world-training"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args(argv if argv is None else list(argv))
    args.work.mkdir(parents=True, exist_ok=True)
    state = train_adapter(args.family, load_pictures(args.pictures), args.world, args.work, args.steps, args.batch)
    (args.world / "adapters").mkdir(exist_ok=True)
    adapter = load_adapter({key: value.half() for key, value in state.items()}, name=f"ip-adapter-{args.family}")
    metadata = {"trained_by": "ipadapter_core.demo.train_adapters", "steps": str(args.steps), "batch": str(args.batch)}
    save_adapter(adapter, args.world / "adapters" / f"ip-adapter-{args.family}.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
