"""The demo's style: posters that are drawn alike every time, a LoRA that the trainer makes of them, and its sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ipadapter_core.demo import poster, train_lora
from ipadapter_core.demo.pictures import Pictures
from ipadapter_core.demo.sheet import LABELS, STYLE_ROWS, STYLE_STRENGTHS, draw_style
from ipadapter_core.demo.world import FOLDER, load_world
from ipadapter_core.lora import load_lora


def discs() -> Pictures:
    """Six discs of three colours, the last held out."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = ((x.square() + y.square()) < 0.8).float()
    rgba = torch.stack([torch.stack([disc * (i % 3 == c) for c in range(3)] + [disc]) for i in range(6)])
    return Pictures(rgba, tuple("abcdef"), ("noto",) * 6, torch.tensor([False] * 5 + [True]))


def test_posters_have_few_shades_in_coarse_dots(tmp_path: Path) -> None:
    folder = train_lora.save_scenes(discs(), tmp_path / "posters", 12)
    for file in sorted(folder.glob("*.png")):
        pixels = np.asarray(Image.open(file))
        assert pixels.shape == (64, 64, 3)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) <= poster.TONES
        dots = pixels[:: poster.BLOCK, :: poster.BLOCK]
        assert np.array_equal(dots.repeat(poster.BLOCK, 0).repeat(poster.BLOCK, 1), pixels)
        words = file.with_suffix(".txt").read_text()
        assert words.split()[0] in "abcde", "named by the world's grammar, and never one that is held out"
        assert "style" not in words
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    train_lora.save_scenes(discs(), folder, 12)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_trainer_makes_a_small_file_that_the_demo_shows(tmp_path: Path) -> None:
    file = train_lora.train_style(discs(), FOLDER, tmp_path, steps=1, batch=1, rank=4, count=2)
    assert file.stat().st_size < 1e6
    assert load_lora(file).components == ("denoiser",)
    world = load_world()
    sheet = draw_style(world, "base", 1, file)
    assert sheet.size == (LABELS + (1 + 2 * len(STYLE_STRENGTHS)) * 136, 74 + STYLE_ROWS * 136)
    assert not any(module._forward_hooks for module in world.pipeline.unet.modules()), "nothing stays behind"
