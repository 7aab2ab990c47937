"""Make the demo world: ``python -m ipadapter_core.demo.train_world all --pictures node_modules``, then ``join``.

``all`` makes everything in one go on the device that it finds (``train_all``). ``autoencoder``, ``unet`` and ``image-encoder`` are how the
first world came about on two cores, each resumable and each a plain diffusers or transformers model saved with ``save_pretrained``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from ..devices import usable_device
from .pictures import draw_scenes, load_pictures
from .train_all import Settings, join, train_all
from .train_parts import (
    build_autoencoder,
    measure_image_encoder,
    patch_pca,
    save_image_encoder,
    train_autoencoder,
    train_image_encoder,
    train_unet,
    world_tokenizer,
)


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("all", "join", "autoencoder", "unet", "image-encoder"))
    parser.add_argument("--pictures", type=Path, help="node_modules folder with the three emoji packages; not for join")
    parser.add_argument("--work", type=Path, default=Path("world-training"), help="states, logs and previews")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="default 32 for the unet, 64 for the image encoder, 512 for all")
    parser.add_argument("--device", default="auto", help="of all: auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--seconds", type=float, default=420.0, help="of all: what its stages share")
    parser.add_argument("--out", type=Path, default=Path("world"), help="of join: the model folder to write")
    args = parser.parse_args(argv if argv is None else list(argv))
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "join":
        join(args.work, args.out)
        print(args.out)
        return
    if args.pictures is None:
        parser.error(f"{args.stage} needs --pictures")
    pictures = load_pictures(args.pictures, everything=args.stage == "all")
    if args.stage == "all":
        device = torch.device(usable_device(args.device))
        train_all(pictures, args.work, device, Settings(args.seconds, args.batch or 512, args.steps))
        return
    if args.stage == "autoencoder":
        train_autoencoder(pictures, args.work, args.steps or 2500).save_pretrained(args.work / "vae")
    if args.stage == "unet":
        generator = torch.Generator().manual_seed(1)
        seen = pictures.where(held_out=False)
        index = seen[torch.randint(len(seen), (2000,), generator=generator)]
        autoencoder = build_autoencoder(*patch_pca(draw_scenes(pictures, index, generator, recolour_rate=0.25).images))
        tokenizer = world_tokenizer(pictures, args.work / "tokenizer")
        unet, text = train_unet(pictures, tokenizer, autoencoder, args.work, args.steps or 5000, args.batch or 32)
        unet.half().save_pretrained(args.work / "unet")
        text.half().save_pretrained(args.work / "text_encoder")
    if args.stage == "image-encoder":
        model = train_image_encoder(pictures, args.work, args.steps or 4000, args.batch or 64)
        save_image_encoder(model.encoder, args.work / "image_encoder")
        print(json.dumps(measure_image_encoder(model, pictures)))


if __name__ == "__main__":
    main()
