"""A tiny model folder and pictures that a training can run on in a second."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ipadapter_core.demo.pictures import Pictures
from ipadapter_core.demo.tokenizer import train_tokenizer
from ipadapter_core.training import RunConfig, parse_config

SIDE = 32
NAMES = ("cat", "dog", "frog", "owl", "bee", "fox")


def save_model(
    folder: Path,
    kind: str = "sd15",
    *,
    prediction: str = "epsilon",
    seed: int = 0,
    text_width: int = 16,
    kl: bool = False,
) -> Path:
    """A diffusers pipeline folder of random weights with an image encoder: kind "sd15" or "sdxl".

    `kl`: with the autoencoder that single-file checkpoints hold, which is slower than the tiny one.
    """
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(seed)
    captions = [f"{n} on red green blue background" for n in NAMES]
    tokenizer = train_tokenizer(captions, 300, 12, folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=text_width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=8,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, projection_dim=12,
        image_size=28, patch_size=14,
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    if kl:
        vae = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
    sizes: dict[str, Any] = {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
        "norm_num_groups": 4, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction, clip_sample=False,
        steps_offset=1, set_alpha_to_one=False,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(vision)
    if kind == "sdxl":
        # as in the real ones, by whose widths diffusers tells the two apart in a single file
        second = copy.deepcopy(text)
        second.hidden_size = 2 * text_width if kl else text_width
        unet = UNet2DConditionModel(
            cross_attention_dim=text_width + second.hidden_size, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 8, **sizes,
        )  # fmt: skip
        StableDiffusionXLPipeline(
            vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(second), tokenizer=tokenizer,
            tokenizer_2=tokenizer, unet=unet, scheduler=scheduler, image_encoder=encoder, add_watermarker=False,
        ).save_pretrained(folder)  # fmt: skip
    else:
        unet = UNet2DConditionModel(cross_attention_dim=text_width, **sizes)
        StableDiffusionPipeline(
            vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, image_encoder=encoder, requires_safety_checker=False,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def picture(number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A shape on a colour, another for every number."""
    rng = np.random.default_rng(number)
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    pixels[:] = rng.integers(0, 255, 3)
    top, left = rng.integers(4, 16, 2)
    pixels[top : top + 18, left : left + 18] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels)


def save_pictures(folder: Path, count: int = 6) -> Path:
    """Pictures with captions beside them, two of each subject."""
    for number in range(count):
        sub = folder / f"subject{number // 2}"
        sub.mkdir(parents=True, exist_ok=True)
        picture(number).save(sub / f"{number}.png")
        (sub / f"{number}.txt").write_text(f"{NAMES[number % len(NAMES)]} on red background")
    return folder


def save_list(folder: Path, count: int = 4) -> Path:
    """The original's JSON list."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"image_file": f"{number}.png", "text": NAMES[number % len(NAMES)]} for number in range(count)]
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
    (folder / "list.json").write_text(json.dumps(entries))
    return folder / "list.json"


def tiny_config(model: Path, data: Path, out: Path, **changes: Any) -> RunConfig:
    """A run of six steps of two; changes as `section__key=value`."""
    values: dict[str, dict[str, Any]] = {
        "model": {"base": str(model)},
        "adapter": {"family": "base"},
        "data": {"path": str(data), "resolution": SIDE, "min_side": 16, "cache_dtype": "float32"},
        "train": {"steps": 6, "batch": 2, "lr": 1e-3, "warmup": 2, "device": "cpu", "ema": 0.9, "ignore_memory": True},
        "watch": {
            "log_every": 1, "validate_every": 0, "sample_every": 0, "validation": 2, "tensorboard": False, "plot": False,
            "timesteps": (100, 900), "sample_steps": 2, "sample_count": 2,
        },
        "output": {"folder": str(out), "dtype": "float32", "save_every": 0, "state_every": 2},
    }  # fmt: skip
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return parse_config(values, "the test")


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of all weights but an adapter's: equal as long as nothing frozen changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if ".processor." not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def six_discs() -> Pictures:
    """Six discs of three colours, the last held out."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = ((x.square() + y.square()) < 0.8).float()
    rgba = torch.stack([torch.stack([disc * (i % 3 == c) for c in range(3)] + [disc]) for i in range(6)])
    names, studios = tuple("abcdef"), ("noto",) * 6
    return Pictures(rgba, names, studios, torch.tensor([False] * 5 + [True]))
