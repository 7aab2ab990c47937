"""Train an IP-Adapter on the demo world from nothing, and measure it as ``ipadapter demo`` does:
``python -m ipadapter_core.demo.train_adapters plus --pictures node_modules``.

The recipe is the original's (frozen UNet; projector, ``to_k_ip`` and ``to_v_ip`` learn; image, text and both dropped in
5 % of the cases each) with one addition: in half of the pairs the reference stands on another background than the target
and the caption names the target's, so that the adapter learns to leave the background to the text where text speaks.

Below ``--work`` it leaves the adapter, loss.png (validated on emoji that no training saw), sheets, and figures.json. Killed
and started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from einops import rearrange
from torch import Tensor, nn

from ..attention.maths import split_heads
from ..checkpoints import AdapterSpec
from ..checkpoints.projectors import Resampler
from ..features import CLIP_MEAN, CLIP_STD
from ..files.whole import written_whole
from ..generate import to_pillow
from ..images.encoder import TransformersImageEncoder
from ..training.accelerator import build_accelerator
from ..training.adapter import TrainedAdapter
from ..training.adapter_trainee import AdapterTrainee
from ..training.batches import Batch, Nothing
from ..training.config import ModelConfig, OptimizerName, RunConfig, parse_config
from ..training.frozen import FrozenBase, load_base
from ..training.log import Log
from ..training.loop import fit
from ..training.objectives import objective_for
from ..training.order import NoiseDraws, seeded
from ..training.processors import IPAttnProcessor
from ..training.state import ResultFiles, RunFolder
from ..training.trainee import Parts, Shown
from ..training.watch import Validator
from .measure import STYLE, measure
from .pictures import (
    BACKGROUNDS,
    SIZE,
    Pictures,
    caption,
    colour_table,
    draw_scenes,
    load_pictures,
    on_background,
    place,
    recolour,
)
from .train_parts import draw_timesteps, encode
from .world import FOLDER, GUIDANCE, load_world

SEED = 5
DROP = 0.05
"""Share of pairs without image, without text, and without both (tencent tutorial_train.py)."""
MARK = 1.5
GRID_SHARPNESS = 3.0


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
        attention = layer[0]
        shared = torch.randn_like(attention.to_q.weight) * GRID_SHARPNESS / width**0.5
        keys, values = attention.to_kv.weight.chunk(2)
        keys.copy_(shared)
        nn.init.orthogonal_(values)
        nn.init.orthogonal_(attention.to_out.weight)
        attention.to_q.weight.copy_(shared @ flip)


@torch.no_grad()
def listen(adapter: TrainedAdapter) -> None:
    """Keys large enough that the sites' heads differ in what they look at, values small enough not to disturb."""
    for layer in adapter.ip_adapter:
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


