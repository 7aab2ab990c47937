"""Second stage of the demo UNet, words and pictures together: ``python -m ipadapter_core.demo.train_together …``.

A released UNet has drawn billions of pictures before an adapter meets it. One of 17 million parameters that has drawn a
hundred thousand paints what a word means on average, and an adapter on it, frozen, hands over colours but hardly shapes.
So the UNet and the text encoder go on learning while a plus adapter, begun from nothing, hands them picture tokens in three
quarters of the samples, at times at some of the sites only, so that every depth learns to listen. The adapter is kept as
``ip-adapter-together.safetensors``, with which ``train_adapters plus --start-from`` can begin.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..checkpoints import load_adapter, save_adapter
from ..features import CLIP_MEAN, CLIP_STD
from ..images.encoder import TransformersImageEncoder
from ..models import layout_of
from ..training.adapter import fresh_adapter
from ..training.config import AdapterConfig
from ..training.frozen import encoder_sizes
from ..training.order import seeded
from ..training.processors import IPAttnProcessor
from .pictures import Pictures, colour_table, draw_captions, draw_scenes, load_pictures, on_background, place, recolour
from .stages import picture_grid, stage_config, train_stage
from .train_adapters import MatmulIPAttention, draw_pairs, listen, start_on_grid
from .train_parts import LATENT_SCALE, PREVIEW_PROMPTS, build_scheduler, encode, sample, tokenize, velocity_loss

NUM_TOKENS = 16
TEXT_ONLY = 1 / 4
"""Share of a batch that sees no adapter at all: strength 0 must stay a good text-to-image model."""
SITE_DROPOUT = 0.15
"""Share of the pictured samples whose tokens reach each site with probability one half only."""
ONE_ROLE = 0.15
"""Share of the pictured samples whose tokens reach the sites of composition only, and as large a share for style. Released
models divide these tasks by themselves; here, composition sees the reference in wrong colours and style sees it turned by a
quarter or half, so that each learns to hand over just what its name says."""


def train_together(pictures: Pictures, world: Path, work: Path, steps: int, batch: int, lr: float) -> nn.ModuleDict:
    """Go on training the UNet and the text encoder of ``world``; returns them averaged, with the adapter used."""
    torch.manual_seed(7)
    seen, unseen = pictures.where(held_out=False), pictures.where(held_out=True)
    unet = UNet2DConditionModel.from_pretrained(world / "unet").float().to(memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(world / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(world / "text_encoder").float()
    autoencoder = AutoencoderTiny.from_pretrained(world / "vae").float().requires_grad_(False)
    encoder = TransformersImageEncoder.from_pretrained(world / "image_encoder")
    start = AdapterConfig("plus", num_tokens=NUM_TOKENS, depth=2)
    adapter = fresh_adapter(unet, encoder_sizes(str(world), ""), start)
    projector = adapter.image_proj
    listen(adapter)
    sites = [MatmulIPAttention(layer) for layer in adapter.ip_adapter if isinstance(layer, IPAttnProcessor)]
    left = iter(sites)
    processors = {
        name: next(left) if isinstance(layer, IPAttnProcessor) else AttnProcessor()
        for name, layer in zip(adapter.names, adapter.ip_adapter, strict=True)
    }
    layout = layout_of(unet)
    by_path = dict(zip((name.removesuffix(".processor") for name in processors), processors.values(), strict=True))
    roles = layout.model.roles
    styling = {by_path[site.path] for site in layout.sites if site.order in roles.style}
    unet.set_attn_processor(processors)  # which empties the mapping
    models = nn.ModuleDict({"unet": unet, "text": text_encoder, "projector": projector})
    scheduler = build_scheduler()
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]

    def features(images: Tensor, dropped: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return encoder.encode((images - mean) / std * ~dropped[:, None, None, None]).penultimate

    generator = seeded("together")
    first = draw_scenes(
        pictures, seen[torch.randperm(len(seen), generator=generator)[:128]], generator, recolour_rate=0.0
    )
    start_on_grid(projector, features(first.images, torch.zeros(128, dtype=torch.bool)).float())

    def loss(step: int) -> Tensor:
        generator = seeded("together", step)
        index = seen[torch.randint(len(seen), (batch,), generator=generator)]
        n = round(batch * (1 - TEXT_ONLY))
        references, targets, captions, dropped = draw_pairs(pictures, index[:n], generator)
        scenes = draw_scenes(pictures, index[n:], generator, recolour_rate=0.1)
        captions = captions + draw_captions(pictures, scenes, generator)
        kind = torch.rand(n, generator=generator)
        partly = kind < SITE_DROPOUT
        composition = (kind >= SITE_DROPOUT) & (kind < SITE_DROPOUT + ONE_ROLE)
        style = (kind >= SITE_DROPOUT + ONE_ROLE) & (kind < SITE_DROPOUT + 2 * ONE_ROLE)
        references = recolour(
            torch.cat([references, torch.ones_like(references[:, :1])], 1),
            torch.where(composition, torch.rand(n, generator=generator) * 5.0 + 0.6, 0.0),
        )[:, :3]
        for i in torch.nonzero(style)[:, 0].tolist():
            turns = int(torch.randint(1, 4, (), generator=generator))
            references[i] = references[i].rot90(turns, (-2, -1))
        for site in sites:
            on = ~partly | (torch.rand(n, generator=generator) < 0.5)
            on &= ~composition if site in styling else ~style
            site.gate = torch.cat([on, torch.zeros(batch - n, dtype=torch.bool)]).float()[:, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            text = text_encoder(tokenize(tokenizer, captions)).last_hidden_state
            tokens = projector(features(references, dropped))
        tokens = torch.cat([tokens, tokens.new_zeros(batch - n, *tokens.shape[1:])])
        context = torch.cat([text.float(), tokens.float()], 1)
        latents = encode(autoencoder, torch.cat([targets, scenes.images]))
        return velocity_loss(unet, latents, context, scheduler, generator)

    shown = torch.cat([unseen[::5][:10], seen[::97][:6]])
    references = on_background(place(pictures.rgba[shown], None), colour_table()[torch.arange(16) % 12])

    def preview() -> Image.Image:
        empty = text_encoder(tokenize(tokenizer, [""])).last_hidden_state
        none = torch.zeros(16, dtype=torch.bool)
        unconditional = torch.cat([empty, projector(features(references[:1], ~none[:1]))], 1)
        rows = [references]
        everywhere, nowhere = set(sites), set[MatmulIPAttention]()
        for words, listening in (
            (["emoji"] * 16, everywhere),
            (["emoji on green background"] * 16, everywhere),
            (["emoji"] * 16, styling),
            (["emoji"] * 16, everywhere - styling),
            (PREVIEW_PROMPTS, nowhere),
        ):
            for site in sites:
                site.gate = None if site in listening else torch.zeros(1)
            text = text_encoder(tokenize(tokenizer, words)).last_hidden_state
            context = torch.cat([text, projector(features(references, none))], 1)
            latents = sample(unet, context, unconditional)
            rows.append(autoencoder.decode(latents / LATENT_SCALE).sample / 2 + 0.5)
        return picture_grid(torch.cat(rows), 16)

    config = stage_config("together", work, steps=steps, lr=lr, seed=7, optimizer="muon", every=250)
    train_stage(config, models, loss, preview)
    return models


def save_together(models: nn.ModuleDict, work: Path) -> None:
    """Write ``unet`` and ``text_encoder`` as plain models, and the adapter that learned with them as a file of its own."""
    unet = models["unet"]
    state = {f"image_proj.{key}": value for key, value in models["projector"].state_dict().items()}
    for number, site in enumerate(unet.attn_processors.values()):
        if isinstance(site, MatmulIPAttention):
            state |= {f"ip_adapter.{number}.{key}": value for key, value in site.inner.state_dict().items()}
    adapter = load_adapter({key: value.half() for key, value in state.items()}, name="ip-adapter-together")
    save_adapter(adapter, work / "ip-adapter-together.safetensors")
    unet.set_attn_processor(AttnProcessor())
    unet.half().save_pretrained(work / "unet")
    models["text"].half().save_pretrained(work / "text_encoder")


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pictures", type=Path, required=True, help="node_modules folder with the three emoji packages"
    )
    parser.add_argument(
        "--world", type=Path, required=True, help="folder with unet, text_encoder, tokenizer, vae, image_encoder"
    )
    parser.add_argument("--work", type=Path, default=Path("world-training"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(argv if argv is None else list(argv))
    args.work.mkdir(parents=True, exist_ok=True)
    models = train_together(load_pictures(args.pictures), args.world, args.work, args.steps, args.batch, args.lr)
    save_together(models, args.work)


if __name__ == "__main__":
    main()
