"""Make the demo world: ``python -m ipadapter_core.demo.train_world all --pictures node_modules``, then ``join`` and ``sheet``.

``all`` trains everything on the device that it finds (``train_all``), ``join`` makes the model folder of what was trained, ``sheet`` draws
and measures every adapter in it, ``references`` writes the held-out pictures that this is done with.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from ..devices import usable_device
from .build_world import join, take, write_references
from .pictures import load_pictures
from .sheet import run
from .train_all import BASES, Settings, train_all
from .world import REFERENCES


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("all", "join", "sheet", "references"))
    parser.add_argument("--base", choices=tuple(BASES), default="unet", help="the base model")
    parser.add_argument(
        "--pictures", type=Path, help="of all and references: node_modules folder with the three emoji packages"
    )
    parser.add_argument("--work", type=Path, default=Path("world-training"), help="what was trained, states, sheets")
    parser.add_argument(
        "--world", type=Path, help="of all: take image encoder, autoencoder and text encoder of this folder"
    )
    parser.add_argument(
        "--steps", type=int, help="of all: of each stage at most; of sheet: of each picture, default 20"
    )
    parser.add_argument("--batch", type=int, default=512, help="of all")
    parser.add_argument("--device", default="auto", help="of all: auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--seconds", type=float, default=420.0, help="of all: what its stages share")
    parser.add_argument(
        "--out", type=Path, default=Path("world"), help="the model folder that join writes and sheet reads"
    )
    args = parser.parse_args(argv if argv is None else list(argv))
    args.work.mkdir(parents=True, exist_ok=True)
    base = BASES[args.base]
    if args.stage == "join":
        join(args.work, args.out, base)
        print(args.out)
        return
    if args.stage == "sheet":
        with torch.no_grad():
            for family in base.adapters:
                run(args.work / f"sheet-{family}", family=family, steps=args.steps or 20, folder=args.out)
        return
    if args.pictures is None:
        parser.error(f"{args.stage} needs --pictures")
    if args.stage == "references":
        write_references(load_pictures(args.pictures), REFERENCES)
        return
    if args.world is not None:
        take(args.world, args.work)
    device, settings = torch.device(usable_device(args.device)), Settings(args.seconds, args.batch, args.steps)
    train_all(load_pictures(args.pictures, everything=True), args.work, device, settings, base)


if __name__ == "__main__":
    main()