class PairBatches:
    """Freshly drawn pairs for every step; what is drawn follows from the step alone, so a resumed run sees the same."""

    def __init__(
        self, pictures: Pictures, base: FrozenBase, encoder: TransformersImageEncoder, spec: AdapterSpec, batch: int
    ) -> None:
        self.pictures, self.base, self.encoder, self.spec, self.batch = pictures, base, encoder, spec, batch
        self.seen = pictures.where(held_out=False)
        self.mean, self.std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]

    def batches(self, micro: int, end: int) -> Iterator[tuple[Batch, NoiseDraws]]:
        for step in range(micro, end):
            generator = seeded(SEED, "pairs", step)
            index = self.seen[torch.randint(len(self.seen), (self.batch,), generator=generator)]
            batch, no_image = self.pairs(index, generator, step)
            noise = torch.randn(batch.latents[:, 0].shape, generator=generator)
            timesteps = draw_timesteps(self.batch, generator)
            # a dropped text is an empty caption already
            yield batch, NoiseDraws(noise, noise, timesteps, no_image, torch.zeros_like(no_image))

    def pairs(self, index: Tensor, generator: torch.Generator, step: int) -> tuple[Batch, Tensor]:
        """Freshly drawn pairs of these pictures, and which references are dropped."""
        references, targets, captions, no_image = draw_pairs(self.pictures, index, generator)
        latents, count = encode(self.base.vae, targets), len(index)
        sizes, places = torch.zeros(count, 6), [(step, i) for i in range(count)]
        tokens = self.base.tokenize(captions)
        return Batch(latents[:, None], self.features(references), tokens, sizes, places), no_image

    def held_out(self, count: int) -> list[Batch]:
        """Pairs of emoji that are never trained on, in batches of one."""
        unseen = self.pictures.where(held_out=True)
        index = unseen[torch.arange(count) * len(unseen) // count]
        return [self.pairs(one[None], seeded(SEED, "validation", i), 0)[0] for i, one in enumerate(index)]

    def features(self, images: Tensor) -> Tensor:
        """The adapter's features of images ``b 3 64 64`` in 0..1."""
        return self.spec.format.feature.of(self.encoder.encode((images - self.mean) / self.std))

    def neutral(self) -> Tensor:
        """The features that stand for no image."""
        features = self.spec.format.feature.of(self.encoder.encode(torch.zeros(1, 3, SIZE, SIZE)))
        return torch.zeros_like(features) if self.spec.unconditional == "zero_embeds" else features


class WorldAdapter(AdapterTrainee):
    """The adapter on the world's models, whose attentions compute it in plain matmuls."""

    def attach(self, learned: nn.Module, parts: Parts) -> None:
        learned.install(
            parts["denoiser"],
            lambda layer: MatmulIPAttention(layer) if isinstance(layer, IPAttnProcessor) else AttnProcessor(),
        )


def settings(
    family: str, work: Path, steps: int, batch: int, lr: float, optimizer: OptimizerName, start_from: str = ""
) -> RunConfig:
    """The run as the trainer knows it; its pictures are drawn, so it has no data.path."""
    values = {
        "adapter": {"family": family, "start_from": start_from, "depth": 2, "init": "zero_v"},
        "data": {"resolution": SIZE},
        "train": {
            "steps": steps, "batch": batch, "lr": lr, "precision": "bf16", "schedule": "cosine", "optimizer": optimizer,
            "warmup": min(200, steps // 10), "ema": 0.995, "beta2": 0.99, "seed": SEED, "device": "cpu",
        },
        "watch": {
            "log_every": 10, "validate_every": 100, "validation": 16, "timesteps": [500, 800, 900, 960],
            "sample_every": 250, "guidance": GUIDANCE, "tensorboard": False,
            "sample_prompts": ["emoji", "emoji on green background"],
        },
        "output": {
            "folder": str(work / f"adapter-{family}"), "name": f"ip-adapter-{family}", "state_every": 250, "save_every": 0,
        },
    }  # fmt: skip
    return parse_config(values, "train_adapters")


def train_adapter(config: RunConfig, pictures: Pictures, world: Path) -> Path:
    """Train one adapter on the world's frozen models; returns its file. Started again, it goes on where it was."""
    config = replace(config, model=ModelConfig(base=str(world)))
    folder = RunFolder(config.output)
    folder.prepare()
    base = load_base(str(world))
    base.unet.to(memory_format=torch.channels_last)
    encoder = TransformersImageEncoder.from_pretrained(world / "image_encoder")
    torch.manual_seed(SEED)
    trainee = WorldAdapter.build(config, base)
    batches = PairBatches(pictures, base, encoder, trainee.spec, config.train.batch)
    if config.adapter.family == "plus" and not config.adapter.start_from:
        count = min(128, len(batches.seen))
        index = batches.seen[torch.arange(count) * len(batches.seen) // count]
        first = draw_scenes(pictures, index, seeded(SEED, "start"), recolour_rate=0.0)
        start_on_grid(trainee.adapter.image_proj, batches.features(first.images))
        listen(trainee.adapter)
    trainee.attach(trainee.adapter, trainee.parts)
    objective = objective_for(base.scheduler, "auto", config.loss)
    step = trainee.step(objective, Nothing(batches.neutral(), base.tokenize([""])))
    shown = torch.cat([pictures.where(held_out=True)[::5][:10], batches.seen[::97][:6]])
    references = on_background(place(pictures.rgba[shown], None), colour_table()[torch.arange(len(shown)) % 12])
    tiles = [to_pillow(image.permute(1, 2, 0)) for image in references]
    sheets = Shown(tiles, [""] * len(tiles), batches.features(references))
    validator = Validator(trainee, batches.held_out(config.watch.validation), sheets)
    metadata = {"trained_by": "ipadapter_core.demo.train_adapters", "batch": str(config.train.batch)}
    files = ResultFiles(folder, trainee, metadata, averaged=True)
    with Log(folder.path, steps=config.train.steps, tensorboard=False) as log:
        outcome = fit(config, build_accelerator(config), step, batches, folder, log, validator, files)
    if outcome.stopped:
        raise KeyboardInterrupt
    return outcome.file


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("base", "plus"))
    parser.add_argument(
        "--pictures", type=Path, required=True, help="node_modules folder with the three emoji packages"
    )
    parser.add_argument(
        "--world", type=Path, default=FOLDER, help="folder of the frozen models; default: the shipped world"
    )
    parser.add_argument("--work", type=Path, default=Path("world-training"), help="states, loss.png, sheets, figures")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="muon needs torch 2.9")
    parser.add_argument("--start-from", default="", help="adapter file to begin with; default: nothing")
    parser.add_argument(
        "--sampling-steps", type=int, default=20, help="of the pictures that are measured; 0: measure none"
    )
    parser.add_argument("--install", action="store_true", help="copy the adapter into the world's adapters folder")
    args = parser.parse_args(argv if argv is None else list(argv))
    args.work.mkdir(parents=True, exist_ok=True)
    config = settings(args.family, args.work, args.steps, args.batch, args.lr, args.optimizer, args.start_from)
    file = train_adapter(config, load_pictures(args.pictures), args.world)
    print(f"{file}\n{file.with_name('loss.png')}")
    if args.sampling_steps:
        world = load_world(args.world, {args.family: file})
        with torch.no_grad():
            found = measure(world, args.family, steps=args.sampling_steps, style=args.world / "loras" / STYLE.name)
        print(found.table())
        with written_whole(file.with_name("figures.json")) as place:
            place.write_bytes(json.dumps(found.as_dict(), indent=1).encode())
    if args.install:
        target = args.world / "adapters" / file.name
        target.parent.mkdir(exist_ok=True)
        with written_whole(target) as place:
            shutil.copyfile(file, place)


if __name__ == "__main__":
    main()
