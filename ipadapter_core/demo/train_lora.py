"""Train the demo world's style LoRA: ``python -m ipadapter_core.demo.train_lora --pictures node_modules --work …``.

The style is ``poster``'s. Pillow prints it from scenes of the world's own pictures; the captions are the world's, without a trigger word, so strength alone switches the style on.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..files.whole import written_whole
from ..generate import to_pillow
from ..training.config import RunConfig, parse_config
from ..training.order import seeded
from ..training.run import train
from .pictures import BACKGROUNDS, Pictures, caption, colour_table, load_pictures, on_background, place
from .poster import as_poster
from .world import FOLDER

SEED = 11
FILE = "demo-world-style.safetensors"


def save_scenes(pictures: Pictures, folder: Path, count: int) -> Path:
    """Posters of scenes with the world's captions beside them; emoji that are held out are in none."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = pictures.where(held_out=False)
    names, colours = list(BACKGROUNDS), colour_table()
    for number in range(count):
        file = folder / f"{number:05d}.png"
        generator = seeded(SEED, "scene", number)
        picture = int(seen[int(torch.randint(len(seen), (), generator=generator))])
        background = int(torch.randint(len(names), (), generator=generator))
        told = bool(torch.rand((), generator=generator) < 0.5)
        scene: Tensor = on_background(place(pictures.rgba[picture][None], generator), colours[background][None])[0]
        as_poster(to_pillow(scene.permute(1, 2, 0).clamp(0, 1))).save(file)
        words = caption(None, pictures.names[picture], names[background] if told else None)
        file.with_suffix(".txt").write_text(words, encoding="utf-8")
    return folder


def settings(work: Path, world: Path, pictures: Path, steps: int, batch: int, rank: int) -> RunConfig:
    """The run as ``ipadapter train`` would read it from a file."""
    return parse_config(
        {
            "model": {"base": str(world)},
            "lora": {"rank": rank, "algorithm": "locon", "targets": "all: 0, attn: 1, ff: 1, proj: 1, resnet conv: 1"},
            "data": {"path": str(pictures), "resolution": 64, "cache": str(work / "cache"), "min_side": 64},
            "loss": {"drop_text": 0.1},
            "train": {
                "steps": steps, "batch": batch, "lr": 2e-3, "schedule": "cosine", "warmup": min(20, steps // 10),
                "ema": 0.98, "seed": SEED, "device": "cpu", "precision": "fp32",
            },
            "watch": {
                "log_every": 10, "validate_every": max(1, steps // 6), "validation": 16, "timesteps": [500, 800, 900, 960],
                "sample_every": max(1, steps // 3), "sample_count": 6, "guidance": 2.0, "tensorboard": False,
                "sample_prompts": ["", "emoji"],
            },
            "output": {
                "folder": str(work / "demo-world-style"), "name": "demo-world-style", "state_every": 100, "save_every": 0,
                "key_format": "kohya", "dtype": "float16",
            },
        },
        "train_lora",
    )  # fmt: skip


def train_style(pictures: Pictures, world: Path, work: Path, *, steps: int, batch: int, rank: int, count: int) -> Path:
    """Train the style on a world's frozen models; returns its file. Started again, it goes on where it was."""
    config = settings(work, world, save_scenes(pictures, work / "posters", count), steps, batch, rank)
    outcome = train(config)
    if outcome.stopped:
        raise KeyboardInterrupt
    return outcome.file


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pictures", type=Path, required=True, help="node_modules folder with the three emoji packages"
    )
    parser.add_argument("--world", type=Path, default=FOLDER, help="folder of the frozen models; default: the shipped")
    parser.add_argument("--work", type=Path, default=Path("world-training"), help="pictures, cache, states, sheets")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--count", type=int, default=512, help="posters to draw")
    parser.add_argument("--start-over", action="store_true", help="drop what an earlier run in this folder learned")
    parser.add_argument("--install", action="store_true", help="copy the LoRA into the world's loras folder")
    args = parser.parse_args(argv if argv is None else list(argv))
    if args.start_over:
        for name in ("demo-world-style", "posters", "cache"):
            shutil.rmtree(args.work / name, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    file = train_style(
        load_pictures(args.pictures), args.world, args.work, steps=args.steps, batch=args.batch, rank=args.rank,
        count=args.count,
    )  # fmt: skip
    print(f"{file} ({file.stat().st_size / 1e3:.0f} kB)\n{file.with_name('sheet.png')}")
    if args.install:
        target = args.world / "loras" / FILE
        target.parent.mkdir(exist_ok=True)
        with written_whole(target) as place:
            shutil.copyfile(file, place)


if __name__ == "__main__":
    main()
